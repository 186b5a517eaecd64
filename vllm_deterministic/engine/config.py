"""The settings of deterministic serving and the three ways they arrive: flags, environment, ``additional_config``."""

import argparse
import os
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_deterministic import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ADDITIONAL_CONFIG_KEY = "deterministic"
ENVIRONMENT_VARIABLE = "VLLM_DETERMINISTIC"
FLAG = "--enable-deterministic"
_KV_SPLITS = (64, 128, 256, 512, 1024)


class RefusalError(ValueError):
    """The promise cannot be kept with these settings: what, why, and what to do, in one or two lines."""


class DeterministicConfig(BaseModel):
    """Settings of one engine; they travel in ``VllmConfig.additional_config``, which is hashed into the compile key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_split: int = Field(
        256,
        description="positions in one split of the KV cache (on a GPU 512 unless given); the bytes depend on it",
    )
    attention: Literal["triton", "flex"] = Field(
        "triton",
        description="attention on a GPU by the project's kernel or by torch's FlexAttention; the bytes depend on it",
    )
    default_seed: int = Field(0, ge=0, lt=1 << 31, description="base of the seeds of requests that bring none")
    allow_untested: bool = Field(False, description="start on a vLLM version that has not been tested")
    allow_uncovered: bool = Field(False, description="start without the promise where a part is not covered")
    coverage_file: str | None = Field(None, description="file for what covers each part of the engine, as JSON")
    fingerprint_weights: Literal["content", "headers"] = Field(
        "content", description="what of the weights' files the fingerprint is taken of"
    )
    plugin_version: str = Field(__version__, description="set by the plugin: another version may give other bytes")

    @field_validator("kv_split")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value not in _KV_SPLITS:
            raise ValueError(f"must be one of {', '.join(map(str, _KV_SPLITS))}")
        return value

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Self | None:
        """The settings under the key ``deterministic``: an object, ``true`` for the defaults, ``false`` for none.

        Raises:
            RefusalError: the value is of another kind, or a field is unknown or wrong.
        """
        value = additional_config.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional_config, dict) else None
        if value is None or value is False:
            return None
        if value is True:
            value = {}
        if not isinstance(value, dict):
            raise RefusalError(
                f"additional_config['{ADDITIONAL_CONFIG_KEY}'] is {value!r}; it must be true or an object of settings"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise RefusalError("; ".join(_describe(problem) for problem in error.errors())) from None

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> Self | None:
        """The settings of an engine, None where it is not deterministic."""
        return cls.from_additional_config(vllm_config.additional_config)

    @classmethod
    def serving(cls, vllm_config: "VllmConfig") -> Self:
        """The settings of an engine whose layers are built in a process where they are replaced.

        Raises:
            RuntimeError: it is not deterministic, and another one that is has prepared this process.
        """
        deterministic = cls.of(vllm_config)
        if deterministic is None:
            raise RuntimeError("this process serves a deterministic engine; start the other engine in another process")
        return deterministic


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        allowed = ", ".join(field for field in DeterministicConfig.model_fields if field != "plugin_version")
        return f"unknown deterministic setting '{name}'; known are {allowed}"
    return f"deterministic setting '{name}' is {problem['input']!r}: {message}"


def requested_by_environment() -> bool:
    """Whether VLLM_DETERMINISTIC asks for deterministic serving.

    Raises:
        RefusalError: its value is neither 0 nor 1.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise RefusalError(f"{ENVIRONMENT_VARIABLE} is {value!r}; it must be 0 or 1")
    return value == "1"


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the group "deterministic" to vLLM's parser."""
    group = parser.add_argument_group(
        title="deterministic", description="The same request gives the same tokens and logprob bytes under any load."
    )
    group.add_argument(FLAG, action="store_true", default=False, help="Serve deterministically.")
    for name, field in DeterministicConfig.model_fields.items():
        if name == "plugin_version":
            continue
        description = str(field.description)
        default = f" Default: {field.default}." if field.default else ""
        text = f"{description[0].upper()}{description[1:]}.{default}"
        group.add_argument(_option(name), default=argparse.SUPPRESS, help=text, **_argument(field.annotation))


def _argument(annotation: Any) -> dict[str, Any]:
    if annotation is bool:
        return {"action": "store_true"}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    return {"type": int} if annotation is int else {"metavar": "FILE"}


def merge_cli_args(args: argparse.Namespace) -> None:
    """Move the flags of ``add_cli_args`` into ``args.additional_config``, from where every process takes them.

    Raises:
        RefusalError: an option was given without the flag, or both the options and ``--additional-config`` set a value.
    """
    given = {
        name: value
        for name in DeterministicConfig.model_fields
        if (value := getattr(args, f"deterministic_{name}", None)) is not None
    }
    if not getattr(args, "enable_deterministic", False):
        if given:
            raise RefusalError(f"{_option(next(iter(given)))} has no effect without {FLAG}: add {FLAG}")
        return
    additional = dict(getattr(args, "additional_config", None) or {})
    earlier = additional.get(ADDITIONAL_CONFIG_KEY)
    settings = dict(earlier) if isinstance(earlier, dict) else {}
    for name, value in given.items():
        if settings.get(name, value) != value:
            raise RefusalError(
                f"{_option(name)} {value} and --additional-config disagree on '{name}': keep one of them"
            )
    additional[ADDITIONAL_CONFIG_KEY] = {**settings, **given}
    args.additional_config = additional


def _option(name: str) -> str:
    return f"--deterministic-{name.replace('_', '-')}"
