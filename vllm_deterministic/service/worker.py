"""The process that runs one verification, so that its load, its memory and its end are not the service's.

It reads one `Job` as a line of JSON from standard input and writes lines of JSON to standard output: `ArmProgress` as
it goes, then one `Report`, followed by the zlib-compressed JSON run record of each target, in the report's order.
SIGTERM ends the run early with what there is. End of standard input means that the service died: the load stops at
once.
"""

import asyncio
import os
import signal
import sys
import threading
import time
import zlib
from typing import BinaryIO

from pydantic import BaseModel, SecretStr

from vllm_deterministic.service.replicas import compare_replicas
from vllm_deterministic.service.schema import ArmProgress, ArmResult, ReplicaResult, TargetResult
from vllm_deterministic.verify.record import ArmRecord, RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

_NICENESS = 5  # the service answers first
_INTERVAL_S = 0.2  # between two reports of progress on one target


class Job(BaseModel):
    """What to do: the settings of the verifying half by target, and their keys, which settings never print."""

    settings: dict[str, Settings]
    api_keys: dict[str, str]
    keep_prompts: bool


class Report(BaseModel):
    """What came of it. ``latencies`` are seconds by target and arm; ``sizes`` count the bytes of each record."""

    results: list[TargetResult]
    replicas: ReplicaResult | None
    latencies: dict[str, dict[str, list[float]]]
    sizes: dict[str, int]


class _Progress:
    """Tell how far one target is, a few times a second."""

    def __init__(self, target: str, output: BinaryIO) -> None:
        self._target = target
        self._output = output
        self._arm = ""
        self._done = self._total = 0
        self._told = 0.0

    def start(self, arm: str, total: int) -> None:
        self._arm, self._done, self._total = arm, 0, total
        self._tell()

    def advance(self) -> None:
        self._done += 1
        if time.monotonic() - self._told >= _INTERVAL_S:
            self._tell()

    def finish(self) -> None:
        if self._arm:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        progress = ArmProgress(target=self._target, arm=self._arm, done=self._done, total=self._total)
        _write(self._output, progress.model_dump_json())


def main() -> None:
    """Do one job."""
    os.nice(_NICENESS)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints by mistake must not end up between the lines
    job = Job.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    records = asyncio.run(_verify_all(job, output))
    if not job.keep_prompts:
        records = {target: _without_prompts(record) for target, record in records.items()}
    blobs = {target: zlib.compress(record.model_dump_json().encode()) for target, record in records.items()}
    report = Report(
        results=[_summary(target, record) for target, record in records.items()],
        replicas=compare_replicas(records) if len(records) > 1 else None,
        latencies={target: {arm.name: _latencies(arm) for arm in record.arms} for target, record in records.items()},
        sizes={target: len(blob) for target, blob in blobs.items()},
    )
    _write(output, report.model_dump_json())
    for blob in blobs.values():
        output.write(blob)
    output.flush()


async def _verify_all(job: Job, output: BinaryIO) -> dict[str, RunRecord]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    runs = {}
    async with asyncio.TaskGroup() as group:
        for target, settings in job.settings.items():
            keyed = settings.model_copy(update={"api_key": _key(job, target)})
            runs[target] = group.create_task(verify(keyed, _Progress(target, output), stop=stop))
    return {target: run.result() for target, run in runs.items()}


def _key(job: Job, target: str) -> SecretStr | None:
    return SecretStr(job.api_keys[target]) if target in job.api_keys else None


def _die_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(1)


def _write(output: BinaryIO, line: str) -> None:
    output.write(line.encode() + b"\n")
    output.flush()


def _without_prompts(record: RunRecord) -> RunRecord:
    """The record with the hash of each request in the place of its prompt."""
    arms = []
    for arm in record.arms:
        groups = [group.model_copy(update={"prompt": f"request {group.key}"}) for group in arm.groups]
        arms.append(arm.model_copy(update={"groups": groups}))
    return record.model_copy(update={"arms": arms})


def _summary(target: str, record: RunRecord) -> TargetResult:
    return TargetResult(
        target=target,
        status=record.status,
        message=record.message,
        model=record.server.model,
        version=record.server.version,
        fingerprints=record.server.system_fingerprints,
        notes=record.notes,
        duration_s=round(record.duration_s, 3),
        arms=[_arm(arm) for arm in record.arms],
    )


def _arm(arm: ArmRecord) -> ArmResult:
    return ArmResult(
        arm=arm.name,
        status=arm.status,
        planned=arm.planned,
        answered=arm.answered,
        compared=arm.compared,
        unique_outputs=arm.unique_outputs,
        unique_logprobs=arm.unique_logprobs,
        divergent=arm.divergent,
        failures=[failure.message for failure in arm.failures],
        output_tokens=arm.output_tokens,
        duration_s=round(arm.duration_s, 3),
        p50_s=arm.latency.p50 if arm.latency else None,
        p99_s=arm.latency.p99 if arm.latency else None,
    )


def _latencies(arm: ArmRecord) -> list[float]:
    return [round(request.finished_s - request.sent_s, 6) for request in arm.requests if request.compared]


if __name__ == "__main__":
    main()
