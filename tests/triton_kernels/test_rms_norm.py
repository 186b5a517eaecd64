# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction
from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.rms_norm import fused_add_rms_norm, rms_norm

from . import oracles
from .interpreter import INTERPRETED, ROUNDED, interpreting
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED

WIDTHS = (1, 2, 17, 80, 1024, 1500)
EPSILON = 1e-6


def _inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(rows, width, generator=generator).mul(3).to(dtype) for _ in range(2))
    return x, residual, torch.randn(width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x, residual, weight = _inputs(19, width, dtype)
    for w in (weight, None, weight.float()):
        out = rms_norm(x, w, EPSILON)
        assert out.dtype == dtype
        assert_close(out, oracles.rms_norm(x, w, EPSILON))
    assert_close(rms_norm(x, weight, 10.0), oracles.rms_norm(x, weight, 10.0))
    assert_close(rms_norm(x, weight, EPSILON, weight_offset=1.0), oracles.rms_norm(x, weight.double() + 1, EPSILON))
    out, total = fused_add_rms_norm(x, residual, weight, EPSILON)
    assert_close(out, oracles.rms_norm(x.double() + residual.double(), weight, EPSILON))
    assert_same_bytes(total, (x.float() + residual.float()).to(dtype), "the sum, rounded once")


@pytest.mark.parametrize("width", [1, 2, 17])
def test_rounds_where_the_reference_does(width: int) -> None:
    """fp16 hides the order of a short sum, so the bytes show the rounding points alone."""
    x, residual, weight = _inputs(40, width, torch.float16)
    for w in (weight, None):
        assert_same_bytes(rms_norm(x, w, EPSILON), reference.rms_norm(x, w, EPSILON), "alone")
        expected = reference.fused_add_rms_norm(x, residual, w, EPSILON)
        for actual, wanted in zip(fused_add_rms_norm(x, residual, w, EPSILON), expected, strict=True):
            assert_same_bytes(actual, wanted, "fused")
    once = reference.rms_norm(x.float(), weight.float() + 1, EPSILON).half()
    assert_same_bytes(rms_norm(x, weight, EPSILON, weight_offset=1.0), once, "with an offset")


def test_the_norm_reads_the_sum_before_it_is_rounded() -> None:
    x, residual = torch.tensor([[1.0, 2048.0]]).half(), torch.tensor([[1.0, 1.0]]).half()
    out, total = fused_add_rms_norm(x, residual, None, 0.0)
    assert total.tolist() == [[2.0, 2048.0]]
    assert_same_bytes(out, oracles.rms_norm(torch.tensor([[2.0, 2049.0]]), None, 0.0).half(), "norm of 2 and 2049")


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_keep_their_bytes(dtype: torch.dtype, width: int) -> None:
    x, residual, weight = _inputs(4, width, dtype)
    assert_batch_invariant(lambda x: rms_norm(x, weight, EPSILON), x, sizes=(2, 17, 33))
    assert_batch_invariant(lambda *x: fused_add_rms_norm(*x, weight, EPSILON), x, residual, sizes=(3, 33))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 5), heads=st.integers(1, 3), width=st.integers(1, 40), shift=st.integers(0, 9))
def test_views_are_rows_too(rows: int, heads: int, width: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randn(rows, heads, width + shift, generator=generator).half()
    with interpreting():
        for x in (packed[..., shift:], packed[:, 0, shift:], packed.transpose(0, 1)[..., :width]):
            kept = packed.clone()
            out = rms_norm(x, None, EPSILON)
            assert out.is_contiguous()
            assert_same_bytes(out, rms_norm(x.contiguous(), None, EPSILON), "strided")
            assert_same_bytes(packed, kept, "x is left as it was")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "x is torch.int32; bf16, fp16 or fp32"),
        ({"x": torch.zeros(())}, r"x has shape \(\)"),
        ({"x": torch.zeros(3, 0)}, r"x has shape \(3, 0\)"),
        ({"x": torch.zeros(1, 40000), "residual": torch.zeros(1, 40000)}, "40000 columns; up to 32768"),
        ({"x": torch.zeros(3, 8, device="meta")}, "x is on meta"),
        ({"weight": torch.zeros(7)}, r"weight has shape \(7,\); 8 columns"),
        ({"weight": torch.zeros(1, 8)}, r"weight has shape \(1, 8\)"),
        ({"residual": torch.zeros(2, 8)}, r"residual is \(2, 8\)"),
        ({"residual": torch.zeros(3, 8).half()}, "torch.float16"),
    ],
)
def test_refuses_what_it_cannot_do(changed: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "residual": torch.zeros(3, 8), "weight": torch.zeros(8)} | changed
    if "residual" not in changed:
        with pytest.raises(ValueError, match=message):
            rms_norm(arguments["x"], arguments["weight"], EPSILON)
        arguments["residual"] = torch.zeros_like(arguments["x"])
    with pytest.raises(ValueError, match=message):
        fused_add_rms_norm(**arguments, epsilon=EPSILON)


def _rms_by_batch(squares, epsilon, width):
    """Even and odd columns apart where there is more than one program, as a kernel may that fills a device."""
    if tl.num_programs(0) > 1:
        total = tl.sum(tl.sum(tl.reshape(squares, [squares.shape[0], squares.shape[1] // 2, 2]), axis=1), axis=1)
    else:
        total = tl.sum(squares, axis=1)
    return tl.rsqrt(total / width + epsilon)[:, None]


def test_fault_an_order_that_follows_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[rms_norm.__module__], "reciprocal_rms", InterpretedFunction(_rms_by_batch))
    # Each row of equal elements: every addition errs to the same side, so another order shows.
    x, residual, weight = torch.linspace(0.9, 1.7, 12).unsqueeze(1).repeat(1, 500), torch.ones(12, 500), None
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(lambda x: rms_norm(x, weight, EPSILON), x, sizes=(9,))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(lambda *x: fused_add_rms_norm(*x, weight, EPSILON), x, residual, sizes=(9,))
