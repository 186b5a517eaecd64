"""Mean over one dimension."""

import torch
import triton
import triton.language as tl

from .rows import as_rows, begin, check_floats, divide_by_width, launch_options, row_offset, row_tile


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
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    x_ptrs = x_ptr + row_offset(row[:, None], x_stride, width) + column
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    # Eight loads are under way at a time.
    for start in tl.range(0, width, COLUMNS, loop_unroll_factor=8):
        inside = (row[:, None] < num_rows) & (start + column < width)
        total += tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
    mean = divide_by_width(tl.sum(total, axis=1), width)
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
        tile = row_tile(width)
        _mean_kernel[(triton.cdiv(num_rows, tile.rows),)](
            rows,
            out,
            rows.stride(0),
            num_rows,
            width,
            tile.rows,
            tile.columns,
            **launch_options(x, tile.warps),
        )
    return out.unsqueeze(dim) if keepdim else out
