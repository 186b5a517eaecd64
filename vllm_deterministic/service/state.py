"""All that a running service holds, brought up and down in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from vllm_deterministic.service.history import History
from vllm_deterministic.service.limits import BeyondLimits, check_limits, scheduled_request
from vllm_deterministic.service.metrics import Metrics
from vllm_deterministic.service.probe import Probe
from vllm_deterministic.service.runs import Runs
from vllm_deterministic.service.schedule import Schedule
from vllm_deterministic.service.settings import ServiceSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """The parts that routes talk to."""

    settings: ServiceSettings
    history: History
    metrics: Metrics
    runs: Runs
    probe: Probe
    schedule: Schedule

    @classmethod
    async def open(cls, settings: ServiceSettings) -> "State":
        """Open the database and make the parts. Raises ValueError, in one line, where the database cannot serve or
        the schedule would go beyond the service's own limits.
        """
        if settings.every is not None:
            try:
                check_limits(scheduled_request(settings), settings)
            except BeyondLimits as error:
                raise ValueError(f"--every: {error}") from None
        metrics = Metrics([target.name for target in settings.target])
        history = await History.open(settings.database, settings.keep_runs, settings.keep_days)
        metrics.restore(await history.finished())
        runs, probe = Runs(settings, history, metrics), Probe(settings, metrics)
        return cls(settings, history, metrics, runs, probe, Schedule(runs, probe))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Probe, and verify by the clock, until left; then end what runs and close the database."""
        tasks = [asyncio.create_task(_told(self.probe.run))]
        if self.settings.every is not None:
            tasks.append(asyncio.create_task(_told(partial(self.schedule.run, self.settings.every))))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.runs.close()
            await self.history.close()


async def _told(work: Callable[[], Awaitable[None]]) -> None:
    """Nobody awaits the task of a loop while it runs, so its failure would go unseen."""
    try:
        await work()
    except Exception:
        _log.exception("a loop of the service ended")
