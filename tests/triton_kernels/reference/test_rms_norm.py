# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import itertools
import sys

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.reference import fused_add_rms_norm, rms_norm

from .. import oracles
from ..faults import row_sum_by_batch
from ..invariance import assert_batch_invariant, assert_same_bytes
from ..oracles import DTYPES, assert_close

WIDTHS = (1, 17, 80, 1024, 4095)
EPSILON = 1e-6


def _inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(rows, width, generator=generator).mul(3).to(dtype) for _ in range(2))
    return x, residual, torch.randn(width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x, _, weight = _inputs(7, width, dtype)
    for scale in (weight, None, weight.float()):
        out = rms_norm(x, scale, EPSILON)
        assert out.dtype == dtype
        assert_close(out, oracles.rms_norm(x, scale, EPSILON))
    large_epsilon = rms_norm(x, weight, 10.0)
    assert_close(large_epsilon, oracles.rms_norm(x, weight, 10.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_fused_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x, residual, weight = _inputs(7, width, dtype)
    kept = x.clone(), residual.clone()
    out, total = fused_add_rms_norm(x, residual, weight, EPSILON)
    assert_close(out, oracles.rms_norm(x.double() + residual.double(), weight, EPSILON))
    assert_same_bytes(total, (x.float() + residual.float()).to(dtype), "the sum, rounded once")
    assert_same_bytes(x, kept[0], "x is left as it was")
    assert_same_bytes(residual, kept[1], "residual is left as it was")


def test_the_norm_reads_the_sum_before_it_is_rounded() -> None:
    x, residual = torch.tensor([[1.0, 256.0]]).bfloat16(), torch.tensor([[1.0, 1.0]]).bfloat16()
    out, total = fused_add_rms_norm(x, residual, None, 0.0)
    assert total.tolist() == [[2.0, 256.0]]
    assert_same_bytes(out, oracles.rms_norm(torch.tensor([[2.0, 257.0]]), None, 0.0).bfloat16(), "norm of 2 and 257")


def test_a_row_of_zeros_stays_zero() -> None:
    assert_same_bytes(rms_norm(torch.zeros(2, 8), None, EPSILON), torch.zeros(2, 8), "zeros")


@pytest.mark.parametrize(("width", "dtype"), [*itertools.product(WIDTHS, DTYPES), (40000, torch.float32)])
def test_rows_keep_their_bytes(width: int, dtype: torch.dtype, threads: int) -> None:
    x, residual, weight = _inputs(5, width, dtype)
    assert_batch_invariant(lambda x: rms_norm(x, weight, EPSILON), x)
    assert_batch_invariant(lambda x, residual: fused_add_rms_norm(x, residual, weight, EPSILON), x, residual)


def test_heads_are_rows(threads: int) -> None:
    x, _, weight = _inputs(24, 80, torch.bfloat16)
    expected = rms_norm(x, weight, EPSILON)
    assert_same_bytes(rms_norm(x.view(6, 4, 80), weight, EPSILON).view(24, 80), expected, "four heads a token")
    assert_batch_invariant(lambda x: rms_norm(x, weight, EPSILON), x.view(6, 4, 80))


def test_fault_chunks_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[rms_norm.__module__], "row_sum", row_sum_by_batch)
    # Equal elements: every addition to a partial sum errs to the same side, so the number of partial sums shows.
    x, residual, weight = torch.linspace(0.9, 1.7, 5).unsqueeze(1).repeat(1, 4095), torch.ones(5, 4095), None
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(lambda x: rms_norm(x, weight, EPSILON), x)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(lambda x, residual: fused_add_rms_norm(x, residual, weight, EPSILON), x, residual)
