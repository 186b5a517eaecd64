"""What the service is told at start: flags before environment variables before a YAML file."""

import ipaddress
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from vllm_deterministic.verify.settings import Settings, explain

_DURATION = re.compile(r"(\d+)(s|m|h|d)")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_NAMED = re.compile(r"(?P<name>[\w.:-]+)=(?P<url>https?://.*)")
_SHORTEST_TOKEN = 16

Positive = Annotated[int, Field(ge=1)]


class Target(BaseModel):
    """A server to verify. Requests name it; its URL and its key come from the settings alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9\[][A-Za-z0-9._:\[\]-]{0,62}$")
    url: str
    model: str | None = None
    api_key: SecretStr | None = None

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            return Settings(base_url=url).base_url
        except ValidationError as error:
            raise ValueError(explain(error).removeprefix("--base-url: ")) from None

    @classmethod
    def parse(cls, text: str) -> dict[str, str]:
        """Read ``URL`` or ``NAME=URL``; without a name, host and port are it."""
        if named := _NAMED.fullmatch(text):
            return named.groupdict()
        try:
            name = urlsplit(text).netloc.rpartition("@")[2]
        except ValueError:
            name = ""
        return {"name": name or "target", "url": text}  # a text without a host is no URL, which is said of `url`


class ServiceSettings(BaseSettings):
    """The settings of the service. Field names are those of the command line with underscores."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="VLLM_DETERMINISTIC_", env_ignore_empty=True
    )

    target: Annotated[tuple[Target, ...], NoDecode] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8090, ge=0, le=65535)
    token: SecretStr | None = None
    allow_no_token: bool = False
    api_key: SecretStr | None = None
    database: Path = Path("verifications.db")
    every: timedelta | None = None
    share: float = Field(default=0.1, gt=0, le=1)
    capacity: int = Field(default=256, ge=1, le=100_000)
    keep_runs: Positive = 1000
    keep_days: Positive = 30
    max_requests: Positive = 5000
    max_tokens: int = Field(default=256, ge=16)
    max_concurrency: Positive = 256
    max_queue: Positive = 8
    max_body_bytes: int = Field(default=65536, ge=1024)
    max_duration: timedelta = timedelta(hours=1)

    @field_validator("target", mode="before")
    @classmethod
    def _parse_targets(cls, targets: Any) -> Any:
        if isinstance(targets, str):
            targets = [text for text in re.split(r"[,\s]+", targets) if text]
        return [Target.parse(target) if isinstance(target, str) else target for target in targets]

    @field_validator("target")
    @classmethod
    def _names_differ(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        names = [target.name for target in targets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two targets are called {name!r}; name them, as in --target a=http://...")
        return targets

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if not host or re.search(r"[\s/]", host):
            raise ValueError(f"{host!r} is not a host name or an address")
        return host

    @field_validator("token")
    @classmethod
    def _is_token(cls, token: SecretStr | None) -> SecretStr | None:
        # The message must not repeat the token.
        if token is not None and not re.fullmatch(rf"[!-~]{{{_SHORTEST_TOKEN},}}", token.get_secret_value()):
            raise ValueError(
                f"at least {_SHORTEST_TOKEN} printable ASCII characters without spaces are needed; "
                "`openssl rand -hex 32` makes a good one"
            )
        return token

    @field_validator("every", "max_duration", mode="before")
    @classmethod
    def _parse_duration(cls, text: Any) -> Any:
        if text is None or isinstance(text, timedelta):
            return text
        found = _DURATION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{text!r} is not a duration; give one such as 30s, 10m or 1h")
        try:
            duration = timedelta(**{_UNITS[found[2]]: int(found[1])})
        except OverflowError:
            duration = timedelta.max
        if not timedelta(seconds=1) <= duration <= timedelta(days=30):
            raise ValueError(f"{text!r} is out of range; give 1s to 30d")
        return duration

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        if self.token is None and not self.allow_no_token and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} lets other machines start load on the targets: give a --token (or "
                "VLLM_DETERMINISTIC_TOKEN), or --allow-no-token if something else keeps strangers out"
            )
        return self

    @model_validator(mode="after")
    def _schedule_has_room(self) -> Self:
        if self.every is not None and self.scheduled_concurrency < 2:
            raise ValueError(
                f"--share {self.share:g} of --capacity {self.capacity} is less than 2 requests at a time, "
                "and a request without neighbours tests little: raise --share"
            )
        return self

    @property
    def scheduled_concurrency(self) -> int:
        """Most requests that a scheduled verification has in flight on a target: the share of its capacity."""
        return min(int(self.share * self.capacity), self.max_concurrency)

    def key_of(self, target: Target) -> SecretStr | None:
        """The key of a target: its own, or that of all."""
        return target.api_key or self.api_key

    @classmethod
    def load(cls, given: dict[str, Any], config: Path | None = None) -> "ServiceSettings":
        """Settings from flags (``given``), the environment and a file, in this order.

        Raises ValueError, in one line, for what is wrong in any of them.
        """

        class WithFile(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                file = (YamlConfigSettingsSource(settings_cls, yaml_file=config),) if config else ()
                return init_settings, env_settings, *file

        try:
            if config is not None:
                content = yaml.safe_load(config.read_text(encoding="utf-8"))
                if not isinstance(content, dict):
                    raise ValueError(f"--config {config}: it holds no settings; write lines such as 'port: 8090'")
            settings: ServiceSettings = WithFile(**given)
        except OSError as error:
            raise ValueError(f"--config {config}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {config}: it is no YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            raise ValueError(_explain(error)) from None
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return settings


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _explain(error: ValidationError) -> str:
    # A misspelt setting first: another one may be missing for its sake.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    if first["type"] == "missing" and first["loc"] == ("target",):
        return "--target: at least one is needed, for example --target http://127.0.0.1:8000"
    if first["type"] == "extra_forbidden":
        return f"{first['loc'][0]!r} is not a setting; `vllm-deterministic service --help` lists them"
    if len(first["loc"]) > 1:  # a field of a target; its input may be a key
        return f"--{first['loc'][0]}: {first['loc'][-1]}: {first['msg'].removeprefix('Value error, ')}"
    return explain(error)
