"""Start the worker process, follow it, and see to it that it ends."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from vllm_deterministic.service.schema import ArmProgress
from vllm_deterministic.service.worker import Job, Report

_GRACE_S = 15.0  # for a worker that was asked to end, until it is killed
_LONGEST_LINE = 64 * 2**20
_SECRETS = ("VLLM_DETERMINISTIC_TOKEN", "VLLM_DETERMINISTIC_API_KEY", "OPENAI_API_KEY")  # the job holds what it needs


@dataclass(frozen=True)
class Finished:
    """A worker's report, and the compressed run records by target."""

    report: Report
    records: dict[str, bytes]


class WorkerDied(Exception):  # noqa: N818 - an event, told to the user in these words
    """The worker ended without a report."""


async def run_worker(job: Job, on_progress: Callable[[ArmProgress], None], stop: asyncio.Event) -> Finished:
    """Run a job in a process of its own. Setting ``stop`` ends it early, with the results so far.

    Raises WorkerDied where there is no report.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "vllm_deterministic.service.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
        env={name: value for name, value in os.environ.items() if name not in _SECRETS},
        start_new_session=True,  # Ctrl-C is for the service, which then stops the worker
    )
    reading = asyncio.create_task(_read(process, job, on_progress))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait({reading}, timeout=_GRACE_S)
        if not reading.done():
            raise WorkerDied(f"The process of the verification did not end within {_GRACE_S:g} s.")
        return reading.result()
    finally:
        for task in (reading, stopping):
            task.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.gather(reading, stopping, return_exceptions=True)


async def _read(process: asyncio.subprocess.Process, job: Job, on_progress: Callable[[ArmProgress], None]) -> Finished:
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("the worker has no pipes")
    with contextlib.suppress(ConnectionError):
        stdin.write(job.model_dump_json().encode() + b"\n")
        await stdin.drain()
    with contextlib.suppress(asyncio.IncompleteReadError):
        while line := await stdout.readline():
            payload = json.loads(line)
            if "results" in payload:
                report = Report.model_validate(payload)
                return Finished(report, {name: await stdout.readexactly(size) for name, size in report.sizes.items()})
            on_progress(ArmProgress.model_validate(payload))
    raise WorkerDied(f"The process of the verification ended with status {await process.wait()}; see the log.")
