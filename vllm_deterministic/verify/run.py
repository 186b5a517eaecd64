"""Verify a server: send every arm, judge what came back, and return one record of it, whatever happens on the way."""

import asyncio
import platform
import time
import uuid
from datetime import UTC, datetime
from types import ModuleType

import httpx

from vllm_deterministic import __version__
from vllm_deterministic.verify import identical, mixed, prefix, sampled
from vllm_deterministic.verify.client import CannotRun, Client
from vllm_deterministic.verify.journal import ArmJournal, Journal
from vllm_deterministic.verify.judge import judge
from vllm_deterministic.verify.progress import Progress, SilentProgress
from vllm_deterministic.verify.record import ArmRecord, ClientRecord, RunRecord, ServerRecord, Status
from vllm_deterministic.verify.sender import Sender
from vllm_deterministic.verify.server import Server, discover
from vllm_deterministic.verify.settings import ArmName, Settings

ARM_MODULES: dict[ArmName, ModuleType] = {"identical": identical, "mixed": mixed, "prefix": prefix, "sampled": sampled}

_NO_HITS = (
    "prefix: the server found nothing in its prefix cache, so cold and warm were the same; is its cache turned off?"
)


async def verify(
    settings: Settings,
    progress: Progress | None = None,
    *,
    stop: asyncio.Event | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> RunRecord:
    """Run the arms against the server and return the record.

    A server that fails is no exception: the record then says so and holds the results so far. Setting ``stop`` ends
    the run early in the same way. ``transport`` replaces the network, for tests.
    """
    run = _Run(settings, progress or SilentProgress(), transport)
    work = asyncio.create_task(run.work())
    stopped = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        interrupted = not work.done()
        work.cancel()
        stopped.cancel()
        results = await asyncio.gather(work, stopped, return_exceptions=True)
        run.progress.finish()
    error = results[0] if isinstance(results[0], Exception) else None
    if error is not None and not isinstance(error, CannotRun):
        raise error
    return run.record(error, interrupted=interrupted)


class _Run:
    def __init__(self, settings: Settings, progress: Progress, transport: httpx.AsyncBaseTransport | None) -> None:
        self.progress = progress
        self._settings = settings
        self._transport = transport
        self._run_id = uuid.uuid4().hex
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()
        self._server: Server | None = None
        self._journal = Journal()

    async def work(self) -> None:
        async with Client(self._settings, self._transport) as client:
            self._server = server = await discover(client, self._settings)
            sender = Sender(client, server, self._settings, self._run_id, self._started)
            for name in self._settings.arms:
                module = ARM_MODULES[name]
                total = module.count(self._settings, server.site)
                now = time.monotonic() - self._started
                arm = ArmJournal(name, total, now, now)
                self._journal.arms.append(arm)
                self.progress.start(name, total)
                await sender.run_arm(module.waves(self._settings, server.site), arm, self.progress)
                self.progress.finish()

    def record(self, error: CannotRun | None, *, interrupted: bool) -> RunRecord:
        arms = judge(self._journal)
        status: Status = "identical"
        if interrupted:
            status, message = "interrupted", f"Stopped before the end. {_so_far(arms)}"
        elif error is not None:
            status, message = "error", f"{error} {_so_far(arms)}"
        elif any(arm.failures for arm in arms):
            status, message = "diverged", f"{_failed(arms)}."
        else:
            compared = sum(arm.compared for arm in arms)
            message = f"Each of {compared} answers had the bytes of every other answer to the same request."
        return RunRecord(
            run_id=self._run_id,
            status=status,
            message=message,
            started_at=self._started_at,
            duration_s=time.monotonic() - self._started,
            command=self._settings.command_line(),
            settings=self._settings.model_dump(mode="json", exclude={"metadata"}),
            metadata=self._settings.metadata,
            server=self._server_record(),
            client=ClientRecord(version=__version__, python=platform.python_version(), platform=platform.platform()),
            notes=self._notes(arms),
            arms=arms,
        )

    def _server_record(self) -> ServerRecord:
        server = self._server
        return ServerRecord(
            base_url=self._settings.base_url,
            endpoint=self._settings.endpoint,
            model=server.model if server else self._settings.model,
            version=server.version if server else None,
            max_model_len=server.max_model_len if server else None,
            block_size=server.block_size if server else None,
            system_fingerprints=self._fingerprints(),
            vllm_request_fields=server.extensions if server else None,
            tells_token_ids=server.tells_token_ids if server else None,
        )

    def _fingerprints(self) -> list[str]:
        told = {e.completion.system_fingerprint for arm in self._journal.arms for e in arm.exchanges}
        return sorted(fingerprint for fingerprint in told if fingerprint is not None)

    def _notes(self, arms: list[ArmRecord]) -> list[str]:
        if self._server is None:
            return []
        notes = list(self._server.notes)
        if "prefix" in self._settings.arms:
            notes += prefix.untested(self._settings, self._server.site)
            notes += [_NO_HITS for arm in arms if arm.name == "prefix" and _found_nothing_cached(arm)]
        fingerprints = self._fingerprints()
        if len(fingerprints) > 1:
            notes.append(
                f"Answers carry {len(fingerprints)} system fingerprints, so different set-ups gave them: "
                "equal bytes are promised within one fingerprint only."
            )
        refused = sum(arm.refused for arm in arms)
        if refused:
            notes.append(f"The server refused {refused} neighbours (400 or 422); they ran beside nothing.")
        return notes


def _found_nothing_cached(arm: ArmRecord) -> bool:
    hits = [phase.prefix_cache_hits for phase in arm.phases if phase.prefix_cache_hits is not None]
    return bool(hits) and arm.answered == arm.planned and not any(hits)


def _so_far(arms: list[ArmRecord]) -> str:
    answered, planned = sum(arm.answered for arm in arms), sum(arm.planned for arm in arms)
    if not answered:
        return "Nothing was compared."
    return f"So far {answered} of {planned} requests were answered; {_failed(arms)}."


def _failed(arms: list[ArmRecord]) -> str:
    failed = [arm.name for arm in arms if arm.failures]
    if not failed:
        return "no answer differed"
    return f"{len(failed)} of {len(arms)} arms failed: {', '.join(failed)}"
