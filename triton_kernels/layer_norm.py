"""Layer normalization (https://arxiv.org/abs/1607.06450)."""

import torch
import triton
import triton.language as tl

from .rows import (
    WIDEST,
    as_rows,
    begin,
    check_floats,
    check_vector,
    divide_by_width,
    launch_options,
    row_offset,
    row_tile,
)


@triton.jit(do_not_specialize=["x_stride", "num_rows"])
def _layer_norm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    num_rows,
    epsilon,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    x_row, out_row = row_offset(row, x_stride, width), row_offset(row, width, width)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    chunks = ()
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < num_rows) & (column < width)
        x = tl.load(x_ptr + x_row + column, mask=inside, other=0.0).to(tl.float32)
        total += x
        chunks += (x,)
    mean = divide_by_width(tl.sum(total, axis=1), width)[:, None]
    squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.static_range(0, width, COLUMNS):
        x = tl.where(start + tl.arange(0, COLUMNS)[None, :] < width, chunks[start // COLUMNS] - mean, 0.0)
        squares += x * x
    factor = tl.rsqrt(divide_by_width(tl.sum(squares, axis=1), width) + epsilon)[:, None]
    # Weights are read late: held from the start, they would take the registers of another program. All of them are read
    # before the first store: a load behind a store waits for it.
    outs = ()
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        x = (chunks[start // COLUMNS] - mean) * factor
        if w_ptr is not None:
            x = x * tl.load(w_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x = x + tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        outs += (x.to(out_ptr.dtype.element_ty),)
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        tl.store(out_ptr + out_row + column, outs[start // COLUMNS], mask=(row < num_rows) & (column < width))


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` over the last dimension.

    All in fp32, each operation rounded by itself, with one rounding to ``x.dtype`` at the end. The variance is the mean
    of ``(x - mean)^2``, in a second pass over registers, so a large mean does not cancel it.

    Invariant: a row's sums have an order that follows its length alone.

    Args:
        x: ``[..., H]``, bf16, fp16 or fp32, H up to 32768; rows may be strided.
        weight: ``[H]`` or None for no scale.
        bias: ``[H]`` or None.
        epsilon: added to the variance.

    Returns:
        ``[..., H]`` in ``x.dtype``.

    Raises:
        ValueError: a tensor's device, dtype or shape is none of the above.
    """
    check_floats("x", x)
    width = x.shape[-1]
    if width > WIDEST:
        raise ValueError(f"x has {width} columns; up to {WIDEST} are allowed")
    if weight is not None:
        weight = check_vector("weight", weight, x, width)
    if bias is not None:
        bias = check_vector("bias", bias, x, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return out
    tile = row_tile(width)
    _layer_norm_kernel[(triton.cdiv(num_rows, tile.rows),)](
        rows,
        weight,
        bias,
        out,
        rows.stride(0),
        num_rows,
        epsilon,
        width,
        tile.rows,
        tile.columns,
        **launch_options(x, tile.warps),
    )
    return out
