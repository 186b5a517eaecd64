"""What a study measured, as JSON keeps it. Times are in milliseconds, differences in units of the result."""

from collections.abc import Callable
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

# Told how much of a study is done, of how much, and what comes next.
Progress = Callable[[int, int, str], None]
# What a strategy's order of additions follows: nothing, the batch size, which thread is first, or what a library likes.
Order = Literal["fixed", "batch", "arrival", "library"]
ReductionStudy = Literal["rmsnorm", "matmul", "attention"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Time(_Record):
    """Wall-clock time of one call."""

    median_ms: float
    min_ms: float
    max_ms: float


class Case(_Record):
    """One strategy on one kind of data at one width; all of it about one row, the same in every batch.

    ``results`` counts the distinct byte patterns of that row over all batch sizes and repeats; ``results_of_repeats``
    those among the repeats, which run at the largest batch size.
    """

    data: str
    hidden: int
    results: int
    results_of_repeats: int
    across_batches: float
    across_repeats: float
    from_float64: float
    time: Time


class StrategyRecord(_Record):
    """One strategy. ``rule`` and ``order`` are what it sets out to do; the rest is measured."""

    name: str
    rule: str
    order: Order
    batch_invariant: bool
    run_to_run: bool
    cases: list[Case]

    @property
    def results(self) -> int:
        """The most results that any case had."""
        return max(case.results for case in self.cases)

    @property
    def time(self) -> Time:
        """At the largest width, on mixed data."""
        return max((case for case in self.cases if case.data == "mixed"), key=lambda case: case.hidden).time


class Finding(_Record):
    """A claim, whether it held here (None: undecided), and the numbers that say so."""

    claim: str
    held: bool | None
    measured: str


class StudyRecord(_Record):
    """What every study records."""

    schema_version: Literal[1] = 1
    started_at: datetime
    duration_s: float
    environment: dict[str, str]
    findings: list[Finding]


class ReductionRecord(StudyRecord):
    """A study of one operation's strategies."""

    study: ReductionStudy
    title: str
    batch_sizes: list[int]
    hidden: list[int]
    repeats: int
    strategies: list[StrategyRecord]

    def strategy(self, name: str) -> StrategyRecord:
        """The strategy of that name."""
        return next(strategy for strategy in self.strategies if strategy.name == name)


class Example(_Record):
    """An expression, what the machine makes of it and what it is worth."""

    expression: str
    result: str
    exact: str


class Way(_Record):
    """One way to add the same numbers, over many shuffles of them."""

    name: str
    rule: str
    results: int
    largest_difference: float
    time: Time


class FloatRecord(StudyRecord):
    """The study of floating-point addition itself. ``histogram``: how many shuffles gave each result, ascending."""

    study: Literal["float"] = "float"
    numbers: int
    shuffles: int
    examples: list[Example]
    ways: list[Way]
    histogram: list[int]
