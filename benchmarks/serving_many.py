"""Very many short completions of a set of targets, mixed at random: every answer against the first of its target."""

import asyncio
import collections
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from load_processes import Control, Task

from vllm_deterministic.verify.client import CannotRun, Client
from vllm_deterministic.verify.compare import logprob_digest
from vllm_deterministic.verify.completion import TOKEN_IDS, Completion
from vllm_deterministic.verify.settings import Settings

_LONGEST_PROMPT, _LONGEST_ANSWER = 2000, 16
_TIMEOUT_S = 600.0
_EXAMPLES = 20
# Each with several lengths and logprobs. The last has no seed: the server derives it from the prompt.
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.3, "top_k": 40, "seed": 2},
    {"temperature": 0.7, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "min_p": 0.02, "seed": 4},
    {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "presence_penalty": 0.5, "seed": 5},
    {"temperature": 1.0},
)
_KINDS_OF_EACH = 5


@dataclass(frozen=True)
class Plan:
    """What is sent.

    Attributes:
        completions: in all.
        targets: different requests, so that each is sent ``completions / targets`` times.
        batch: most prompts in one HTTP request, all of the same sampling parameters. The server serves each as a
            request of its own, and takes longer over HTTP than over a batch of them.
        cold: share of the HTTP requests that share no prefix cache with any other.
        vocab_size: token ids of prompts lie below.
    """

    completions: int
    targets: int
    batch: int
    cold: float
    vocab_size: int
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """Sampling parameters, and prompts that are sent with them."""

    body: dict[str, Any]
    prompts: list[list[int]]

    @property
    def asked(self) -> dict[str, Any]:
        """The parameters that are sent: those that are set."""
        return {name: value for name, value in self.body.items() if value is not None}


@dataclass(frozen=True)
class Batch:
    """One HTTP request: some prompts of a kind, by number, and the salt of the prefix cache if it has its own."""

    kind: int
    prompts: tuple[int, ...]
    salt: str | None


def kinds(plan: Plan) -> list[Kind]:
    """The targets. Lengths of prompts are uniform in their logarithm: short ones are cut at more places a second."""
    rng = random.Random(f"targets {plan.seed}")
    made = [
        Kind(
            {**sampling, "max_tokens": rng.randint(1, _LONGEST_ANSWER), "logprobs": rng.choice((None, None, 1, 5))}, []
        )
        for sampling in SAMPLINGS * _KINDS_OF_EACH
    ]
    for _, kind in zip(range(plan.targets), itertools.cycle(made), strict=False):
        length = round(math.exp(rng.uniform(0.0, math.log(_LONGEST_PROMPT))))
        kind.prompts.append([rng.randrange(plan.vocab_size) for _ in range(length)])
    return [kind for kind in made if kind.prompts]


def batches(plan: Plan, made: Sequence[Kind]) -> list[Batch]:
    """All requests in a random order, the same in every process."""
    rng = random.Random(f"order {plan.seed}")
    targets = [(kind, prompt) for kind, of_kind in enumerate(made) for prompt in range(len(of_kind.prompts))]
    repeats = math.ceil(plan.completions / len(targets))
    every = (targets * repeats)[: plan.completions]
    rng.shuffle(every)
    by_kind: dict[int, list[int]] = collections.defaultdict(list)
    for kind, prompt in every:
        by_kind[kind].append(prompt)
    found = [
        Batch(kind, tuple(prompts[at : at + plan.batch]), None)
        for kind, prompts in by_kind.items()
        for at in range(0, len(prompts), plan.batch)
    ]
    rng.shuffle(found)
    return [
        replace(batch, salt=f"cold-{number}") if rng.random() < plan.cold else batch
        for number, batch in enumerate(found)
    ]


def many_tasks(base_url: str, model: str, plan: Plan, processes: int, in_flight: int) -> list[Task]:
    """``in_flight`` completions at a time, over so many processes."""
    connections = max(1, in_flight // plan.batch // processes)
    return [(send, (base_url, model, plan, part, processes, connections)) for part in range(processes)]


@dataclass
class Tally:
    """How often each target got which answer, and when first, in seconds of the machine's clock."""

    counts: dict[tuple[int, int], dict[str, tuple[int, float]]] = field(default_factory=dict)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cold: int = 0

    def add(self, target: tuple[int, int], digest: str) -> None:
        """Count an answer."""
        of_target = self.counts.setdefault(target, {})
        count, first = of_target.get(digest, (0, time.monotonic()))
        of_target[digest] = (count + 1, first)


def send(
    control: Control, base_url: str, model: str, plan: Plan, part: int, parts: int, connections: int
) -> dict[str, Any]:
    """The task of one process: its share of the batches. An answer that fails ends it; what came until then counts."""
    tally, error = Tally(), None
    made = kinds(plan)
    queue = itertools.islice(batches(plan, made), part, None, parts)
    try:
        asyncio.run(_send(control, base_url, model, made, queue, connections, tally))
    except* CannotRun as failures:
        error = str(failures.exceptions[0])
    told = {"error": error} if error else {}
    return {**vars(tally), **told}


async def _send(
    control: Control,
    base_url: str,
    model: str,
    made: Sequence[Kind],
    queue: Iterator[Batch],
    connections: int,
    tally: Tally,
) -> None:
    settings = Settings(base_url=base_url, max_concurrency=connections, timeout=_TIMEOUT_S)

    async def work(client: Client) -> None:
        for batch in queue:
            if control.stopped:
                return
            kind = made[batch.kind]
            completion = await client.complete("/v1/completions", body(model, kind, batch))
            if len(completion.choices) != len(batch.prompts):
                raise CannotRun(f"{len(batch.prompts)} prompts were answered with {len(completion.choices)} choices.")
            for prompt, choice in zip(batch.prompts, completion.choices, strict=True):
                if choice.token_ids is None or (kind.body["logprobs"] and not choice.logprobs):
                    raise CannotRun("An answer lacks the token ids or the logprobs that it was asked for.")
                tally.add((batch.kind, prompt), logprob_digest(Completion((choice,))))
                tally.output_tokens += len(choice.token_ids)
                tally.prompt_tokens += len(kind.prompts[prompt])
            tally.cold += len(batch.prompts) if batch.salt else 0
            control.add(len(batch.prompts))

    async with Client(settings) as client, asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(work(client))


def body(model: str, kind: Kind, batch: Batch) -> dict[str, Any]:
    """The JSON body of a batch."""
    prompts = [kind.prompts[prompt] for prompt in batch.prompts]
    salt = {"cache_salt": batch.salt} if batch.salt else {}
    return {"model": model, "prompt": prompts, **kind.asked, **TOKEN_IDS, **salt}


def summarize(plan: Plan, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The processes together: ``differing`` are the answers that are not the first one of their target."""
    counts: dict[tuple[int, int], dict[str, tuple[int, float]]] = {}
    for result in results:
        for target, digests in result.get("counts", {}).items():
            merged = counts.setdefault(target, {})
            for digest, (count, first) in digests.items():
                before, earlier = merged.get(digest, (0, first))
                merged[digest] = (before + count, min(first, earlier))
    answered = sum(count for digests in counts.values() for count, _ in digests.values())
    differing = {target: _not_first(digests) for target, digests in counts.items() if len(digests) > 1}
    made = kinds(plan)
    examples = [
        {"request": made[kind].body, "prompt_tokens": len(made[kind].prompts[prompt]), "differing": count}
        | {"answers": sum(times for times, _ in counts[kind, prompt].values())}
        for (kind, prompt), count in itertools.islice(sorted(differing.items()), _EXAMPLES)
    ]
    sums = {name: sum(result.get(name, 0) for result in results) for name in ("output_tokens", "prompt_tokens", "cold")}
    return {
        "planned": plan.completions,
        "answered": answered,
        "targets": len(counts),
        "differing": sum(differing.values()),
        "targets_differing": len(differing),
        "examples": examples,
        **sums,
        "errors": [result["error"] for result in results if "error" in result],
    }


def _not_first(digests: dict[str, tuple[int, float]]) -> int:
    first = min(digests, key=lambda digest: digests[digest][1])
    return sum(count for digest, (count, _) in digests.items() if digest != first)
