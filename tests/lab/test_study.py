# ruff: noqa: E402 (torch comes with the extra "lab" alone)
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.lab import matmul
from vllm_deterministic.lab.family import Family, Inputs, has_kernels
from vllm_deterministic.lab.findings import findings
from vllm_deterministic.lab.inputs import mixed
from vllm_deterministic.lab.record import StrategyRecord
from vllm_deterministic.lab.study import Plan, run_family

from .conftest import quiet

CPU = torch.device("cpu")
STRATEGIES = {
    "rmsnorm": {
        "standard (mean)": "library",
        "sequential": "fixed",
        "chunks that follow the batch": "batch",
        "lanes that follow the batch": "batch",
        "fixed chunks of 64": "fixed",
        "threads, merged by index": "fixed",
        "threads, lock, as they arrive": "arrival",
        "threads, in pairs": "fixed",
        "threads, cat + sum": "library",
        "this project's": "fixed",
    },
    "matmul": {
        "library": "library",
        "segments that follow the batch": "batch",
        "fixed segments of 256": "fixed",
        "fixed tile of 16 rows": "fixed",
    },
    "attention": {
        "splits that follow the batch": "batch",
        "fixed splits of 256": "fixed",
        "this project's fold": "fixed",
    },
}
# Of results that are 1, 400 and 3 in size.
LARGEST_ERROR = {"rmsnorm": 1e-3, "matmul": 1e-2, "attention": 1e-4}


@pytest.mark.parametrize("study", STRATEGIES)
def test_the_order_decides_the_verdict(study: str, record: Callable[[str], Any]) -> None:
    strategies = record(study).strategies
    assert {strategy.name: strategy.order for strategy in strategies} == STRATEGIES[study]
    for strategy in strategies:
        adversarial = next(case for case in strategy.cases if case.data == "adversarial")
        if strategy.order == "fixed":
            assert strategy.batch_invariant, strategy.name
            assert strategy.results == 1
            assert adversarial.across_batches == adversarial.across_repeats == 0
        if strategy.order == "batch":
            assert not strategy.batch_invariant, strategy.name
            assert adversarial.results > 1
            assert adversarial.across_batches > 0
        if strategy.order != "arrival":
            assert strategy.run_to_run, strategy.name


@pytest.mark.parametrize("study", STRATEGIES)
def test_every_strategy_computes_the_operation(study: str, record: Callable[[str], Any]) -> None:
    for strategy in record(study).strategies:
        assert strategy.rule.endswith((".", ")."))
        for case in strategy.cases:
            assert case.from_float64 < LARGEST_ERROR[study], f"{strategy.name}, {case.data}"
            assert 0 < case.time.min_ms <= case.time.median_ms <= case.time.max_ms


def test_on_inputs_that_cancel_the_rounding_is_all_there_is() -> None:
    family = matmul.family(CPU, None)
    inputs = family.inputs("adversarial", 512, 4, torch.Generator().manual_seed(0))
    assert (family.oracle(*inputs.batch(1)).abs() < 1e-9).all()
    assert (matmul.library(*inputs.batch(1)).abs() > 1e-6).any()


def judged(family: Family) -> list[StrategyRecord]:
    return run_family(family, Plan(CPU, batch_sizes=(1, 32), hidden=(512,), repeats=2), quiet)


def test_fault_a_strategy_that_says_fixed_and_follows_the_batch() -> None:
    family = matmul.family(CPU, None)
    liar = replace(family.strategies[2], name="liar", run=family.strategies[1].run)
    strategies = judged(replace(family, strategies=(*family.strategies[:2], liar, family.strategies[3])))
    assert strategies[2].order == "fixed"
    assert not strategies[2].batch_invariant
    claim = findings("matmul", strategies)[0]
    assert not claim.held
    assert "liar: 2" in claim.measured


def test_fault_a_strategy_that_differs_from_itself() -> None:
    family = matmul.family(CPU, None)
    calls = iter(range(1000))

    def shaken(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return matmul.fixed_tile(x, w) + next(calls) % 2

    (strategy,) = judged(replace(family, strategies=(replace(family.strategies[3], run=shaken),)))
    assert not strategy.run_to_run
    assert not strategy.batch_invariant
    assert [case.results_of_repeats for case in strategy.cases] == [2, 2]
    assert strategy.cases[0].across_repeats == pytest.approx(1, rel=1e-3)


def test_the_row_is_the_same_in_every_batch_and_its_neighbours_are_others() -> None:
    rows, shared = torch.arange(32.0).view(8, 4), torch.ones(4)
    inputs = Inputs((rows,), (shared,))
    for size in (1, 2, 3, 8):
        batch, weight = inputs.batch(size)
        assert weight is shared
        assert batch[size // 2].tolist() == rows[0].tolist()
        assert len(batch.unique(dim=0)) == size


def test_mixed_magnitudes() -> None:
    magnitudes = mixed(100, 1000, torch.Generator().manual_seed(0)).abs()
    assert 0.10 < (magnitudes > 6).float().mean() < 0.20
    assert 0.25 < (magnitudes < 0.2).float().mean() < 0.40


def test_a_time_is_called_slower_only_beyond_the_noise(record: Callable[[str], Any]) -> None:
    def claim(min_ms: float, median_ms: float) -> bool | None:
        strategies = list(record("attention").strategies)
        strategies[0] = timed(strategies[0], 1.0, 2.0)
        strategies[-1] = timed(strategies[-1], min_ms, median_ms)
        return findings("attention", strategies)[-1].held

    def timed(strategy: StrategyRecord, min_ms: float, median_ms: float) -> StrategyRecord:
        time = strategy.time.model_copy(update={"min_ms": min_ms, "median_ms": median_ms})
        return strategy.model_copy(
            update={"cases": [case.model_copy(update={"time": time}) for case in strategy.cases]}
        )

    assert claim(2.5, 3.0) is True
    assert claim(1.5, 3.0) is None
    assert claim(0.5, 0.9) is False


def test_without_cuda_there_are_no_kernels() -> None:
    assert not has_kernels(CPU)
    assert not has_kernels(torch.device("mps"))
