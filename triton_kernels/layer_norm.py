"""Layer normalization (https://arxiv.org/abs/1607.06450)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import programmatic_launch
from .rows import WIDEST, as_rows, check_floats, check_vector, row_offset, row_tile


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
    column = tl.arange(0, COLUMNS)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if w_ptr is not None:
        w = tl.load(w_ptr + column, mask=column < width, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = (row < num_rows) & (column < width)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(x, axis=1), width * 1.0)[:, None]
    x = tl.where(column < width, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(x * x, axis=1), width * 1.0)[:, None]
    x = x * tl.rsqrt(variance + epsilon)
    if w_ptr is not None:
        x = x * w.to(tl.float32)
    if bias_ptr is not None:
        x = x + bias.to(tl.float32)
    tl.store(out_ptr + row_offset(row, width, width) + column, x.to(out_ptr.dtype.element_ty), mask=inside)


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
    pdl = programmatic_launch(x)
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
        PDL=pdl,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        launch_pdl=pdl,
    )
    return out
