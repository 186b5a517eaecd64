"""Who may ask, and how much."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vllm_deterministic.service import security

from ..verify.fake_server import FakeServer
from .conftest import TOKEN, Process, Serve

TARGET = "one=http://127.0.0.1:9"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer ä"]
)
async def test_without_the_token_nothing_is_told(serve: Serve, header: str | None) -> None:
    headers = {"Authorization": header.encode()} if header is not None else {}
    async with serve(TARGET) as service:
        del service.client.headers["Authorization"]
        for path in ("/version", "/v1/targets", "/v1/verifications", "/openapi.json", "/nowhere"):
            answer = await service.client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"


async def test_the_token_comes_before_the_body(serve: Serve) -> None:
    async with serve(TARGET) as service:
        del service.client.headers["Authorization"]
        assert (await service.client.post("/v1/verifications", content=b"{")).status_code == 401


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/health", "/ready", "/metrics"])
async def test_what_probes_and_browsers_need_is_open_and_names_no_url(serve: Serve, path: str) -> None:
    async with serve(TARGET) as service:
        del service.client.headers["Authorization"]
        answer = await service.client.get(path)
        assert answer.status_code in (200, 204, 503)
        assert "127.0.0.1:9" not in answer.text


async def test_the_scheme_of_the_token_may_have_any_case(serve: Serve) -> None:
    async with serve(TARGET) as service:
        assert (await service.client.get("/version", headers={"Authorization": f"bearer {TOKEN}"})).status_code == 200


async def test_a_service_without_a_token_answers_under_loopback_names_alone(serve: Serve) -> None:
    async with serve(TARGET, token=None) as service:
        for host, status in (("localhost:8090", 200), ("[::1]", 200), ("evil.example", 400), ("127.0.0.1.evil", 400)):
            answer = await service.client.get("/version", headers={"Host": host})
            assert answer.status_code == status, host


@pytest.mark.parametrize("stated", [True, False])
async def test_a_large_body_is_refused_unread(serve: Serve, stated: bool) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 1024

    content: Any = b" " * 1024 * 1000 if stated else chunks()
    async with serve(TARGET) as service:
        answer = await service.client.post(
            "/v1/verifications", content=content, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 413
    assert "--max-body-bytes" in answer.json()["detail"]
    assert sent < 100


async def test_a_body_that_never_ends_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_BODY_TIMEOUT_S", 0.05)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async with serve(TARGET) as service:
        assert (await service.client.post("/v1/verifications", content=chunks())).status_code == 408


def test_keys_reach_neither_the_workers_command_line_nor_its_environment(start: Any) -> None:
    key = "the-key-of-the-target"
    with FakeServer(key=key, hang_after=1).listen() as url:
        service: Process = start("--target", url, "--api-key", key)
        service.start()
        service.wait(lambda: bool(service.workers()))
        (worker,) = service.workers()
        service.wait(lambda: b"worker" in _read(worker, "cmdline"))
        told = _read(worker, "cmdline") + _read(worker, "environ")
        assert key.encode() not in told
        assert TOKEN.encode() not in told


def _read(process: int, file: str) -> bytes:
    with open(f"/proc/{process}/{file}", "rb") as content:
        return content.read()
