# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.reference import silu_and_mul

from .. import oracles
from ..invariance import assert_batch_invariant, assert_same_bytes
from ..oracles import DTYPES, assert_close

WIDTHS = (1, 3, 7, 17, 31, 100, 1023)


def _rows(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, 2 * width, generator=torch.Generator().manual_seed(width)).mul(4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x = _rows(6, width, dtype)
    kept = x.clone()
    out = silu_and_mul(x)
    assert (out.shape, out.dtype) == ((6, width), dtype)
    assert_close(out, oracles.silu_and_mul(x))
    assert_same_bytes(x, kept, "x is left as it was")
    assert_same_bytes(silu_and_mul(x.view(2, 3, -1)).view(6, width), out, "three dimensions")


def test_far_from_zero() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 88.0, 1e4, math.inf])
    out = silu_and_mul(torch.cat([gate, torch.ones(6)]))
    assert_close(out, oracles.silu_and_mul(torch.cat([gate, torch.ones(6)])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_the_silu_before_the_product(dtype: torch.dtype) -> None:
    x = _rows(50, 33, dtype)
    silu = oracles.silu_and_mul(torch.cat([x[:, :33], torch.ones(50, 33)], dim=-1)).to(dtype)
    rounded_twice = silu * x[:, 33:]
    # The oracle's own rounding may fall to the other side of a tie that fp32 cannot tell.
    assert (silu_and_mul(x) == rounded_twice).float().mean() > (0.5 if dtype == torch.float32 else 0.999)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_keep_their_bytes(dtype: torch.dtype, width: int, threads: int) -> None:
    assert_batch_invariant(silu_and_mul, _rows(6, width, dtype))


def _silu_with_another_tail(x: torch.Tensor) -> torch.Tensor:
    """Whole vectors of 16 elements by a quotient, what is left by a product: as vectorized code with a scalar tail."""
    gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
    flat = gate.flatten()
    body = len(flat) // 16 * 16
    denominator = torch.exp(-flat).add_(1)
    silu = torch.cat([flat[:body] / denominator[:body], flat[body:] * denominator[body:].reciprocal()])
    return silu.view(gate.shape) * up


@pytest.mark.parametrize("width", [7, 33, 1023])
def test_fault_a_vectors_tail_takes_another_routine(width: int) -> None:
    assert_close(
        _silu_with_another_tail(_rows(6, width, torch.float32)), oracles.silu_and_mul(_rows(6, width, torch.float32))
    )
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(_silu_with_another_tail, _rows(6, width, torch.float32))
