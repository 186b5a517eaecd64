"""Targets that fail in every way end as a run with a clear cause; so does a worker that dies."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vllm_deterministic.service.process import run_worker
from vllm_deterministic.service.worker import Job

from ..verify.fake_server import FakeServer
from .conftest import Serve, listening


@pytest.mark.parametrize(
    ("server", "asked", "said"),
    [
        (FakeServer(answers_before_death=9), {}, "broke the connection before it answered"),
        (FakeServer(hang_after=9), {"timeout": 0.5}, "did not answer within 0.5 s"),
        (FakeServer(invalid_json_after=9), {}, "invalid JSON"),
        (FakeServer(status_after=(9, 500)), {}, "answered 500: planted"),
        (FakeServer(status_after=(9, 429)), {}, "answered 429: planted"),
        (FakeServer(key="needed"), {}, "answered 401: Incorrect API key"),
        (FakeServer(logprobs=False), {}, "returned no logprobs"),
    ],
)
async def test_a_failing_target_is_a_run_that_says_why(
    serve: Serve, server: FakeServer, asked: dict[str, Any], said: str
) -> None:
    async with listening(server) as url, serve(url) as service:
        found = await service.verify(**asked)
    assert found["status"] == "error"
    assert said in found["message"]


async def raw(answer: bytes) -> tuple[str, Callable[[], Awaitable[None]]]:
    """A server that gives every request the same bytes, and what shuts it."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)

    async def shut() -> None:
        server.close()

    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", shut


@pytest.mark.parametrize(
    "answer",
    [
        b"\x00\xff garbage \x00",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<p>hello</p>   ",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{"data": 42} ',
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"",
    ],
    ids=["garbage", "html", "cut off", "other json", "no content", "nothing"],
)
async def test_a_target_that_is_no_model_server_is_a_run_that_says_so(serve: Serve, answer: bytes) -> None:
    url, shut = await raw(answer)
    async with serve(url) as service:
        found = await service.verify()
        targets = (await service.client.get("/v1/targets")).json()
    await shut()
    assert found["status"] == "error"
    assert url in found["message"]
    assert not targets["items"][0]["ready"]
    assert url in targets["items"][0]["detail"] or "serves no model" in targets["items"][0]["detail"]


async def test_a_worker_that_is_killed_is_a_run_that_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def noted(*words: Any, **given: Any) -> asyncio.subprocess.Process:
        started.append(await spawn(*words, **given))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    server = FakeServer(hang_after=3)
    async with listening(server) as url, serve(url) as service:
        id = await service.start()
        while len(server.seen) < 4:
            await asyncio.sleep(0.05)
        os.kill(started[0].pid, signal.SIGKILL)
        found = await service.until(id)
        assert found["status"] == "error"
        assert "ended with status -9" in found["message"]
        server.hang_after = None
        assert (await service.verify())["status"] == "identical"


async def test_a_worker_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_deterministic.service.process._GRACE_S", 0.2)
    stop = asyncio.Event()
    stop.set()  # before the worker listens to signals or reads its job, so that it is deaf to both
    monkeypatch.setattr(asyncio.subprocess.Process, "terminate", lambda process: None)
    with pytest.raises(Exception, match=r"did not end within 0\.2 s"):
        await run_worker(Job(settings={}, api_keys={}, keep_prompts=False), print, stop)
