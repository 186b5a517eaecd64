"""Soft-capping of logits, as in Gemma 2 (https://arxiv.org/abs/2408.00118)."""

import torch
import triton
import triton.language as tl

from .rows import as_rows, begin, check_floats, launch_options, row_offset

_COLUMNS = 2048
_WARPS = 4


@triton.jit
def _tanh(x):
    """Of an fp32 tile; near zero by its series, where ``1 - exp(-2 x)`` cancels."""
    size = tl.abs(x)
    square = x * x
    near = square * (-17.0 / 315 + square * (62.0 / 2835))
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + near)))
    power = tl.exp(-2.0 * size)
    far = tl.div_rn(1.0 - power, 1.0 + power)
    return tl.where(size < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit(do_not_specialize=["x_stride"])
def _soft_cap_kernel(x_ptr, out_ptr, x_stride, cap, width: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    parts: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=column < width, other=0.0).to(tl.float32)
    capped = cap * _tanh(tl.div_rn(x, cap))
    tl.store(out_ptr + row_offset(row, width, width) + column, capped.to(out_ptr.dtype.element_ty), mask=column < width)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(x / cap)`` in fp32, rounded once to ``x.dtype``.

    Invariant: every element is computed by the same instructions, wherever it lies.

    Args:
        x: ``[..., V]``, bf16, fp16 or fp32; rows may be strided.
        cap: positive.

    Returns:
        ``[..., V]`` in ``x.dtype``.

    Raises:
        ValueError: an argument is none of the above.
    """
    check_floats("x", x)
    if not cap > 0:
        raise ValueError(f"cap is {cap}; a positive number is needed")
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x, width)
    if len(rows) == 0:
        return out
    _soft_cap_kernel[(len(rows) * triton.cdiv(width, _COLUMNS),)](
        rows, out, rows.stride(0), float(cap), width, _COLUMNS, **launch_options(x, _WARPS)
    )
    return out
