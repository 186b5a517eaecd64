"""Run the study of one operation: every strategy on all data and widths."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from . import attention, matmul, rms_norm
from .environment import environment
from .family import Family, Strategy
from .findings import findings
from .inputs import DATA
from .measure import measure
from .record import Case, Progress, ReductionRecord, ReductionStudy, StrategyRecord

_FAMILIES: dict[ReductionStudy, Callable[[torch.device, Executor], Family]] = {
    "rmsnorm": rms_norm.family,
    "matmul": matmul.family,
    "attention": attention.family,
}
_THREADS = 4
_SEED = 0


@dataclass(frozen=True)
class Plan:
    """What to run. ``hidden`` are widths, each a multiple of 64."""

    device: torch.device
    batch_sizes: tuple[int, ...]
    hidden: tuple[int, ...]
    repeats: int


def run_study(name: ReductionStudy, plan: Plan, progress: Progress) -> ReductionRecord:
    """Measure all strategies of a study. ``progress`` is told how much is done, of how much, and what comes next."""
    started_at, start = datetime.now(UTC), time.perf_counter()
    where = environment() | _torch_environment(plan.device)
    with ThreadPoolExecutor(_THREADS) as pool:
        family = _FAMILIES[name](plan.device, pool)
        strategies = run_family(family, plan, progress)
    return ReductionRecord(
        study=name,
        title=family.title,
        started_at=started_at,
        duration_s=time.perf_counter() - start,
        environment=where,
        batch_sizes=list(plan.batch_sizes),
        hidden=list(plan.hidden),
        repeats=plan.repeats,
        strategies=strategies,
        findings=findings(name, strategies),
    )


def run_family(family: Family, plan: Plan, progress: Progress) -> list[StrategyRecord]:
    """Measure the strategies of ``family``. The verdicts are what was measured, whatever a strategy's rule says."""
    cases: list[list[Case]] = [[] for _ in family.strategies]
    total, done = len(plan.hidden) * len(DATA) * len(cases), 0
    for hidden in plan.hidden:
        for data in DATA:
            generator = torch.Generator().manual_seed(_SEED)
            on_cpu = family.inputs(data, hidden, max(plan.batch_sizes), generator)
            oracle = family.oracle(*on_cpu.batch(1))[0]
            inputs = on_cpu.to(plan.device)
            for strategy, found in zip(family.strategies, cases, strict=True):
                progress(done, total, f"{strategy.name}, {hidden}")
                found.append(
                    measure(
                        strategy,
                        inputs,
                        oracle,
                        data=data,
                        hidden=hidden,
                        batch_sizes=plan.batch_sizes,
                        repeats=plan.repeats,
                    )
                )
                done += 1
    progress(done, total, "done")
    return [_judge(strategy, found) for strategy, found in zip(family.strategies, cases, strict=True)]


def _judge(strategy: Strategy, cases: list[Case]) -> StrategyRecord:
    return StrategyRecord(
        name=strategy.name,
        rule=strategy.rule,
        order=strategy.order,
        batch_invariant=all(case.results == 1 for case in cases),
        run_to_run=all(case.results_of_repeats == 1 for case in cases),
        cases=cases,
    )


def _torch_environment(device: torch.device) -> dict[str, str]:
    found = {"device": str(device), "torch": torch.__version__, "threads of torch": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
