"""What people say about these strategies, held against what was measured."""

from collections.abc import Sequence

from .record import Finding, ReductionStudy, StrategyRecord


def findings(study: ReductionStudy, strategies: Sequence[StrategyRecord]) -> list[Finding]:
    """The claims that concern a study, each with the numbers that bear it out or contradict it."""
    found = [_promises(strategies), _faults(strategies)]
    by_name = {strategy.name: strategy for strategy in strategies}
    if study != "attention":
        found.append(_library(strategies[0]))
    if study == "rmsnorm":
        by_index, on_arrival = by_name["threads, merged by index"], by_name["threads, lock, as they arrive"]
        found += [
            _varies(on_arrival),
            _slower("cat + sum is slower than adding by index", by_name["threads, cat + sum"], by_index),
            _slower("a pool of threads costs more than one thread", by_index, by_name["fixed chunks of 64"]),
        ]
    found.append(_slower("invariance costs time", strategies[-1], strategies[0]))
    return found


def _promises(strategies: Sequence[StrategyRecord]) -> Finding:
    promising = [strategy for strategy in strategies if strategy.promises]
    broken = [strategy for strategy in promising if not strategy.batch_invariant]
    measured = f"{len(promising) - len(broken)} of {len(promising)} strategies with a fixed order gave one result"
    if broken:
        measured += "; not " + ", ".join(f"{strategy.name} ({strategy.results})" for strategy in broken)
    return Finding(claim="a fixed order gives one result", held=not broken, measured=measured)


def _faults(strategies: Sequence[StrategyRecord]) -> Finding:
    faults = [strategy for strategy in strategies if "follow the batch" in strategy.name]
    return Finding(
        claim="an order that follows the batch gives several results",
        held=all(strategy.results > 1 for strategy in faults),
        measured=", ".join(f"{strategy.name}: {strategy.results}" for strategy in faults),
    )


def _library(library: StrategyRecord) -> Finding:
    return Finding(
        claim="the library's own call follows the batch",
        held=not library.batch_invariant,
        measured=f"{library.name}: {_count(library.results)} over all batch sizes",
    )


def _varies(strategy: StrategyRecord) -> Finding:
    most = max(case.results_of_repeats for case in strategy.cases)
    repeats = "run to run" if most > 1 else "run to run; nothing but luck keeps the order"
    return Finding(
        claim="a merge in order of arrival varies from run to run",
        held=not strategy.run_to_run,
        measured=f"{_count(most)} {repeats}",
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


def _count(results: int) -> str:
    return "1 result" if results == 1 else f"{results} results"
