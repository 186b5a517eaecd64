"""Floating-point addition itself: what rounding loses, and how many results one sum has."""

import functools
import math
import operator
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Context, Decimal

from .environment import environment
from .record import Example, Finding, FloatRecord, Progress, Time, Way

NUMBERS = 200
SHUFFLES = 10_000
_SEED = 0
_SCALES = (10.0, 1.0, 1.0, 0.1)


def examples() -> list[Example]:
    """Three sums that anyone can check by hand, computed here."""
    three = Context(prec=3)
    large, small = Decimal(1230), Decimal("23.4")
    return [
        Example(expression="(0.1 + 1e20) - 1e20", result=repr((0.1 + 1e20) - 1e20), exact="0.1"),
        Example(expression="0.1 + (1e20 - 1e20)", result=repr(0.1 + (1e20 - 1e20)), exact="0.1"),
        Example(
            expression="1230 + 23.4 with three digits",
            result=f"{three.add(large, small):f}",
            exact=f"{large + small:f}",
        ),
    ]


def in_order(numbers: Sequence[float]) -> float:
    """One number after the other, as they come."""
    # Not sum(): from Python 3.12 on it carries a correction along.
    return functools.reduce(operator.add, numbers)


def sorted_first(numbers: Sequence[float]) -> float:
    """Sorted, then one after the other: whatever order they come in, they are added in one."""
    return in_order(sorted(numbers))


def exact(numbers: Sequence[float]) -> float:
    """math.fsum: kept exact on the way and rounded once, so that the order has nothing to change."""
    return math.fsum(numbers)


def run_floats(progress: Progress) -> FloatRecord:
    """Add the same numbers in 10 000 random orders, three ways. Pure Python: it needs neither torch nor a device."""
    started_at, start = datetime.now(UTC), time.perf_counter()
    where = environment()
    source = random.Random(_SEED)
    numbers = [source.gauss() * source.choice(_SCALES) for _ in range(NUMBERS)]
    ways: dict[str, Callable[[Sequence[float]], float]] = {
        "as they come": in_order,
        "sorted first": sorted_first,
        "exact (fsum)": exact,
    }
    sums: dict[str, list[float]] = {name: [] for name in ways}
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(SHUFFLES):
        if done % 500 == 0:
            progress(done, SHUFFLES, "shuffles")
        source.shuffle(numbers)
        for name, add in ways.items():
            before = time.perf_counter()
            sums[name].append(add(numbers))
            times_ms[name].append((time.perf_counter() - before) * 1e3)
    progress(SHUFFLES, SHUFFLES, "done")
    measured = [_way(name, ways[name].__doc__ or "", sums[name], times_ms[name]) for name in ways]
    counts = Counter(sums["as they come"])
    return FloatRecord(
        started_at=started_at,
        duration_s=time.perf_counter() - start,
        environment=where,
        findings=_findings(measured),
        numbers=NUMBERS,
        shuffles=SHUFFLES,
        examples=examples(),
        ways=measured,
        histogram=[counts[result] for result in sorted(counts)],
    )


def _way(name: str, rule: str, sums: Sequence[float], times_ms: Sequence[float]) -> Way:
    return Way(
        name=name,
        rule=rule,
        results=len(set(sums)),
        largest_difference=max(sums) - min(sums),
        time=Time(median_ms=statistics.median(times_ms), min_ms=min(times_ms), max_ms=max(times_ms)),
    )


def _findings(ways: Sequence[Way]) -> list[Finding]:
    as_they_come, in_one_order, once = ways
    return [
        Finding(
            claim="addition is associative",
            held=as_they_come.results == 1,
            measured=f"the same {NUMBERS} numbers had {as_they_come.results} sums in {SHUFFLES} orders",
        ),
        Finding(
            claim="one fixed order gives one result",
            held=in_one_order.results == 1,
            measured=f"{in_one_order.results} over the same shuffles, when sorted first",
        ),
        Finding(
            claim="exact sums need no order",
            held=once.results == 1,
            measured=f"{once.results} over the same shuffles, for {_ratio(once, as_they_come)} times the time",
        ),
    ]


def _ratio(way: Way, other: Way) -> str:
    return f"{way.time.median_ms / other.time.median_ms:.1f}"
