"""Verify by the clock, with a small budget and within the share of the targets' capacity."""

import asyncio
import contextlib
import logging
import sqlite3
from datetime import UTC, datetime, timedelta

from vllm_deterministic.service.limits import scheduled_request
from vllm_deterministic.service.probe import Probe
from vllm_deterministic.service.runs import QueueFull, Runs

_log = logging.getLogger(__name__)


class Schedule:
    """A verification of all targets as soon as they answer, then one every interval."""

    def __init__(self, runs: Runs, probe: Probe) -> None:
        self._runs = runs
        self._probe = probe
        self.next_at: datetime | None = None

    async def run(self, every: timedelta) -> None:
        """Submit verifications until cancelled. One is left out while the last of them has not ended."""
        request = scheduled_request(self._runs.settings)
        with contextlib.suppress(TimeoutError):  # a target that stays away is a finding, too
            await asyncio.wait_for(self._probe.wait_until_ready(), every.total_seconds())
        last: str | None = None
        due = datetime.now(UTC)
        while True:
            if last is None or self._runs.live(last) is None:
                try:
                    last = (await self._runs.submit(request, "schedule")).id
                except (QueueFull, sqlite3.Error) as error:
                    _log.warning("a scheduled verification is left out: %s", error)
            due = max(due + every, datetime.now(UTC))
            self.next_at = due
            await asyncio.sleep((due - datetime.now(UTC)).total_seconds())
