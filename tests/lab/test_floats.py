import random
from collections.abc import Callable
from typing import Any

from vllm_deterministic.lab import floats


def test_examples_that_can_be_checked_by_hand() -> None:
    found = {example.expression: (example.result, example.exact) for example in floats.examples()}
    assert found == {
        "(0.1 + 1e20) - 1e20": ("0.0", "0.1"),
        "0.1 + (1e20 - 1e20)": ("0.1", "0.1"),
        "1230 + 23.4 with three digits": ("1250", "1253.4"),
    }


def test_10_000_shuffles_of_one_sum(record: Callable[[str], Any]) -> None:
    study = record("float")
    as_they_come, sorted_first, exact = study.ways
    assert as_they_come.results > 10
    assert as_they_come.largest_difference > 0
    assert (sorted_first.results, exact.results) == (1, 1)
    assert sorted_first.largest_difference == exact.largest_difference == 0
    assert study.shuffles == sum(study.histogram) == 10_000
    assert len(study.histogram) == as_they_come.results
    assert [finding.held for finding in study.findings] == [False, True, True]


def test_in_order_carries_no_correction_along() -> None:
    assert floats.in_order([0.1, 1e20, -1e20]) == 0.0
    assert floats.exact([0.1, 1e20, -1e20]) == 0.1
    numbers = [random.Random(0).gauss() for _ in range(100)]
    assert floats.sorted_first(numbers) == floats.in_order(sorted(numbers, reverse=True)[::-1])
