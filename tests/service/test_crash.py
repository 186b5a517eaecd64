"""Ends of all kinds in the middle of a run, and many clients; benchmarks/bench_service.py does both at length."""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx

from vllm_deterministic.service.history import CRASHED

from ..verify.fake_server import FakeServer
from .conftest import SMALL, TOKEN, Process

Start = Callable[..., Process]


def test_a_kill_in_the_middle_of_a_run_loses_no_finished_one(start: Start) -> None:
    finished, running = [], []
    server = FakeServer(latency_s=0.01)
    with server.listen() as url:
        for _ in range(2):
            service = start("--target", url)
            finished.append(service.start())
            service.wait(lambda service=service: service.status(finished[-1]) == "identical")
            running.append(service.start(num_prompts=2000))
            service.wait(lambda service=service: service.status(running[-1]) == "running")
            service.wait(lambda: server.in_flight > 0)
            (worker,) = service.workers()
            service.process.kill()
            service.process.wait()
            service.wait(lambda worker=worker: _is_dead(worker))  # no load without the service
            with closing(sqlite3.connect(service.database)) as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        service = start("--target", url)
        assert [service.status(id) for id in finished] == ["identical"] * 2
        assert all(service.client.get(f"/v1/verifications/{id}/report").is_success for id in finished)
        for id in running:
            found = service.client.get(f"/v1/verifications/{id}").json()
            assert (found["status"], found["message"]) == ("interrupted", CRASHED)


def _is_dead(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_sigterm_ends_with_0_and_keeps_what_was_found(start: Start) -> None:
    server = FakeServer(hang_after=9)
    with server.listen() as url:
        service = start("--target", url)
        id, waiting = service.start(), service.start()
        service.wait(lambda: len(server.seen) >= 12)
        with service.client.stream("GET", f"/v1/verifications/{id}/events") as stream:
            next(stream.iter_lines())
            began = time.monotonic()
            assert service.end() == 0
            assert time.monotonic() - began < 4
        service = start("--target", url)
        found = service.client.get(f"/v1/verifications/{id}").json()
        assert found["status"] == "interrupted"
        assert found["message"].startswith("The service was stopped. Stopped before the end. So far 8 of 20")
        assert service.status(waiting) == "interrupted"


def test_two_hundred_clients_are_answered_or_told_to_wait(start: Start) -> None:
    with FakeServer().listen() as url:
        service = start("--target", url)
        known = [service.start()]
        statuses = asyncio.run(_crowd(service.url, known))
    assert statuses.keys() <= {"GET 200", "GET 401", "POST 202", "POST 429"}
    assert statuses["POST 429"] > 0
    assert statuses["GET 401"] > 0
    assert service.process.poll() is None


async def _crowd(url: str, known: list[str]) -> Counter[str]:
    """Statuses of clients that each poll and post for some seconds; how fast, the benchmark tells."""
    statuses: Counter[str] = Counter()

    async def one(number: int, client: httpx.AsyncClient) -> None:
        await asyncio.sleep(number / 200)
        token = "wrong" if number % 20 == 0 else TOKEN
        for method in ("GET", "POST", "GET") if number % 5 == 1 else ("GET", "GET"):
            path = "/v1/verifications" if method == "POST" else f"/v1/verifications/{known[0]}"
            headers = {"Authorization": f"Bearer {token}"}
            answer = await client.request(method, path, json=SMALL if method == "POST" else None, headers=headers)
            statuses[f"{method} {answer.status_code}"] += 1
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        await asyncio.gather(*(one(number, client) for number in range(200)))
    return statuses
