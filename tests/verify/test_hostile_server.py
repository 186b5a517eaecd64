"""Servers that break HTTP or JSON, on real sockets: a run with a clear cause, in bounded time and memory."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from .fake_server import FakeServer

Misbehave = Callable[[asyncio.StreamWriter], Awaitable[None]]


class _Hostile:
    """Serve like a `FakeServer` until so many completions were answered, then misbehave."""

    def __init__(self, misbehave: Misbehave, after: int) -> None:
        self._honest = FakeServer(latency_s=0.0)
        self._misbehave = misbehave
        self._after = after
        self.open_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                if len(self._honest.seen) >= self._after and method == "POST":
                    await self._misbehave(writer)
                    return
                status, payload = await self._honest.handle(method, path, headers, content)
                text = payload if isinstance(payload, str) else json.dumps(payload)
                await _send(writer, text.encode(), status=status)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()


async def _send(writer: asyncio.StreamWriter, body: bytes, *, status: int = 200, headers: str = "") -> None:
    writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)
    await writer.drain()


@asynccontextmanager
async def _listening(hostile: _Hostile) -> AsyncIterator[str]:
    server = await asyncio.start_server(hostile.serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _run(hostile: _Hostile, **given: Any) -> RunRecord:
    async with _listening(hostile) as url:
        small: dict[str, Any] = {"num_prompts": 40, "max_concurrency": 4, "arms": ["identical"], "timeout": 20.0}
        record = await asyncio.wait_for(verify(Settings.model_validate({"base_url": url, **small, **given})), 60)
        for _ in range(100):  # the last bytes of a connection take a moment
            if not hostile.open_connections:
                break
            await asyncio.sleep(0.02)
        assert hostile.open_connections == 0
        return record


async def _die_at_once(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def _die_after_half_the_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"choices": [')
    await writer.drain()


async def _die_after_half_the_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    await writer.drain()


async def _speak_no_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\x00\xff\xfe")
    await writer.drain()


async def _never_answer(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(1.5)  # three times the time-out


async def _drip(writer: asyncio.StreamWriter) -> None:
    """Alive by any time-out between two bytes, and never done."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(200):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def _flood(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(10_000):
        writer.write(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        await writer.drain()


def _sends(body: bytes, headers: str = "") -> Misbehave:
    async def send(writer: asyncio.StreamWriter) -> None:
        await _send(writer, body, headers=headers)

    return send


_HTML = "Content-Type: text/html; charset=utf-8\r\n"
_GZIP = "Content-Encoding: gzip\r\n"
_CASES = {
    "dies": (_die_at_once, "broke the connection before it answered in full"),
    "half a body": (_die_after_half_the_body, "broke the connection before it answered in full"),
    "half the headers": (_die_after_half_the_headers, "broke the connection before it answered in full"),
    "no HTTP": (_speak_no_http, "broke the connection before it answered in full"),
    "hangs": (_never_answer, "did not answer within 0.5 s. Raise --timeout"),
    "slow for ever": (_drip, "did not answer within 0.5 s. Raise --timeout"),
    "floods": (_flood, "answered with more than 8 MiB, far more than was asked for"),
    "a bomb": (_sends(gzip.compress(bytes(2**26)), _GZIP), "answered with more than 8 MiB"),
    "no gzip": (_sends(b"{}", _GZIP), "answered with a body that its Content-Encoding does not fit"),
    "half a JSON": (_sends(b'{"choices": [{"text": "a'), "answered with invalid JSON (Unterminated string"),
    "HTML": (_sends(b"<html>Welcome</html>", _HTML), ", sent as 'text/html'. Check that --base-url names"),
    "a stream": (
        _sends(b'data: {"choices": []}\n\n', "Content-Type: text/event-stream\r\n"),
        ", sent as 'text/event-stream'.",
    ),
    "nothing": (_sends(b""), "answered with invalid JSON (Expecting value"),
    "binary": (_sends(bytes(range(256))), "answered with invalid JSON ("),
    "deep": (_sends(b"[" * 100_000), "answered with invalid JSON (it is nested too deeply)"),
    "half a character": (
        _sends(b'{"choices": [{"text": "\\ud83d", "finish_reason": "stop"}]}'),
        "answered with invalid JSON (it holds half of a surrogate pair)",
    ),
    "NaN": (_sends(b'{"choices": [{"text": "a", "x": NaN}]}'), "answered with invalid JSON (NaN is not a JSON number)"),
    "infinite": (
        _sends(b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [1e999]}}]}'),
        "answered with no OpenAI completion (choices.0.logprobs.token_logprobs.0: Input should be a finite number)",
    ),
    "wrong types": (_sends(b'{"choices": [{"text": 7}]}'), "no OpenAI completion (choices.0.text: "),
    "a list": (_sends(b"[1]"), "no OpenAI completion (the answer: "),
    "no choice": (_sends(b'{"choices": []}'), "no OpenAI completion (choices: "),
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("after", [0, 20])
async def test_a_hostile_server_ends_the_run_with_its_cause(case: str, after: int) -> None:
    misbehave, message = _CASES[case]
    timeout = 0.5 if "0.5 s" in message else 20.0
    record = await _run(_Hostile(misbehave, after), timeout=timeout)
    assert (record.status, record.exit_code) == ("error", 2)
    assert message in record.message
    assert "/v1/completions" in record.message
    assert "\n" not in record.message
    if after:
        assert record.arm("identical").status == "incomplete"
        assert record.arm("identical").compared >= 10
    else:
        assert record.arms == []


@pytest.mark.parametrize(
    "metrics",
    [
        "vllm:prefix_cache_queries_total NaN\nvllm:prefix_cache_hits_total +Inf\n",
        "vllm:prefix_cache_queries_total 1e400\nvllm:num_preemptions_total x\n",
        'vllm:cache_config_info{block_size="²"} 1.0\nvllm:cache_config_info{block_size="-4',
        "\0" * 1000,
        "a" * 9_000_000,
    ],
)
@pytest.mark.parametrize("limit", [-1, 0, 1, True, None, 1e999, "many", 10**30])
async def test_garbage_beside_the_answers_ends_no_run(
    metrics: str, limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(max_model_len=limit, latency_s=0.0)
    monkeypatch.setattr(server, "_metrics_page", lambda: metrics)
    settings = Settings(
        base_url="http://fake", num_prompts=4, mixed_prompts=4, sampled_prompts=4, kv_split=32, chunk_budget=32
    )
    record = await verify(settings, transport=server.transport())
    assert record.status in ("identical", "error")
    assert "\n" not in record.message
