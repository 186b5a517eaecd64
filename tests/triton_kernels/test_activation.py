# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.activation import (
    gelu,
    gelu_and_mul,
    gelu_fast,
    gelu_new,
    quick_gelu,
    silu_and_mul,
)

from . import oracles
from .interpreter import INTERPRETED, ROUNDED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED

WIDTHS = (1, 2, 17, 80, 2100)
PLAIN = {
    gelu: lambda x: oracles.gelu(x, "none"),
    gelu_new: lambda x: oracles.gelu(x, "tanh"),
    gelu_fast: lambda x: oracles.gelu(x, "tanh"),
    quick_gelu: lambda x: x.double() * torch.special.expit(1.702 * x.double()),
}
Activation = Callable[[torch.Tensor], torch.Tensor]


def _inputs(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).mul(3).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x = _inputs(19, 2 * width, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert silu_and_mul(x).dtype == dtype
    assert_close(silu_and_mul(x), oracles.silu_and_mul(x))
    assert_close(gelu_and_mul(x), oracles.gelu(gate, "none") * up)
    assert_close(gelu_and_mul(x, "tanh"), oracles.gelu(gate, "tanh") * up)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("activation", PLAIN)
def test_plain_close_to_the_oracle(dtype: torch.dtype, activation: Activation) -> None:
    for width in WIDTHS:
        x = _inputs(5, width, dtype)
        assert_close(activation(x), PLAIN[activation](x))
    assert activation(torch.tensor([0.0, -1e4, 1e4])).tolist() == [0.0, 0.0, 1e4]


def test_silu_is_rounded_before_the_product_as_in_the_reference() -> None:
    x = _inputs(40, 34, torch.float16)
    assert_same_bytes(silu_and_mul(x), reference.silu_and_mul(x), "fp16")


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_keep_their_bytes(dtype: torch.dtype, width: int) -> None:
    x = _inputs(3, 2 * width, dtype)
    for activation in (silu_and_mul, gelu_and_mul, gelu, gelu_new, quick_gelu):
        assert_batch_invariant(activation, x, sizes=(17,))


def test_views_are_rows_too() -> None:
    x = _inputs(6, 42, torch.float32)
    for view in (x[:, 1:41], x[::2], x.view(2, 3, 42), x.t()):
        assert_same_bytes(silu_and_mul(view), silu_and_mul(view.contiguous()), "strided")
        assert_same_bytes(gelu(view), gelu(view.contiguous()), "strided")
    assert silu_and_mul(x[:0]).shape == (0, 21)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\); gate and up"):
        silu_and_mul(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        gelu(torch.zeros(3, 7).double())
    with pytest.raises(ValueError, match="approximate is 'sigmoid'"):
        gelu_and_mul(torch.zeros(3, 8), "sigmoid")


def _tail_by_another_routine(x, FORMULA):  # noqa: N803
    """SiLU by another formula in all programs but the first, as a vector's tail in some libraries."""
    return x / (1.0 + tl.exp(-x)) if tl.program_id(0) == 0 else x * (1.0 / (1.0 + tl.exp(-x)))


def test_fault_a_routine_that_follows_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = InterpretedFunction(_tail_by_another_routine)
    monkeypatch.setattr(sys.modules[silu_and_mul.__module__], "_activate", faulty)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(silu_and_mul, _inputs(4, 256, torch.float32))
