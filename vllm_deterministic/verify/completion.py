"""What a server answered, reduced to what must not vary, from either of the two OpenAI endpoints.

Logprobs are kept as the 64-bit floats that Python's ``json`` reads: two numbers are the same exactly if their bits
are. A server prints a float so that reading it gives the float back, so nothing is lost, and spelling (``1e-5``,
``0.00001``) is no difference.
"""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# Fields of vLLM's that a request asks with: for token ids, and that logprobs name tokens by id, since several ids can
# have the same text.
TOKEN_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The logprob of one output token, and those of the most likely candidates in the order the server sent them."""

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the n choices of an answer. ``token_ids`` is None where the server tells none: text stands for them."""

    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None

    @property
    def tokens(self) -> tuple[int | str, ...]:
        """Token ids, or the pieces of text the logprobs name, or the characters: the finest the server told."""
        if self.token_ids is not None:
            return self.token_ids
        if self.logprobs is not None:
            return tuple(entry.token for entry in self.logprobs)
        return tuple(self.text)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its choices by index, and what the server says of how it made them."""

    choices: tuple[Choice, ...]
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    system_fingerprint: str | None = None

    @property
    def output_tokens(self) -> int:
        """How many tokens the choices hold together, as near as the server lets one count."""
        return sum(len(choice.tokens) for choice in self.choices)


class _Answer(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _TopLogprob(_Answer):
    token: str
    logprob: float


class _ChatToken(_TopLogprob):
    top_logprobs: list[_TopLogprob] = []


class _Logprobs(_Answer):
    """Both shapes: parallel lists from completions, ``content`` from chat."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[_ChatToken] | None = None

    def entries(self) -> tuple[TokenLogprob, ...]:
        if self.content is not None:
            return tuple(
                TokenLogprob(entry.token, entry.logprob, tuple((top.token, top.logprob) for top in entry.top_logprobs))
                for entry in self.content
            )
        tops = self.top_logprobs or [None] * len(self.tokens)
        return tuple(
            TokenLogprob(token, logprob, tuple((top or {}).items()))
            for token, logprob, top in zip(self.tokens, self.token_logprobs, tops, strict=True)
        )


class _Message(_Answer):
    content: str | None = None


class _Choice(_Answer):
    index: int = 0
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _PromptDetails(_Answer):
    cached_tokens: int | None = None


class _Usage(_Answer):
    prompt_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Response(_Answer):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def load_json(content: bytes) -> Any:
    """Parse JSON strictly: NaN, Infinity and halves of a surrogate pair are refused. Raises ValueError."""
    try:
        value = json.loads(content, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\ud" in content.lower():
        # Escaped alone, a half passes for text here but can be written to no file.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return value


def parse_completion(content: bytes) -> Completion:
    """Read the body of an answer of ``/v1/completions`` or ``/v1/chat/completions``.

    Raises ValueError, in one line, where it is not JSON or not an answer of that form.
    """
    try:
        payload = load_json(content)
    except ValueError as error:
        raise ValueError(f"invalid JSON ({error})") from None
    try:
        response = _Response.model_validate(payload)
        choices = tuple(_choice(raw) for raw in sorted(response.choices, key=lambda raw: raw.index))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the answer"
        raise ValueError(f"no OpenAI completion ({where}: {first['msg']})") from None
    usage = response.usage or _Usage()
    prompt_ids = response.prompt_token_ids or response.choices[0].prompt_token_ids
    return Completion(
        choices=choices,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
        prompt_token_ids=tuple(prompt_ids) if prompt_ids else None,
        system_fingerprint=response.system_fingerprint,
    )


def _choice(raw: _Choice) -> Choice:
    text = raw.text if raw.text is not None else (raw.message.content if raw.message else None)
    try:
        logprobs = raw.logprobs.entries() if raw.logprobs else None
    except ValueError:
        raise ValueError("no OpenAI completion (the lists in logprobs have different lengths)") from None
    return Choice(
        text=text or "",
        token_ids=tuple(raw.token_ids) if raw.token_ids is not None else None,
        finish_reason=raw.finish_reason,
        logprobs=logprobs,
    )
