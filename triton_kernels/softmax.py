"""Softmax and its logarithm over the last dimension."""

import torch
import triton
import triton.language as tl

from .rows import as_rows, begin, check_floats, launch_options, part_of_row, row_offset, row_tile

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
    begin(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    x_row, out_row = row_offset(row, x_stride, width), row_offset(row, width, width)
    maxima = tl.full([ROWS, COLUMNS], float("-inf"), dtype=tl.float32)
    chunks = ()
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        # Rows past the end read zeros and not -inf, so that no NaN comes up on the way.
        x = tl.load(x_ptr + x_row + column, mask=(row < num_rows) & (column < width), other=0.0).to(tl.float32)
        x = tl.where(column < width, x, float("-inf"))
        maxima = tl.maximum(maxima, x)
        chunks += (x,)
    maximum = tl.max(maxima, axis=1)[:, None]
    totals = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.static_range(0, width, COLUMNS):
        totals += tl.exp(chunks[start // COLUMNS] - maximum)
    total = tl.sum(totals, axis=1)[:, None]
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        out = _finish(chunks[start // COLUMNS], maximum, total, LOG)
        tl.store(out_ptr + out_row + column, out, mask=(row < num_rows) & (column < width))


@triton.jit(do_not_specialize=["x_stride"])
def _part_kernel(x_ptr, maximum_ptr, total_ptr, x_stride, width: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row, _, column = part_of_row(width, PART)
    x_ptrs = x_ptr + row_offset(row, x_stride, width) + column
    x = tl.load(x_ptrs, mask=column < width, other=float("-inf")).to(tl.float32)
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
    begin(PDL)
    row, _, column = part_of_row(width, PART)
    parts, each = tl.cdiv(width, PART), tl.arange(0, PARTS)
    maxima = tl.load(maximum_ptr + row.to(tl.int64) * parts + each, mask=each < parts, other=float("-inf"))
    totals = tl.load(total_ptr + row.to(tl.int64) * parts + each, mask=each < parts, other=0.0)
    maximum = tl.max(maxima, axis=0)
    # Without a finite element the row is NaN in the end, as in torch, and not by way of its parts.
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(totals * tl.exp(maxima - shift), axis=0)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offset(row, width, width) + column, _finish(x, maximum, total, LOG), mask=column < width)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """``exp(x - max(x)) / sum(exp(x - max(x)))`` in fp32.

    Invariant: a row's sum has an order that follows its length alone. Rows of up to 16384 elements are summed by one
    program, longer ones in parts of 4096 whose sums, scaled to the row's maximum, are added in one order.

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
            **launch_options(x, tile.warps),
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
        **launch_options(x, _WARPS),
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
        **launch_options(x, _WARPS),
    )
    return out
