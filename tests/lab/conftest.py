"""One small run of every study, shared by the tests."""

import functools
from collections.abc import Callable
from typing import Any

import pytest


def quiet(done: int, total: int, what: str) -> None:
    """Progress that nobody sees, but that must make sense."""
    assert 0 <= done <= total
    assert what


@functools.cache
def measured(name: Any) -> Any:
    """The record of a study on the CPU."""
    if name == "float":
        from vllm_deterministic.lab.floats import run_floats

        return run_floats(quiet)
    torch = pytest.importorskip("torch")
    from vllm_deterministic.lab.study import Plan, run_study

    return run_study(name, Plan(torch.device("cpu"), batch_sizes=(1, 2, 5, 32), hidden=(512,), repeats=5), quiet)


@pytest.fixture
def record() -> Callable[[str], Any]:
    """What gives the record of a study, measured once."""
    return measured
