"""Verifications by the clock, within the share of the targets' capacity."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ..verify.fake_server import FakeServer
from .conftest import Running, Serve, listening


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not met():
            await asyncio.sleep(0.05)


async def finished(service: Running) -> list[dict[str, Any]]:
    page = (await service.client.get("/v1/verifications")).json()
    return [one for one in page["items"] if one["finished_at"]]


async def test_it_verifies_again_and_again_and_never_beyond_its_share(serve: Serve) -> None:
    server = FakeServer(latency_s=0.02)
    async with listening(server) as url, serve(url, every="1s", share=0.1, capacity=40) as service:
        async with asyncio.timeout(30):
            while len(done := await finished(service)) < 2:
                await asyncio.sleep(0.1)
        assert {(one["status"], one["trigger"]) for one in done} == {("identical", "schedule")}
        assert server.most_in_flight == 4
        told = (await service.client.get("/v1/targets")).json()
        assert (told["every_s"], told["scheduled_concurrency"]) == (1, 4)
        assert told["next_scheduled_at"] > done[0]["created_at"]


async def test_it_waits_for_a_target_that_is_starting(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_deterministic.service.probe._INTERVAL_S", 0.2)
    server = FakeServer(starting_for=1)
    async with listening(server) as url, serve(url, every="1h", share=0.02) as service:
        await until(lambda: service.state.probe.ready)
        async with asyncio.timeout(30):
            while not (done := await finished(service)):
                await asyncio.sleep(0.1)
        assert done[0]["status"] == "identical"


async def test_a_verification_is_left_out_while_the_last_one_runs(serve: Serve) -> None:
    server = FakeServer(hang_after=3)
    async with listening(server) as url, serve(url, every="1s") as service:
        await until(lambda: service.state.schedule.next_at is not None)
        first = service.state.schedule.next_at
        assert first is not None
        await until(lambda: (service.state.schedule.next_at or first) - first >= timedelta(seconds=2))
        assert len((await service.client.get("/v1/verifications")).json()["items"]) == 1
