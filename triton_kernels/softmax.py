"""Softmax and its logarithm over the last dimension."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import programmatic_launch
from .rows import as_rows, check_floats, row_offset, row_tile

# Longer rows are cut into parts of this many elements, so that even one row of logits keeps the whole device busy.
_PART = 4096
_WARPS = 8


@triton.jit
def _finish(x, maximum, total, LOG: tl.constexpr):
    if LOG:
        return x - maximum - tl.log(total)
    else:
        return tl.div_rn(tl.exp(x - maximum), total)


@triton.jit(do_not_specialize=["x_stride", "num_rows"])
def _softmax_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    num_rows,
    width: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    # Rows past the end read zeros and not -inf, so that no NaN comes up on the way.
    inside = (row < num_rows) & (column < width)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=inside, other=0.0).to(tl.float32)
    maximum = tl.max(tl.where(column < width, x, float("-inf")), axis=1)[:, None]
    total = tl.sum(tl.where(column < width, tl.exp(x - maximum), 0.0), axis=1)[:, None]
    tl.store(out_ptr + row_offset(row, width, width) + column, _finish(x, maximum, total, LOG), mask=inside)


@triton.jit(do_not_specialize=["x_stride"])
def _part_kernel(x_ptr, maximum_ptr, total_ptr, x_stride, width: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts: tl.constexpr = (width + PART - 1) // PART
    column = tl.program_id(0) % parts * PART + tl.arange(0, PART)
    x_row = x_ptr + row_offset(tl.program_id(0) // parts, x_stride, width)
    x = tl.load(x_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, axis=0)
    # A part without a finite element weighs nothing; its maximum must not meet itself in a difference.
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(maximum_ptr + tl.program_id(0), maximum)
    tl.store(total_ptr + tl.program_id(0), tl.sum(tl.exp(x - shift), axis=0))


@triton.jit(do_not_specialize=["x_stride"])
def _fold_kernel(
    x_ptr,
    maximum_ptr,
    total_ptr,
    out_ptr,
    x_stride,
    width: tl.constexpr,
    LOG: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts: tl.constexpr = (width + PART - 1) // PART
    row = tl.program_id(0) // parts
    part = tl.arange(0, PARTS)
    maxima = tl.load(maximum_ptr + row.to(tl.int64) * parts + part, mask=part < parts, other=float("-inf"))
    totals = tl.load(total_ptr + row.to(tl.int64) * parts + part, mask=part < parts, other=0.0)
    maximum = tl.max(maxima, axis=0)
    # Without a finite element the row is NaN in the end, as in torch, and not by way of its parts.
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(totals * tl.exp(maxima - shift), axis=0)
    column = tl.program_id(0) % parts * PART + tl.arange(0, PART)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offset(row, width, width) + column, _finish(x, maximum, total, LOG), mask=column < width)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """``exp(x - max(x)) / sum(exp(x - max(x)))`` in fp32.

    Invariant: a row's sum has an order that follows its length alone. Rows of up to 16384 elements are summed whole,
    longer ones in parts of 4096 whose sums, scaled to the row's maximum, are added in one order.

    Args:
        x: ``[..., V]``, bf16, fp16 or fp32, any V; rows may be strided. Elements may be -inf. A row that holds NaN or
            +inf, or nothing but -inf, comes out as NaN, as in torch.

    Returns:
        ``[..., V]`` fp32.

    Raises:
        ValueError: the device, dtype or shape of ``x`` is none of the above.
    """
    return _launch(x, log=False)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x - max(x) - log(sum(exp(x - max(x))))`` in fp32; the rest as for ``softmax``."""
    return _launch(x, log=True)


def _launch(x: torch.Tensor, log: bool) -> torch.Tensor:
    check_floats("x", x)
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows = as_rows(x, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return out
    pdl = programmatic_launch(x)
    if width <= 4 * _PART:
        tile = row_tile(width)
        _softmax_kernel[(triton.cdiv(num_rows, tile.rows),)](
            rows,
            out,
            rows.stride(0),
            num_rows,
            width,
            log,
            tile.rows,
            tile.columns,
            PDL=pdl,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            launch_pdl=pdl,
        )
        return out
    parts = triton.cdiv(width, _PART)
    maxima, totals = torch.empty((2, num_rows, parts), dtype=torch.float32, device=x.device)
    _part_kernel[(num_rows * parts,)](
        rows,
        maxima,
        totals,
        rows.stride(0),
        width,
        _PART,
        PDL=pdl,
        num_warps=_WARPS,
        enable_fp_fusion=False,
        launch_pdl=pdl,
    )
    _fold_kernel[(num_rows * parts,)](
        rows,
        maxima,
        totals,
        out,
        rows.stride(0),
        width,
        log,
        _PART,
        triton.next_power_of_2(parts),
        PDL=pdl,
        num_warps=_WARPS,
        enable_fp_fusion=False,
        launch_pdl=pdl,
    )
    return out
