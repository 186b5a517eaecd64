"""A service in process, and one as a user starts it."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from vllm_deterministic.service.app import make_app
from vllm_deterministic.service.settings import ServiceSettings
from vllm_deterministic.service.state import State

from ..verify.fake_server import FakeServer

COMMAND = Path(sys.executable).with_name("vllm-deterministic")
TOKEN = "a-token-of-enough-letters"
SMALL = {"arms": ["identical"], "num_prompts": 20, "max_concurrency": 8}


class Running:
    """A service in process, with a client that knows its token."""

    def __init__(self, state: State, client: httpx.AsyncClient) -> None:
        self.state = state
        self.client = client

    async def start(self, **asked: Any) -> str:
        """Start a verification; its id."""
        answer = await self.client.post("/v1/verifications", json=SMALL | asked)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def get(self, id: str) -> dict[str, Any]:
        answer = await self.client.get(f"/v1/verifications/{id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def until(self, id: str, *statuses: str) -> dict[str, Any]:
        """The verification once it has one of the statuses, or has ended."""
        deadline = time.monotonic() + 30
        while (found := await self.get(id))["status"] not in statuses and not found["finished_at"]:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)
        return found

    async def verify(self, **asked: Any) -> dict[str, Any]:
        """A verification that has ended."""
        return await self.until(await self.start(**asked))


Serve = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Open a service on targets (NAME=URL or URL), with further settings."""
    _clear_environment(monkeypatch)

    @asynccontextmanager
    async def opened(*targets: str, **given: Any) -> AsyncIterator[Running]:
        given = {"token": TOKEN, "database": tmp_path / "runs.db"} | given
        state = await State.open(ServiceSettings.load({"target": list(targets), **given}))
        transport = httpx.ASGITransport(make_app(state), raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            state.running(),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client,
        ):
            yield Running(state, client)

    return opened


@asynccontextmanager
async def listening(server: FakeServer) -> AsyncIterator[str]:
    """The fake server on a socket; its loop cannot be started beside the one that runs in this thread."""
    manager = server.listen()
    url = await asyncio.to_thread(manager.__enter__)
    try:
        yield url
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


class Process:
    """`vllm-deterministic service`, listening."""

    def __init__(self, database: Path, *words: str) -> None:
        self.database = database
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_DETERMINISTIC")}
        self.log = database.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [COMMAND, "service", "--port", "0", "--database", database, *words],
                stderr=log,
                env=environment | {"VLLM_DETERMINISTIC_TOKEN": TOKEN},
            )
        deadline = time.monotonic() + 30
        while not (listening := re.search(r"listening on (\S+)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.url = listening[1]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)
        self.wait(lambda: self.client.get("/health").is_success)

    def wait(self, met: Callable[[], bool]) -> None:
        """Wait until the condition is met; what refuses a connection is asked again."""
        deadline = time.monotonic() + 30
        while True:
            try:
                if met():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def start(self, **asked: Any) -> str:
        answer = self.client.post("/v1/verifications", json=SMALL | asked)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def status(self, id: str) -> str:
        return str(self.client.get(f"/v1/verifications/{id}").json()["status"])

    def workers(self) -> list[int]:
        """Processes of verifications that run."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def end(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start the command with further options; the database is the same each time."""
    started: list[Process] = []

    def one(*words: str) -> Process:
        started.append(Process(tmp_path / "runs.db", *words))
        return started[-1]

    yield one
    for process in started:
        process.__exit__()


def _clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("VLLM_DETERMINISTIC"):
            monkeypatch.delenv(name)
