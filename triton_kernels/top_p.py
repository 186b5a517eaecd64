"""Cumulative sums of probabilities: what a top-p cut compares with p."""

import torch
import triton
import triton.language as tl

from .rows import as_rows, begin, check_floats, launch_options, part_of_row, row_offset

# Elements that one program sums up.
_PART = 4096
_WARPS = 8


@triton.jit(do_not_specialize=["x_stride"])
def _part_mass_kernel(x_ptr, total_ptr, x_stride, width: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row, _, column = part_of_row(width, PART)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(total_ptr + tl.program_id(0), tl.sum(x, axis=0))


@triton.jit(do_not_specialize=["x_stride"])
def _top_p_mass_kernel(
    x_ptr,
    total_ptr,
    out_ptr,
    x_stride,
    width: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row, part, column = part_of_row(width, PART)
    parts, each = tl.cdiv(width, PART), tl.arange(0, PARTS)
    totals = tl.load(total_ptr + row.to(tl.int64) * parts + each, mask=each < parts, other=0.0)
    # Each program sums all parts up and takes the one sum that it needs: zeros but for that, so no order enters.
    before = tl.sum(tl.where(each == part - 1, tl.cumsum(totals, axis=0), 0.0), axis=0)
    x = tl.load(x_ptr + row_offset(row, x_stride, width) + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offset(row, width, width) + column, before + tl.cumsum(x, axis=0), mask=column < width)


def top_p_mass(probs: torch.Tensor) -> torch.Tensor:
    """Inclusive cumulative sums of each row in fp32: what lies up to and with each candidate.

    Invariant: the additions of a row have an order that follows its length alone: sums within parts of 4096 elements,
    and the sum of the parts before. They are not one chain, so a sum may fall short of the one before by a rounding.

    Args:
        probs: ``[..., V]``, bf16, fp16 or fp32, any V, candidates in the order of the cut; rows may be strided.

    Returns:
        ``[..., V]`` fp32.

    Raises:
        ValueError: the device, dtype or shape of ``probs`` is none of the above.
    """
    check_floats("probs", probs)
    width = probs.shape[-1]
    out = torch.empty(probs.shape, dtype=torch.float32, device=probs.device)
    rows = as_rows(probs, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return out
    part = min(triton.next_power_of_2(width), _PART)
    parts = triton.cdiv(width, part)
    totals = torch.empty((num_rows, parts), dtype=torch.float32, device=probs.device)
    _part_mass_kernel[(num_rows * parts,)](
        rows,
        totals,
        rows.stride(0),
        width,
        part,
        **launch_options(probs, _WARPS),
    )
    _top_p_mass_kernel[(num_rows * parts,)](
        rows,
        totals,
        out,
        rows.stride(0),
        width,
        part,
        triton.next_power_of_2(parts),
        **launch_options(probs, _WARPS),
    )
    return out
