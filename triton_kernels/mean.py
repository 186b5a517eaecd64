"""Mean over one dimension."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import programmatic_launch
from .rows import as_rows, check_floats, row_offset, row_tile

# Longer rows are walked in steps of this many elements.
_LONGEST = 16384


@triton.jit(do_not_specialize=["x_stride", "num_rows"])
def _mean_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    num_rows,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    x_ptrs = x_ptr + row_offset(row[:, None], x_stride, width) + column
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        inside = (row[:, None] < num_rows) & (start + column < width)
        total += tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, axis=1), width * 1.0)
    tl.store(out_ptr + row, mean.to(out_ptr.dtype.element_ty), mask=row < num_rows)


def mean(x: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    """The mean over one dimension, accumulated in fp32 and rounded once to ``x.dtype``.

    Invariant: a mean's additions have an order that follows the dimension's length alone.

    Args:
        x: bf16, fp16 or fp32, any shape with at least one element along ``dim``; another dimension than the last is
            moved there, which copies.
        dim: the dimension, negative counts from the end.
        keepdim: keep the dimension with length 1.

    Returns:
        ``x.shape`` without ``dim``, in ``x.dtype``.

    Raises:
        ValueError: the device, dtype or shape of ``x`` is none of the above or has no such dimension.
    """
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim is {dim}; x has shape {tuple(x.shape)}")
    last = x.movedim(dim, -1)
    check_floats("x", last)
    width = last.shape[-1]
    out = torch.empty(last.shape[:-1], dtype=x.dtype, device=x.device)
    rows = as_rows(last, width)
    num_rows = rows.shape[0]
    if num_rows:
        tile = row_tile(min(width, _LONGEST))
        pdl = programmatic_launch(x)
        _mean_kernel[(triton.cdiv(num_rows, tile.rows),)](
            rows,
            out,
            rows.stride(0),
            num_rows,
            width,
            tile.rows,
            tile.columns,
            PDL=pdl,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            launch_pdl=pdl,
        )
    return out.unsqueeze(dim) if keepdim else out
