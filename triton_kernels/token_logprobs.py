"""Log-probabilities of a few ids in each row, without those of all the others."""

import torch
import triton
import triton.language as tl

from .fixed_point import UNIT, fold_masses, mass
from .rows import begin, check_floats, launch_options, part_of_row

# Elements that one program sums up.
_PART = 4096
_WARPS = 8


@triton.jit(do_not_specialize=["x_stride"])
def _part_mass_kernel(
    x_ptr, maximum_ptr, mass_ptr, x_stride, width: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row, _, column = part_of_row(width, PART)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, axis=0)
    total = tl.sum(mass(x, maximum), axis=0)
    broken = tl.sum(((x != x) | (x == float("inf"))).to(tl.int32), axis=0)
    tl.store(maximum_ptr + tl.program_id(0), maximum)
    # No sum is negative: this one says that the row has none.
    tl.store(mass_ptr + tl.program_id(0), tl.where(broken > 0, -1, total))


@triton.jit(do_not_specialize=["x_stride", "ids_stride", "count"])
def _logprob_kernel(
    x_ptr,
    ids_ptr,
    maximum_ptr,
    mass_ptr,
    out_ptr,
    x_stride,
    ids_stride,
    count,
    width: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row, _, column = part_of_row(count, IDS)
    row = row.to(tl.int64)
    parts, each = tl.cdiv(width, PART), tl.arange(0, PARTS)
    maxima = tl.load(maximum_ptr + row * parts + each, mask=each < parts, other=float("-inf"))
    masses = tl.load(mass_ptr + row * parts + each, mask=each < parts, other=0)
    maximum = tl.max(maxima, axis=0)
    total = fold_masses(maximum, maxima, masses).to(tl.float32) * UNIT
    total = tl.where(tl.min(masses, axis=0) < 0, float("nan"), total)
    ids = tl.load(ids_ptr + row * ids_stride + column, mask=column < count, other=0)
    x = tl.load(x_ptr + row * x_stride + ids, mask=column < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * count + column, x - maximum - tl.log(total), mask=column < count)


def token_logprobs(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``x - max(x) - log(sum(exp(x - max(x))))`` in fp32, at the given ids.

    Invariant: terms of the sum are rounded to multiples of 2**-40 one by one and added as integers, so neither other
    rows nor the dtype enter: rows of equal values have equal bytes in bf16 and fp32.

    Args:
        x: ``[R, V]``, bf16, fp16 or fp32; rows may be strided. Elements may be -inf. A row that holds NaN or +inf, or
            nothing but -inf, comes out as NaN.
        ids: ``[R, N]`` int64, each from 0 to V - 1; rows may be strided.

    Returns:
        ``[R, N]`` fp32.

    Raises:
        ValueError: the device, dtype or shape of ``x`` or ``ids`` is none of the above.
    """
    check_floats("x", x)
    if x.dim() != 2 or ids.dim() != 2 or len(ids) != len(x) or ids.dtype != torch.int64 or ids.device != x.device:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and ids {tuple(ids.shape)} in {ids.dtype} on {ids.device}; "
            f"[R, V] and [R, N] in int64 on {x.device} are needed"
        )
    width, count = x.shape[-1], ids.shape[-1]
    out = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    x, ids = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, ids))
    parts = triton.cdiv(width, _PART)
    maxima = torch.empty((len(x), parts), dtype=torch.float32, device=x.device)
    masses = torch.empty((len(x), parts), dtype=torch.int64, device=x.device)
    _part_mass_kernel[(len(x) * parts,)](
        x,
        maxima,
        masses,
        x.stride(0),
        width,
        _PART,
        **launch_options(x, _WARPS),
    )
    block = 32 if count <= 32 else 1024
    _logprob_kernel[(len(x) * triton.cdiv(count, block),)](
        x,
        ids,
        maxima,
        masses,
        out,
        x.stride(0),
        ids.stride(0),
        count,
        width,
        _PART,
        triton.next_power_of_2(parts),
        block,
        **launch_options(x, 4),
    )
    return out
