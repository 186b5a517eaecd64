"""``vllm-deterministic verify`` in several processes at once, and what their records say together."""

import asyncio
import collections
import math
from collections.abc import Sequence
from typing import Any

from load_processes import Control, Task

from vllm_deterministic.verify import prefix, sampled
from vllm_deterministic.verify.progress import SilentProgress
from vllm_deterministic.verify.record import ArmRecord
from vllm_deterministic.verify.run import ARM_MODULES, verify
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Site

_PROCESSES = 4
_TIMEOUT_S = 600.0
_POLL_S = 0.2
_COUNTS = ("planned", "answered", "compared", "refused", "output_tokens")


def crowd_tasks(common: dict[str, Any], *, requests: int, runs: int) -> list[Task]:
    """The arms identical and mixed with at least so many requests each, all at once.

    One request is sent alike in the runs of identical. The arm mixed is cut into runs with a target each: its waves
    wait for their last neighbour, and one after the other they would take most of an hour.
    """
    mixed_runs = [{"mixed_prompts": math.ceil(requests / runs), "seed": seed} for seed in range(runs)]
    return [
        *_split(common, "identical", "num_prompts", requests),
        *((run_verify, (common | {"arms": ["mixed"]} | run,)) for run in mixed_runs),
    ]


def sequence_tasks(common: dict[str, Any], *, requests: int) -> list[Task]:
    """The arms sampled and prefix likewise, a part of whose requests wait for the answer of the one before.

    All runs of sampled send the same requests; each round of prefix is a run, with prompts of its own.
    """
    prefix_run = common | {"arms": ["prefix"]}
    rounds = math.ceil(requests / prefix.count(Settings.model_validate(prefix_run), Site()))
    return [
        *_split(common, "sampled", "sampled_prompts", requests),
        *((run_verify, (prefix_run | {"seed": seed},)) for seed in range(rounds)),
    ]


def common_settings(
    base_url: str, *, tokens: int, concurrency: int, kv_split: int, chunk_budget: int
) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "base_url": base_url,
        "max_tokens": tokens,
        "max_concurrency": concurrency,
        "ignore_eos": True,
        "timeout": _TIMEOUT_S,
        "kv_split": kv_split,
        "chunk_budget": chunk_budget,
    }


def _split(common: dict[str, Any], arm: str, name: str, requests: int) -> list[Task]:
    """An arm over several processes: the answers of equal requests all come at once, and take time to read.

    Each sends a multiple of the cases of the arm sampled, so that each case is sent equally often.
    """
    share = sampled.CASES * math.ceil(requests / _PROCESSES / sampled.CASES)
    processes = math.ceil(requests / share)
    run = {"arms": [arm], name: share, "max_concurrency": math.ceil(common["max_concurrency"] / processes)}
    return [(run_verify, (common | run,))] * processes


def planned(tasks: Sequence[Task]) -> int:
    """Requests of all runs, neighbours included, on a server whose context holds every prompt of the arm prefix."""
    settings = [Settings.model_validate(arguments[0]) for _, arguments in tasks]
    return sum(ARM_MODULES[arm].count(of_run, Site()) for of_run in settings for arm in of_run.arms)


def run_verify(control: Control, settings: dict[str, Any]) -> dict[str, Any]:
    """The task of one run: its record, answers by their digests alone."""
    record = asyncio.run(_verify(control, Settings.model_validate(settings)))
    return {
        "status": record.status,
        "message": record.message,
        "notes": record.notes,
        "fingerprints": record.server.system_fingerprints,
        "arms": [_brief(arm) for arm in record.arms],
    }


async def _verify(control: Control, settings: Settings) -> Any:
    stop = asyncio.Event()

    async def watch() -> None:
        while not control.stopped:
            await asyncio.sleep(_POLL_S)
        stop.set()

    watching = asyncio.create_task(watch())
    try:
        return await verify(settings, _Count(control), stop=stop)
    finally:
        watching.cancel()


class _Count(SilentProgress):
    """A progress that counts for all runs."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def advance(self) -> None:
        self._control.add()


def _brief(arm: ArmRecord) -> dict[str, Any]:
    answers: dict[str, dict[str, Any]] = {}
    for group in arm.groups:
        for variant in group.variants:
            position = variant.difference.position if variant.difference else None
            kept = {"output": variant.output_digest, "count": variant.count, "position": position}
            answers.setdefault(group.key, {})[variant.logprob_digest] = kept
    counts = {name: getattr(arm, name) for name in _COUNTS}
    failures = [failure.message for failure in arm.failures]
    return {"name": arm.name, **counts, "failures": failures, "answers": answers}


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs together, by arm and over all: a target is one request, whatever run or arm sent it.

    ``differing`` counts the answers that are not the target's most frequent one; ``first_token`` is the earliest
    output token at which any of them parts.
    """
    arms: dict[str, dict[str, Any]] = {}
    everything: list[dict[str, Any]] = []
    by_arm: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for arm in (arm for result in results for arm in result.get("arms", [])):
        row = arms.setdefault(arm["name"], dict.fromkeys(_COUNTS, 0) | {"failures": []})
        for name in _COUNTS:
            row[name] += arm[name]
        row["failures"] += arm["failures"][:3]
        by_arm[arm["name"]].append(arm["answers"])
        everything.append(arm["answers"])
    for name, answers in by_arm.items():
        arms[name] |= unique(answers)
    return {
        "arms": arms,
        "all": unique(everything),
        "runs": collections.Counter(result.get("status", "error") for result in results),
        "errors": [result.get("error", result.get("message")) for result in results if _failed(result)],
        "notes": sorted({note for result in results for note in result.get("notes", [])}),
        "fingerprints": sorted({value for result in results for value in result.get("fingerprints", [])}),
        "output_tokens": sum(row["output_tokens"] for row in arms.values()),
    }


def _failed(result: dict[str, Any]) -> bool:
    return result.get("status", "error") in ("error", "interrupted")


def unique(answers: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Different answers of the same targets.

    Args:
        answers: of each run, by target and by digest of the logprobs: ``output`` (a digest), ``count``, ``position``.
    """
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    outputs: dict[str, set[str]] = collections.defaultdict(set)
    positions = []
    for by_target in answers:
        for target, variants in by_target.items():
            for digest, variant in variants.items():
                counts[target][digest] += variant["count"]
                outputs[target].add(variant["output"])
                if variant["position"] is not None:
                    positions.append(variant["position"])
    return {
        "targets": len(counts),
        "unique_outputs": max(map(len, outputs.values()), default=0),
        "unique_logprob_records": max(map(len, counts.values()), default=0),
        "targets_differing": sum(len(digests) > 1 for digests in counts.values()),
        "differing": sum(digests.total() - max(digests.values()) for digests in counts.values()),
        "first_token": min(positions, default=None),
    }
