"""Root mean square normalization (https://arxiv.org/abs/1910.07467), alone and with the residual added first."""

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


@triton.jit
def reciprocal_rms(squares, epsilon, width: tl.constexpr):
    """``1 / sqrt(sum(squares) / width + epsilon)`` of each row of an fp32 tile ``[rows, columns]``."""
    return tl.rsqrt(divide_by_width(tl.sum(squares, axis=1), width) + epsilon)[:, None]


@triton.jit
def scale(x, w, weight_offset: tl.constexpr):
    """``x * w`` with ``x`` rounded to ``w.dtype`` first; with an offset ``x * (w + weight_offset)`` in fp32."""
    if weight_offset == 0:
        return (x.to(w.dtype).to(tl.float32) * w.to(tl.float32)).to(w.dtype).to(tl.float32)
    else:
        return x * (w.to(tl.float32) + weight_offset)


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    num_rows,
    epsilon,
    width: tl.constexpr,
    weight_offset: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    x_row, out_row = row_offset(row, x_stride, width), row_offset(row, width, width)
    residual_row = row_offset(row, residual_stride, width)
    squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    chunks, weights = (), ()
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < num_rows) & (column < width)
        x = tl.load(x_ptr + x_row + column, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + residual_row + column, mask=inside, other=0.0).to(tl.float32)
        if w_ptr is not None:
            weights += (tl.load(w_ptr + column, mask=column < width, other=0.0),)
        squares += x * x
        chunks += (x,)
    # After the last load, which would wait for them, and before the sum, which then need not wait.
    if residual_ptr is not None:
        for start in tl.static_range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside = (row < num_rows) & (column < width)
            total = chunks[start // COLUMNS].to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + out_row + column, total, mask=inside)
    factor = reciprocal_rms(squares, epsilon, width)
    for start in tl.static_range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < num_rows) & (column < width)
        x = chunks[start // COLUMNS] * factor
        if w_ptr is not None:
            x = scale(x, weights[start // COLUMNS], weight_offset)
        tl.store(out_ptr + out_row + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, *, weight_offset: float = 0.0
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension.

    The mean and the quotient are fp32. The quotient is rounded to ``weight.dtype`` before the product, as eager does;
    with a ``weight_offset`` the product ``quotient * (weight + weight_offset)`` is fp32 too and rounded once.

    Invariant: a row's sum of squares has an order that follows its length alone.

    Args:
        x: ``[..., H]``, bf16, fp16 or fp32, H up to 32768; rows may be strided.
        weight: ``[H]`` or None for no scale.
        epsilon: added to the mean square.
        weight_offset: added to the weight; 1 for Gemma.

    Returns:
        ``[..., H]`` in ``x.dtype``.

    Raises:
        ValueError: a tensor's device, dtype or shape is none of the above.
    """
    return _normalize(x, None, weight, epsilon, weight_offset)[0]


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual)`` and the sum itself, rounded once to ``x.dtype``.

    The norm reads the fp32 sum before it is rounded, as vLLM's own operation does. Inputs are left as they are.

    Args:
        x: ``[..., H]`` as for ``rms_norm``.
        residual: as ``x`` in shape, dtype and device.
        weight, epsilon, weight_offset: see ``rms_norm``.

    Returns:
        the normalized rows and the new residual, both ``[..., H]`` in ``x.dtype``.

    Raises:
        ValueError: a tensor's device, dtype or shape is none of the above.
    """
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} in {residual.dtype} on {residual.device}; "
            f"x is {tuple(x.shape)} in {x.dtype} on {x.device}"
        )
    return _normalize(x, residual, weight, epsilon, weight_offset)


def _normalize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_floats("x", x)
    width = x.shape[-1]
    if width > WIDEST:
        raise ValueError(f"x has {width} columns; up to {WIDEST} are allowed")
    if weight is not None:
        weight = check_vector("weight", weight, x, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x, width)
    residuals = None if residual is None else as_rows(residual, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return out, total
    tile = row_tile(width)
    _rms_norm_kernel[(triton.cdiv(num_rows, tile.rows),)](
        rows,
        residuals,
        weight,
        out,
        total,
        rows.stride(0),
        0 if residuals is None else residuals.stride(0),
        num_rows,
        epsilon,
        width,
        weight_offset,
        tile.rows,
        tile.columns,
        **launch_options(x, tile.warps),
    )
    return out, total
