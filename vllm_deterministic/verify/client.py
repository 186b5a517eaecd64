"""Talk to the server: one POST an answer, and every way that can fail as one clear line."""

import asyncio
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from vllm_deterministic.verify.completion import Completion, load_json, parse_completion
from vllm_deterministic.verify.settings import Settings

# No body may fill the memory here. The base holds whatever a server adds (prompts, prompt logprobs, a page of metrics);
# a candidate of a chat answer is a token, its logprob and its bytes as a list of numbers.
_BASE_BYTES = 8 * 2**20
_BYTES_PER_CANDIDATE = 256
_CHAT_TOKENS = 2**16  # of a chat request that sets no limit

# What to do about a status, in the words of the command that asked.
_HINTS: Mapping[int, str] = {
    400: "Check --extra-body, --max-tokens and --logprobs against the server's limits.",
    401: "Give the server's key with --api-key or OPENAI_API_KEY.",
    404: "Check --base-url, --endpoint and --model.",
    429: "The server limits the load: lower --max-concurrency or set --request-rate.",
    503: "The server is not ready: see its log, or wait with --ready-check-timeout-sec.",
}
_SAME_HINT = {403: 401, 422: 400}


class CannotRun(Exception):  # noqa: N818 - named after the exit it leads to, "could not run"
    """The verification cannot go on. The message says what happened, where, and what to do."""


class Rejected(CannotRun):
    """The server understood the request and refused it (400 or 422), so another request may still be answered."""


class Unreachable(CannotRun):
    """Nothing answers, or what answers says 503: it may yet come up."""


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    reason: str
    media_type: str
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


class Client:
    """An HTTP client bound to one server. Use as an async context manager.

    ``transport`` replaces the network, for tests. ``hints`` say what to do about a status where verify's options do
    not fit.
    """

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        hints: Mapping[int, str] | None = None,
    ) -> None:
        self.base_url = settings.base_url
        self._timeout = settings.timeout
        self._hints = {**_HINTS, **(hints or {})}
        key = settings.api_key.get_secret_value() if settings.api_key else ""
        self._http = httpx.AsyncClient(
            base_url=settings.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # `_request` bounds the whole exchange, which httpx's own time-outs do not
            # Idle connections are dropped before a server's usual 5 s, lest it close one just as it is used again.
            limits=httpx.Limits(max_connections=settings.max_concurrency + 1, keepalive_expiry=2.0),
            transport=transport,
            trust_env=not _is_loopback(settings.base_url),
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def complete(self, path: str, body: Mapping[str, Any]) -> Completion:
        """POST a completion request. Raises CannotRun, Rejected or Unreachable; never retries."""
        reply = await self._request("POST", path, body)
        try:
            return parse_completion(reply.content)
        except ValueError as error:
            raise CannotRun(
                f"{self.base_url}{path} answered with {error}{_sent_as(reply)}. "
                "Check that --base-url names an OpenAI-compatible server."
            ) from None

    async def get_json(self, path: str) -> Any:
        """GET a JSON document. Raises CannotRun or Unreachable."""
        reply = await self._request("GET", path, None)
        try:
            return load_json(reply.content)
        except ValueError as error:
            raise CannotRun(
                f"{self.base_url}{path} answered with invalid JSON ({error}){_sent_as(reply)}. "
                "Check that --base-url names an OpenAI-compatible server."
            ) from None

    async def get_text(self, path: str) -> str | None:
        """GET an optional page: its text, or None where the server has none or does not answer."""
        try:
            return (await self._request("GET", path, None)).text
        except CannotRun:
            return None

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> _Reply:
        where = f"{self.base_url}{path}"
        try:
            async with asyncio.timeout(self._timeout), self._http.stream(method, path, json=body) as response:
                media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                content = await _read(response, where, _most_bytes(body or {}))
                reply = _Reply(response.status_code, response.reason_phrase, media_type, content)
        except TimeoutError:
            raise CannotRun(
                f"{where} did not answer within {self._timeout:g} s. Raise --timeout or lower --max-concurrency."
            ) from None
        except httpx.ConnectError as error:
            raise Unreachable(
                f"Cannot connect to {self.base_url} ({_reason(error)}). "
                "Start the server, or correct --base-url; --ready-check-timeout-sec waits for one that is starting."
            ) from None
        except httpx.DecodingError as error:
            raise CannotRun(
                f"{where} answered with a body that its Content-Encoding does not fit ({_reason(error)}). "
                "Check what stands between here and the server."
            ) from None
        except httpx.TransportError as error:
            raise CannotRun(
                f"{where} broke the connection before it answered in full ({_reason(error)}). "
                "See the server's log; it may have stopped."
            ) from None
        if reply.status != 200:
            raise _refusal(reply, where, self._hints)
        return reply


def _most_bytes(body: Mapping[str, Any]) -> int:
    """More than any answer to this request takes."""

    def count(name: str) -> int:
        value = body.get(name)
        return max(1, value) if isinstance(value, int) else 1

    tokens = max(count("max_tokens"), count("max_completion_tokens"))
    if "messages" in body and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        tokens = _CHAT_TOKENS
    candidates = 1 + max(count("logprobs"), count("top_logprobs"))
    return _BASE_BYTES + _BYTES_PER_CANDIDATE * count("n") * tokens * candidates


async def _read(response: httpx.Response, where: str, most_bytes: int) -> bytes:
    """The body, decompressed; reading stops at the limit."""
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > most_bytes:
            raise CannotRun(
                f"{where} answered with more than {most_bytes // 2**20} MiB, far more than was asked for. "
                "Check that --base-url names an OpenAI-compatible server."
            )
    return bytes(content)


def _sent_as(reply: _Reply) -> str:
    """The media type, where that tells why an answer could not be read."""
    return "" if reply.media_type in ("", "application/json") else f", sent as {reply.media_type[:80]!r}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: BaseException) -> str:
    """The system's own words, which httpx wraps: "Connection refused" rather than "All connection attempts failed"."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return os.strerror(cause.errno or 0) if isinstance(cause, ConnectionError) else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).rstrip(".") or type(error).__name__


def _refusal(reply: _Reply, where: str, hints: Mapping[int, str]) -> CannotRun:
    hint = hints.get(_SAME_HINT.get(reply.status, reply.status), "See the server's log for the cause.")
    said = f"{where} answered {reply.status}: {_server_message(reply)} {hint}"
    if reply.status in (400, 422):
        return Rejected(said)
    return Unreachable(said) if reply.status == 503 else CannotRun(said)


def _server_message(reply: _Reply) -> str:
    """The server's own words, on one line that ends in a full stop."""
    try:
        error = load_json(reply.content)
    except ValueError:
        error = reply.text
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and key in error:
            error = error[key]
    words = " ".join(str(error).split()) or reply.reason or "no reason given"
    return (words[:297] + "..." if len(words) > 300 else words).rstrip(".") + "."
