"""What people say about these strategies, held against what was measured."""

from collections.abc import Sequence
from typing import get_args

from .record import Finding, Order, ReductionStudy, StrategyRecord


def findings(study: ReductionStudy, strategies: Sequence[StrategyRecord]) -> list[Finding]:
    """The claims that concern a study, each with the numbers that bear it out or contradict it."""
    by_order = {order: [strategy for strategy in strategies if strategy.order == order] for order in get_args(Order)}
    found = [
        Finding(
            claim="a fixed order gives one result",
            held=all(strategy.batch_invariant for strategy in by_order["fixed"]),
            measured=_results(by_order["fixed"]),
        ),
        Finding(
            claim="an order that follows the batch gives several results",
            held=not any(strategy.batch_invariant for strategy in by_order["batch"]),
            measured=_results(by_order["batch"]),
        ),
    ]
    if by_order["library"]:
        found.append(
            Finding(
                claim="a library's own sum follows the batch",
                held=not all(strategy.batch_invariant for strategy in by_order["library"]),
                measured=_results(by_order["library"]),
            )
        )
    if study == "rmsnorm":
        by_name = {strategy.name: strategy for strategy in strategies}
        by_index = by_name["threads, merged by index"]
        found += [
            *map(_varies, by_order["arrival"]),
            _slower("cat + sum is slower than adding by index", by_name["threads, cat + sum"], by_index),
            _slower("a pool of threads costs more than one thread", by_index, by_name["fixed chunks of 64"]),
        ]
    found.append(_slower("invariance costs time", strategies[-1], strategies[0]))
    return found


def _results(strategies: Sequence[StrategyRecord]) -> str:
    counts = "; ".join(f"{strategy.name}: {strategy.results}" for strategy in strategies)
    return f"distinct results over all batch sizes: {counts}"


def _varies(strategy: StrategyRecord) -> Finding:
    most = max(case.results_of_repeats for case in strategy.cases)
    return Finding(
        claim="a merge in order of arrival varies from run to run",
        held=not strategy.run_to_run,
        measured=f"{most} results in one batch" if most > 1 else "1 result in one batch, by luck: no rule keeps it so",
    )


def _slower(claim: str, strategy: StrategyRecord, other: StrategyRecord) -> Finding:
    """Decided only where the fastest run of one took longer than the median of the other: times are noisy."""
    one, two = strategy.time, other.time
    held = True if one.min_ms > two.median_ms else False if two.min_ms > one.median_ms else None
    return Finding(
        claim=claim,
        held=held,
        measured=f"{strategy.name} takes {one.median_ms / two.median_ms:.2f} times as long as {other.name} by medians",
    )
