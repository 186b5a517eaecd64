"""Send the waves of an arm and keep what comes back."""

import asyncio
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping

from vllm_deterministic.verify.client import CannotRun, Client, Rejected
from vllm_deterministic.verify.completion import Completion
from vllm_deterministic.verify.journal import ArmJournal, Exchange
from vllm_deterministic.verify.metrics import Counters, read_counters
from vllm_deterministic.verify.progress import Progress
from vllm_deterministic.verify.server import Server
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Answers, Planned, Wave, Waves, request_body, request_key


class Sender:
    """Send to one server. ``run_id`` keeps the prefix caches of this run apart from those of any other."""

    def __init__(self, client: Client, server: Server, settings: Settings, run_id: str, started: float) -> None:
        self._client = client
        self._server = server
        self._settings = settings
        self._run_id = run_id
        self._started = started
        self._pace = random.Random(f"pace {settings.seed}")
        self._fastest_s: float | None = None

    async def run_arm(self, waves: Waves, arm: ArmJournal, progress: Progress) -> None:
        """Send every wave of an arm. Answers land in the journal at once, so it is whole whenever this is stopped."""
        before = await self._counters()
        wave = next(waves, None)
        try:
            while wave is not None:
                done = len(arm.exchanges)
                await self._run_wave(wave, arm, progress)
                after = await self._counters()
                if before is not None and after is not None:
                    arm.count(wave.phase, after - before)
                before = after
                wave = _next(waves, _Answers(arm.exchanges[done:]))
            arm.complete = True
        finally:
            arm.finished_s = self._now()

    async def _run_wave(self, wave: Wave, arm: ArmJournal, progress: Progress) -> None:
        queue = self._timed(wave)
        begun = time.monotonic()

        async def work() -> None:
            for planned, arrival_s in queue:
                await asyncio.sleep(max(0.0, begun + arrival_s - time.monotonic()))
                await self._exchange(planned, wave.phase, arm)
                progress.advance()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(wave.concurrency, len(wave.requests))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            expected = errors.subgroup(CannotRun)
            if expected is None:
                raise
            raise expected.exceptions[0] from None

    async def _exchange(self, planned: Planned, phase: str, arm: ArmJournal) -> None:
        chat = self._settings.is_chat and isinstance(planned.ask.prompt, str) and arm.name != "prefix"
        path = self._settings.endpoint if chat else self._settings.completions_endpoint
        extensions = self._server.extensions
        body = request_body(planned.ask, self._server.model, self._settings, chat=chat, extensions=extensions)
        key = request_key(body)
        if planned.salt is not None and extensions:
            body["cache_salt"] = f"{self._run_id}-{planned.salt}"
        sent = self._now()
        try:
            completion = await self._client.complete(path, body)
        except Rejected:
            if planned.compared:
                raise
            arm.refused += 1
            return
        if planned.compared and planned.ask.logprobs and not all(choice.logprobs for choice in completion.choices):
            raise CannotRun(
                f"{planned.id} was answered without logprobs, though earlier requests had them. See the server's log."
            )
        finished = self._now()
        if planned.compared:
            self._fastest_s = min(self._fastest_s or math.inf, finished - sent)
        arm.add(planned, key, phase, sent, finished, completion)

    def _timed(self, wave: Wave) -> Iterator[tuple[Planned, float]]:
        """Each request with its arrival in the wave: a Poisson process at a finite ``--request-rate``, else as
        planned.
        """
        rate = self._settings.request_rate
        answer_s = self._fastest_s or 0.0
        arrival_s = 0.0
        for planned in wave.requests:
            arrival_s = planned.delay * answer_s if rate == math.inf else arrival_s + self._pace.expovariate(rate)
            yield planned, arrival_s

    async def _counters(self) -> Counters | None:
        if not self._server.has_metrics:
            return None
        return read_counters(await self._client.get_text("/metrics") or "")

    def _now(self) -> float:
        return time.monotonic() - self._started


class _Answers(Mapping[str, Completion]):
    """The answers of compared requests by id; each is whole only while it is looked at."""

    def __init__(self, exchanges: Iterable[Exchange]) -> None:
        self._exchanges = {exchange.planned.id: exchange for exchange in exchanges if exchange.planned.compared}

    def __getitem__(self, name: str) -> Completion:
        return self._exchanges[name].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self._exchanges)

    def __len__(self) -> int:
        return len(self._exchanges)


def _next(waves: Waves, answers: Answers) -> Wave | None:
    try:
        return waves.send(answers)
    except StopIteration:
        return None
