"""What one verification does: every setting, its default, its limits and the message when it is wrong."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

ArmName = Literal["identical", "mixed", "prefix", "sampled"]
OutputKind = Literal["console", "json", "html", "junit", "markdown", "png"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
OUTPUT_KINDS: tuple[OutputKind, ...] = ("console", "json", "html", "junit", "markdown")  # of a verification
# What is not for standard output, and the path that a message gives as an example.
_FILES: dict[OutputKind, str] = {"html": "report.html", "png": "lab.png"}

# Fields of the request that the verifier sets itself: changed from outside, answers would no longer be comparable.
_RESERVED = {"model", "prompt", "messages", "stream", "logprobs", "top_logprobs", "n", "seed", "cache_salt"}

Positive = Annotated[int, Field(ge=1)]


class OutputSpec(BaseModel):
    """Where one report goes: its kind and a path, standard output without one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: OutputKind = "console"
    path: Path | None = None

    @classmethod
    def parse(cls, text: str, kinds: Sequence[OutputKind] = OUTPUT_KINDS) -> Self:
        """Read ``kind=json,path=run.json``, with one of ``kinds``. Raises ValueError that says what is wrong."""
        word, separator, rest = text.partition(",")
        path_key, _, path = rest.partition("=")
        if not word.startswith("kind=") or (separator and (path_key != "path" or not path)):
            raise ValueError(f"{text!r} is not of the form kind=KIND,path=PATH")
        name = word.removeprefix("kind=")
        kind = next((kind for kind in kinds if kind == name), None)
        if kind is None:
            raise ValueError(f"{name!r} is not a kind of output; choose one of {', '.join(kinds)}")
        if not path and kind in _FILES:
            raise ValueError(f"{word} needs a path, for example {word},path={_FILES[kind]}")
        target = Path(path) if path else None
        if target is not None and target.is_dir():
            raise ValueError(f"{target} is a directory, not a file")
        if target is not None and not target.parent.is_dir():
            raise ValueError(f"the directory {target.parent} does not exist")
        if target is not None and not os.access(target if target.exists() else target.parent, os.W_OK):
            raise ValueError(f"there is no permission to write {target}")
        return cls(kind=kind, path=target)


class Settings(BaseModel):
    """The settings of a verification. Field names are those of the command line with underscores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    endpoint: str = "/v1/completions"
    model: str | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True)
    arms: tuple[ArmName, ...] = Field(default=ARMS, min_length=1)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    max_concurrency: Positive = 64
    num_prompts: int = Field(default=1000, ge=2)
    mixed_prompts: int = Field(default=100, ge=2)
    prefix_rounds: Positive = 1
    sampled_prompts: int = Field(default=96, ge=4)
    request_rate: float = Field(default=math.inf, gt=0, allow_inf_nan=True)
    max_tokens: Positive = 16
    logprobs: int = Field(default=5, ge=0, le=20)
    ignore_eos: bool = False
    extra_body: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, str] = Field(default_factory=dict)
    timeout: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    ready_check_timeout_sec: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    block_size: Positive | None = None
    kv_split: Positive = 256
    chunk_budget: Positive = 2048

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{url!r} is not a URL; give one such as http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise ValueError("it holds a user name or a password, which would end up in reports; use --api-key")
        return url.rstrip("/").removesuffix("/v1")

    @field_validator("endpoint")
    @classmethod
    def _is_path(cls, endpoint: str) -> str:
        if not endpoint.startswith("/") or not endpoint.endswith("/completions"):
            raise ValueError(f"{endpoint!r} is not supported; give /v1/completions or /v1/chat/completions")
        return endpoint

    @field_validator("arms", mode="before")
    @classmethod
    def _known_arms(cls, arms: Any) -> Any:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not an arm; choose from {', '.join(ARMS)}")
        return tuple(dict.fromkeys(arms))

    @field_validator("extra_body", mode="before")
    @classmethod
    def _parse_body(cls, body: Any) -> Any:
        if isinstance(body, str):
            try:
                body = json.loads(body)
            except json.JSONDecodeError as error:
                raise ValueError(f"it is not valid JSON: {error}") from None
        if not isinstance(body, dict):
            raise ValueError("it must be a JSON object such as '{\"ignore_eos\": true}'")
        if reserved := _RESERVED.intersection(body):
            raise ValueError(f"{', '.join(sorted(reserved))} cannot be set here: verify sets it itself")
        return body

    @field_validator("metadata", mode="before")
    @classmethod
    def _parse_pairs(cls, pairs: Any) -> Any:
        if isinstance(pairs, dict):
            return pairs
        parsed = {}
        for pair in pairs:
            key, separator, value = pair.partition("=")
            if not separator or not key:
                raise ValueError(f"{pair!r} is not of the form KEY=VALUE")
            parsed[key] = value
        return parsed

    @model_validator(mode="after")
    def _sampling_needs_room(self) -> Self:
        if "sampled" in self.arms and self.max_tokens < 4:
            raise ValueError(
                "the arm 'sampled' needs --max-tokens 4 or more, or different seeds may rightly give the same tokens"
            )
        return self

    @field_serializer("request_rate")
    def _json_has_no_infinity(self, rate: float) -> float | str:
        return rate if math.isfinite(rate) else "inf"

    @property
    def is_chat(self) -> bool:
        """Whether requests go to the chat endpoint."""
        return self.endpoint.endswith("/chat/completions")

    @property
    def completions_endpoint(self) -> str:
        """The endpoint that takes prompts as token ids, whatever ``endpoint`` is."""
        return self.endpoint.replace("/chat/completions", "/completions")

    def command_line(self) -> str:
        """The shell command that repeats this run. The API key is never part of it."""
        words = ["vllm-deterministic", "verify"]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.exclude or value == field.get_default(call_default_factory=True):
                continue
            words.append("--" + name.replace("_", "-"))
            if isinstance(value, bool):
                continue
            if name == "metadata":
                words.extend(f"{key}={text}" for key, text in value.items())
            elif name == "extra_body":
                words.append(json.dumps(value))
            else:
                words.append(",".join(value) if isinstance(value, tuple) else str(value))
        return shlex.join(words)


def explain(error: ValidationError) -> str:
    """One line for a wrong setting: the option, what is wrong, the value that was given."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not first["loc"]:
        return message
    option = "--" + str(first["loc"][0]).replace("_", "-")
    given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{option}: {message}{given}"
