# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction
from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.top_k import top_k

from . import oracles
from .interpreter import INTERPRETED, interpreting
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import DTYPES

pytestmark = INTERPRETED


@settings(max_examples=40, deadline=None)
@given(
    x=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan]), min_size=1, max_size=40),
    k=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_the_oracle(x: list[float], k: int, dtype: torch.dtype) -> None:
    row = torch.tensor([x]).to(dtype)
    with interpreting():
        values, ids = top_k(row, min(k, len(x)))
    assert ids.tolist() == [oracles.top_k(x, k)]
    assert_same_bytes(values, row.gather(-1, ids), "values, byte for byte")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(300, 1), (300, 20), (5000, 7), (5000, 1000)])
def test_selects_in_rounds(dtype: torch.dtype, width: int, k: int) -> None:
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(k)).to(dtype)
    values, ids = top_k(x, k)
    expected, ordered = torch.sort(x, dim=-1, descending=True, stable=True)
    assert_same_bytes(ids, ordered[:, :k], "ids")
    assert_same_bytes(values, expected[:, :k], "values")
    if dtype == torch.float32:
        assert_same_bytes(ids, reference.top_logprobs(x, k)[1], "ids of the reference")


@pytest.mark.parametrize("k", [1, 7])
def test_rows_keep_their_bytes(k: int) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    assert_batch_invariant(lambda x: top_k(x, k), x, sizes=(2, 9))


def test_a_larger_k_only_adds() -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    longest = top_k(x, 200)[1]
    for k in (1, 2, 31):
        assert_same_bytes(top_k(x, k)[1], longest[:, :k].contiguous(), f"k = {k}")


def test_views_are_rows_too() -> None:
    x = torch.randn(6, 41, generator=torch.Generator().manual_seed(0))
    for view in (x[:, 1:], x[::2], x.view(2, 3, 41)):
        assert_same_bytes(top_k(view, 5)[1], top_k(view.contiguous(), 5)[1], "strided")
    assert top_k(x[:0], 3)[0].shape == (0, 3)


@pytest.mark.parametrize(("width", "k", "allowed"), [(8, 0, 8), (8, 9, 8), (2000, 1025, 1024)])
def test_refuses_a_k_out_of_range(width: int, k: int, allowed: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; 1 to {allowed}"):
        top_k(torch.zeros(1, width), k)


def test_ties_across_parts_go_to_the_lowest_ids() -> None:
    x = torch.zeros(2, 9000)
    x[0, [4095, 4096, 8999]] = 1.0
    assert top_k(x, 5)[1].tolist() == [[4095, 4096, 8999, 0, 1], [0, 1, 2, 3, 4]]


def _last_of_equals(values, K):  # noqa: N803
    largest = values == tl.max(values, axis=0)
    last = tl.max(tl.where(largest, tl.arange(0, values.shape[0]), -1), axis=0)
    return tl.where(tl.arange(0, values.shape[0]) == last, 0, K)


def test_fault_ties_by_the_highest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[top_k.__module__], "_slots", InterpretedFunction(_last_of_equals))
    # More than the last program takes, so that there is a selection.
    x = torch.zeros(1, 2000)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bytes(top_k(x, 1)[1], torch.tensor([oracles.top_k(x[0].tolist(), 1)]), "ids")
