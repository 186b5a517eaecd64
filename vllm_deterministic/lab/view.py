"""What every report of a study shows: one set of rows and words, whichever the format."""

from collections.abc import Callable
from dataclasses import dataclass

from .record import Case, Finding, FloatRecord, ReductionRecord, StrategyRecord, Time, Way

Record = ReductionRecord | FloatRecord


@dataclass(frozen=True)
class Bar:
    """One strategy in the picture: how many results it had and what it cost."""

    name: str
    results: int
    time: Time


@dataclass(frozen=True)
class View:
    """A study in words. ``rows`` are as long as ``headings``; the first column is a name, the others are measures."""

    title: str
    subject: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    rules: list[tuple[str, str]]
    bars: list[Bar]
    counted: str
    setting: str
    notes: list[str]
    findings: list[Finding]
    histogram: list[int]
    environment: str


def view(record: Record) -> View:
    """The view of either kind of record."""
    return _float_view(record) if isinstance(record, FloatRecord) else _reduction_view(record)


def _reduction_view(record: ReductionRecord) -> View:
    largest, widest = max(record.batch_sizes), max(record.hidden)
    return View(
        title=f"{record.title}: one row, many batches",
        subject=f"One row in batches of {', '.join(map(str, record.batch_sizes))}, then {record.repeats} times in a "
        f"batch of {largest}; hidden {', '.join(map(str, record.hidden))}; fp32.",
        headings=(
            "strategy",
            "results, mixed",
            "results, adversarial",
            "across batches",
            "across repeats",
            "from float64",
            "ms (min to max)",
            "verdict",
        ),
        rows=[_strategy_row(strategy) for strategy in record.strategies],
        rules=[(strategy.name, strategy.rule) for strategy in record.strategies],
        bars=[Bar(strategy.name, strategy.results, strategy.time) for strategy in record.strategies],
        counted="distinct results of one row",
        setting=f"batch of {largest}, hidden {widest}, {_machine(record)}",
        notes=[
            "Results are the distinct byte patterns of that row, at the width that had most.",
            "Batch-invariant: one result in every batch, every time. Run-to-run only: one as long as the batch stays.",
            "Differences are the largest of any element on mixed data, at any width.",
            f"Times are of a batch of {largest} at hidden {widest}, on mixed data.",
        ],
        findings=record.findings,
        histogram=[],
        environment=_environment(record),
    )


def _strategy_row(strategy: StrategyRecord) -> tuple[str, ...]:
    mixed = [case for case in strategy.cases if case.data == "mixed"]
    adversarial = [case for case in strategy.cases if case.data == "adversarial"]

    def largest(measure: Callable[[Case], float]) -> str:
        return f"{max(map(measure, mixed)):.1e}".replace("0.0e+00", "0")

    return (
        strategy.name,
        str(max(case.results for case in mixed)),
        str(max(case.results for case in adversarial)),
        largest(lambda case: case.across_batches),
        largest(lambda case: case.across_repeats),
        largest(lambda case: case.from_float64),
        time_text(strategy.time),
        "batch-invariant" if strategy.batch_invariant else "run-to-run only" if strategy.run_to_run else "neither",
    )


def _float_view(record: FloatRecord) -> View:
    return View(
        title=f"Floating point: one sum, {record.shuffles} shuffles",
        subject=f"The same {record.numbers} numbers in double precision, shuffled {record.shuffles} times.",
        headings=("way to add", "results", "largest difference", "ms (min to max)"),
        rows=[_way_row(way) for way in record.ways],
        rules=[(way.name, way.rule) for way in record.ways],
        bars=[Bar(way.name, way.results, way.time) for way in record.ways],
        counted="distinct sums",
        setting=f"{record.numbers} numbers, {_machine(record)}",
        notes=[f"{example.expression} gives {example.result}; exact: {example.exact}" for example in record.examples],
        findings=record.findings,
        histogram=record.histogram,
        environment=_environment(record),
    )


def _way_row(way: Way) -> tuple[str, ...]:
    difference = f"{way.largest_difference:.1e}" if way.largest_difference else "0"
    return (way.name, str(way.results), difference, time_text(way.time))


def time_text(time: Time) -> str:
    """Median and range, without the unit."""
    return f"{number(time.median_ms)} ({number(time.min_ms)} to {number(time.max_ms)})"


def number(value: float) -> str:
    """Two digits: 0.052, 8.4, 120."""
    return f"{float(f'{value:.2g}'):g}"


def verdict(finding: Finding) -> str:
    """What became of a claim, in a word or two."""
    return {True: "held", False: "not so", None: "undecided"}[finding.held]


def _machine(record: Record) -> str:
    return record.environment.get("gpu", record.environment["processor"])


def _environment(record: Record) -> str:
    where = ", ".join(f"{name} {value}" for name, value in record.environment.items())
    return f"{record.started_at:%Y-%m-%d %H:%M} UTC, {record.duration_s:.1f} s; {where}"
