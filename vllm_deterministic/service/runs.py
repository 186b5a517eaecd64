"""The verifications that wait or run: a bounded queue, one verification at a time on each target."""

import asyncio
import logging
import math
import sqlite3
import uuid
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from vllm_deterministic.service.history import History
from vllm_deterministic.service.limits import check_limits, choose_targets, plan
from vllm_deterministic.service.metrics import Metrics
from vllm_deterministic.service.process import Finished, WorkerDied, run_worker
from vllm_deterministic.service.schema import ArmProgress, Status, Trigger, Verification, VerificationRequest
from vllm_deterministic.service.settings import ServiceSettings, Target
from vllm_deterministic.service.worker import Job, Report

_log = logging.getLogger(__name__)
_TYPICAL_S = 30.0  # until the first verification has ended


class QueueFull(Exception):  # noqa: N818 - a state, not a fault
    """As many verifications wait as may. ``retry_after`` are seconds until one is likely to have ended."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("as many verifications wait as may (--max-queue)")
        self.retry_after = retry_after


class _Live:
    """A verification that waits or runs."""

    def __init__(self, verification: Verification, targets: list[Target]) -> None:
        self.verification = verification
        self.targets = targets
        self.stop = asyncio.Event()
        self.stopped_as: Status | None = None
        self.reason = ""
        self._changed = asyncio.Event()

    def change(self, **fields: Any) -> None:
        """Change the verification and wake all watchers."""
        self.verification = self.verification.model_copy(update=fields)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def progress(self, progress: ArmProgress) -> None:
        """Take up what the worker told."""
        others = [told for told in self.verification.progress if told.target != progress.target]
        self.change(progress=sorted([*others, progress], key=lambda told: told.target))

    def end(self, status: Status, reason: str) -> None:
        """Ask the run to end, and say why."""
        if self.stopped_as is None:
            self.stopped_as, self.reason = status, reason
        self.stop.set()

    async def wait(self) -> None:
        """Until something changes, or a second has passed."""
        await asyncio.wait([waiting := asyncio.create_task(self._changed.wait())], timeout=1.0)
        waiting.cancel()


class Runs:
    """Takes verifications, runs them in their turn, and hands them to the history."""

    def __init__(self, settings: ServiceSettings, history: History, metrics: Metrics) -> None:
        self.settings = settings
        self.closing = False
        self._history = history
        self._metrics = metrics
        self._queued: list[_Live] = []
        self._running: dict[_Live, asyncio.Task[None]] = {}
        self._durations: deque[float] = deque(maxlen=20)

    async def submit(self, request: VerificationRequest, trigger: Trigger) -> Verification:
        """Queue a verification. Raises BeyondLimits, QueueFull, or sqlite3.Error where it cannot be kept."""
        targets = choose_targets(request, self.settings)
        check_limits(request, self.settings)
        if len(self._queued) >= self.settings.max_queue or self.closing:
            self._metrics.refused.inc()
            raise QueueFull(self._retry_after())
        verification = Verification(
            id=uuid.uuid4().hex,
            status="queued",
            message="Waits for its turn.",
            trigger=trigger,
            request=request,
            targets=[target.name for target in targets],
            created_at=datetime.now(UTC),
        )
        live = _Live(verification, targets)
        self._queued.append(live)  # before anything is awaited, or more than may would get in at once
        try:
            await self._history.add(verification)
        except sqlite3.Error:
            live.end("error", "It could not be kept.")
            if live in self._queued:  # or else it has begun already
                self._queued.remove(live)
            raise
        self._start_what_can()
        return live.verification

    def live(self, id: str) -> Verification | None:
        """A verification that waits or runs, None where there is none of this id."""
        live = self._find(id)
        return live.verification if live else None

    def cancel(self, id: str) -> Verification | None:
        """Ask a verification to end early; None where none of this id waits or runs."""
        live = self._find(id)
        if live is None:
            return None
        live.end("cancelled", "Cancelled.")
        self._start_what_can()
        return live.verification

    async def watch(self, id: str) -> AsyncIterator[Verification]:
        """The verification now, after every change, and at its end. Ends early when the service does."""
        live = self._find(id)
        while live is not None:
            told = live.verification
            yield told
            if told.finished or self.closing:
                return
            while live.verification is told and not self.closing:
                await live.wait()

    async def close(self) -> None:
        """End everything that waits or runs, and keep what there is of it."""
        self.closing = True
        for live in [*self._queued, *self._running]:
            live.end("interrupted", "The service was stopped.")
        self._start_what_can()
        await asyncio.gather(*self._running.values())

    def _find(self, id: str) -> _Live | None:
        return next((live for live in [*self._running, *self._queued] if live.verification.id == id), None)

    def _retry_after(self) -> int:
        typical = sum(self._durations) / len(self._durations) if self._durations else _TYPICAL_S
        return max(1, min(math.ceil(typical), 3600))

    def _start_what_can(self) -> None:
        """Start every queued verification whose targets are free and not awaited by an earlier one."""
        taken = {target.name for live in self._running for target in live.targets}
        for live in list(self._queued):
            names = {target.name for target in live.targets}
            if live.stopped_as is not None or not names & taken:
                self._queued.remove(live)
                self._running[live] = asyncio.create_task(self._run(live))
            if live.stopped_as is None:
                taken |= names
        self._metrics.queued.set(len(self._queued))
        self._metrics.running.set(len(self._running))

    async def _run(self, live: _Live) -> None:
        end: dict[str, Any] = {}
        records: dict[str, bytes] = {}
        latencies: dict[str, dict[str, list[float]]] = {}
        try:
            if live.stopped_as is None:
                live.change(status="running", message="Runs.", started_at=datetime.now(UTC))
                await self._history.update(live.verification)
                finished = await self._work(live)
                records, latencies = finished.records, finished.report.latencies
                end = _verdict(live, finished.report)
        except WorkerDied as error:
            _log.error("verification %s: %s", live.verification.id, error)
            end = {"status": "error", "message": str(error)}
        except sqlite3.Error as error:
            end = {"status": "error", "message": f"The history cannot be written: {error}."}
        except Exception:
            _log.exception("verification %s", live.verification.id)
            end = {"status": "error", "message": "The service failed; its log says how."}
        if live.stopped_as is not None and "results" not in end:
            end = {"status": live.stopped_as, "message": live.reason}
        await self._finish(live, end, records, latencies)

    async def _work(self, live: _Live) -> Finished:
        request = live.verification.request
        settings = {target.name: plan(request, target, self.settings) for target in live.targets}
        keys = {name: one.api_key.get_secret_value() for name, one in settings.items() if one.api_key}
        job = Job(settings=settings, api_keys=keys, keep_prompts=request.keep_prompts)
        longest = self.settings.max_duration.total_seconds()
        reason = f"Stopped after {longest:g} s (--max-duration)."
        timer = asyncio.get_running_loop().call_later(longest, live.end, "interrupted", reason)
        try:
            return await run_worker(job, live.progress, live.stop)
        finally:
            timer.cancel()

    async def _finish(
        self,
        live: _Live,
        end: dict[str, Any],
        records: dict[str, bytes],
        latencies: dict[str, dict[str, list[float]]],
    ) -> None:
        final = live.verification.model_copy(update={**end, "progress": [], "finished_at": datetime.now(UTC)})
        _log.info("verification %s of %s: %s. %s", final.id, ", ".join(final.targets), final.status, final.message)
        if final.started_at and final.finished_at:
            self._durations.append((final.finished_at - final.started_at).total_seconds())
        self._metrics.ended(final, latencies)
        try:
            await self._history.update(final, records)
            await self._history.prune()
        except sqlite3.Error as error:
            # Its row still says that it runs; the next start will mark it.
            _log.error("verification %s could not be kept: %s", final.id, error)
        del self._running[live]
        live.change(**dict(final))
        self._start_what_can()


def _verdict(live: _Live, report: Report) -> dict[str, Any]:
    results, replicas = report.results, report.replicas
    told = {result.status for result in results}
    status: Status = "identical"
    if "diverged" in told or (replicas is not None and replicas.status == "diverged"):
        status = "diverged"
    elif "error" in told:
        status = "error"
    elif "interrupted" in told:
        status = live.stopped_as or "interrupted"
    if len(results) == 1:
        message = results[0].message
    else:
        message = " ".join(f"{result.target}: {result.message}" for result in results if result.status != "identical")
        message = f"{message} {replicas.message if replicas else ''}".strip()
    if "interrupted" in told:
        message = f"{live.reason} {message}".strip()
    return {"status": status, "message": message, "results": results, "replicas": replicas}
