"""A server with vLLM's HTTP face whose answers are a pure function of the request, until a fault is planted.

`FakeServer.transport` puts it behind httpx in process; `FakeServer.listen` behind a real socket.
"""

import asyncio
import hashlib
import json
import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

Reply = tuple[int, dict[str, Any] | str]
VOCABULARY = 5000


@dataclass
class Incoming:
    """One completion request as the server sees it."""

    number: int
    body: dict[str, Any]
    path: str
    in_flight: int
    cached_tokens: int


@dataclass
class FakeServer:
    """Faults are off by default; each is named after what it breaks."""

    vary_logprob_beyond: int | None = None  # in-flight requests; the last bit of one logprob moves above it
    swap_token_beyond: int | None = None  # in-flight requests
    swap_token_on_cache_hit: bool = False
    swap_token_of: Callable[[Incoming], bool] = lambda incoming: False
    ignore_seeds: bool = False
    equal_choices: bool = False
    unstable_seeds: bool = False
    answers_before_death: int | None = None
    status_after: tuple[int, int] | None = None  # (answers, status)
    starting_for: int = 0  # requests answered 503 at first
    invalid_json_after: int | None = None
    hang_after: int | None = None
    logprobs: bool = True
    logprobs_until: int | None = None
    token_ids: bool = True
    extensions: bool = True  # whether vLLM's request fields are taken
    metrics: bool = True
    chat_only: bool = False
    refuse_neighbours: bool = False
    fingerprints: tuple[str, ...] = ("fp-0",)
    max_model_len: int = 4096
    block_size: int = 16
    latency_s: float = 0.005
    key: str | None = None

    seen: list[Incoming] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    queries: int = 0
    hits: int = 0
    _cache: set[tuple[Any, ...]] = field(default_factory=set)

    async def handle(self, method: str, path: str, headers: dict[str, str], content: bytes) -> Reply:
        """Answer one HTTP request. Raises ConnectionResetError to break the connection."""
        if self.starting_for > 0:
            self.starting_for -= 1
            return 503, "starting"
        if self.answers_before_death is not None and len(self.seen) >= self.answers_before_death:
            raise ConnectionResetError
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "Incorrect API key"}}
        match method, path:
            case "GET", "/v1/models":
                return 200, {"data": [{"id": "fake", "max_model_len": self.max_model_len}, {"id": "other"}]}
            case "GET", "/version":
                return 200, {"version": "0.32.0+fake"}
            case "GET", "/metrics" if self.metrics:
                return 200, self._metrics_page()
            case "POST", "/v1/completions" if not self.chat_only:
                return await self._complete(path, json.loads(content))
            case "POST", "/v1/chat/completions":
                return await self._complete(path, json.loads(content))
        return 404, {"detail": "Not Found"}

    def _metrics_page(self) -> str:
        return (
            f'vllm:cache_config_info{{block_size="{self.block_size}",engine="0"}} 1.0\n'
            f'vllm:prefix_cache_queries_total{{engine="0",model_name="fake"}} {float(self.queries)}\n'
            f'vllm:prefix_cache_hits_total{{engine="0",model_name="fake"}} {float(self.hits)}\n'
        )

    async def _complete(self, path: str, body: dict[str, Any]) -> Reply:
        vllm_fields = {"return_token_ids", "return_tokens_as_token_ids", "top_k", "min_p", "cache_salt", "ignore_eos"}
        if not self.extensions and vllm_fields & body.keys():
            return 400, {"error": {"message": "Unrecognized request argument"}}
        if self.refuse_neighbours and "presence_penalty" in body:
            return 400, {"error": {"message": "presence_penalty is not supported"}}
        prompt = self._tokenize(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            incoming = Incoming(len(self.seen), body, path, self.in_flight, self._look_up(prompt, body))
            self.seen.append(incoming)
            await asyncio.sleep(self.latency_s)
            if self.hang_after is not None and incoming.number >= self.hang_after:
                await asyncio.sleep(3600)
            incoming.in_flight = max(incoming.in_flight, self.in_flight)
            return self._answer(incoming, prompt)
        finally:
            self.in_flight -= 1

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if isinstance(prompt, list):
            return prompt
        return [1] + [_hash("word", word) % VOCABULARY for word in prompt.split()]

    def _look_up(self, prompt: list[int], body: dict[str, Any]) -> int:
        """vLLM's rule: whole blocks, and never the last token."""
        salt = body.get("cache_salt")
        ends = range(self.block_size, len(prompt) + 1, self.block_size)
        found = max((end for end in ends if end < len(prompt) and (salt, *prompt[:end]) in self._cache), default=0)
        self._cache.update((salt, *prompt[:end]) for end in ends)
        self.queries += len(prompt)
        self.hits += found
        return found

    def _answer(self, incoming: Incoming, prompt: list[int]) -> Reply:
        number, body = incoming.number, incoming.body
        if self.status_after and number >= self.status_after[0]:
            return self.status_after[1], {"error": {"message": "planted"}}
        if self.invalid_json_after is not None and number >= self.invalid_json_after:
            return 200, '{"choices": ['
        chat = incoming.path == "/v1/chat/completions"
        choices = [self._choice(incoming, prompt, index, chat) for index in range(body.get("n", 1))]
        if body.get("return_token_ids") and self.token_ids:
            choices[0]["prompt_token_ids"] = prompt
        usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": incoming.cached_tokens}}
        fingerprint = self.fingerprints[number % len(self.fingerprints)]
        return 200, {"choices": choices, "usage": usage, "system_fingerprint": fingerprint}

    def _choice(self, incoming: Incoming, prompt: list[int], index: int, chat: bool) -> dict[str, Any]:
        body = incoming.body
        seed: Any = None
        if body.get("temperature", 1.0) > 0:
            seed = (None if self.ignore_seeds else body.get("seed"), 0 if self.equal_choices else index)
            if self.unstable_seeds:
                seed = (*seed, incoming.number)
        tokens, context = [], list(prompt)
        for _ in range(body.get("max_tokens", 16)):
            tokens.append(_hash(seed, context) % VOCABULARY)
            context.append(tokens[-1])
        if self._swaps(incoming):
            tokens[len(tokens) // 2] += 1
        entries = [self._entry(token, position) for position, token in enumerate(tokens)]
        beyond = self.vary_logprob_beyond
        if beyond is not None and incoming.in_flight > beyond:
            place = min(1, len(entries) - 1)
            token, logprob, top = entries[place]
            entries[place] = (token, _next_float32(logprob), {**top, token: _next_float32(logprob)})
        choice: dict[str, Any] = {"index": index, "finish_reason": "length"}
        text = "".join(f" w{token}" for token in tokens)
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("return_token_ids") and self.token_ids:
            choice["token_ids"] = tokens
        if body.get("logprobs") and self.logprobs and incoming.number < (self.logprobs_until or math.inf):
            choice["logprobs"] = _chat_logprobs(entries) if chat else _logprobs(entries)
        return choice

    def _swaps(self, incoming: Incoming) -> bool:
        beyond = self.swap_token_beyond
        return (
            (beyond is not None and incoming.in_flight > beyond)
            or (self.swap_token_on_cache_hit and incoming.cached_tokens > 0)
            or self.swap_token_of(incoming)
        )

    def _entry(self, token: int, position: int) -> tuple[str, float, dict[str, float]]:
        logprob = _float32(-1.0 - (token % 97) / 97)
        others = {f"token_id:{token + step}": _float32(logprob - step / 8) for step in range(1, 5)}
        return f"token_id:{token}", logprob, {f"token_id:{token}": logprob, **others}

    def transport(self) -> httpx.MockTransport:
        """This server behind httpx, in process."""

        async def respond(request: httpx.Request) -> httpx.Response:
            try:
                reply = await self.handle(request.method, request.url.path, dict(request.headers), request.content)
            except ConnectionResetError:
                raise httpx.ReadError("Connection reset by peer", request=request) from None
            return httpx.Response(reply[0], content=_encode(reply[1]))

        return httpx.MockTransport(respond)

    @contextmanager
    def listen(self) -> Iterator[str]:
        """This server on a socket of its own thread; yields its base URL."""
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]  # noqa: UP031
        finally:
            asyncio.run_coroutine_threadsafe(_shut(server), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                status, payload = await self.handle(method, path, headers, content)
                answer = _encode(payload)
                writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def _shut(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _encode(payload: dict[str, Any] | str) -> bytes:
    return payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def _float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _next_float32(x: float) -> float:
    """The neighbour of ``x`` by one last bit of a 32-bit float."""
    (bits,) = struct.unpack("I", struct.pack("f", x))
    return float(struct.unpack("f", struct.pack("I", bits ^ 1))[0])


def _logprobs(entries: list[tuple[str, float, dict[str, float]]]) -> dict[str, Any]:
    return {
        "tokens": [token for token, _, _ in entries],
        "token_logprobs": [logprob for _, logprob, _ in entries],
        "top_logprobs": [top for _, _, top in entries],
    }


def _chat_logprobs(entries: list[tuple[str, float, dict[str, float]]]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": token,
                "logprob": logprob,
                "top_logprobs": [{"token": name, "logprob": value} for name, value in top.items()],
            }
            for token, logprob, top in entries
        ]
    }
