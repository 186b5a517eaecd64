"""Top-k and top-p: what of each row of logits a draw may take, each row with its own k and p.

A row is cut at one element, see ``row_cut.py``.
"""

import torch
import triton
import triton.language as tl

from .fixed_point import fold_masses, mass
from .row_cut import LARGEST_WIDTH, NO_KEY, cut_candidates, cut_row, element_key, needed_mass, total_mass
from .rows import begin, check_floats, launch_options, part_of_row

# Elements that one program looks through.
_PART = 4096
# Candidates of a row that the search keeps apart; where the cut lies outside of them, it looks through the row itself.
_CAPACITY = 8192
# Of these, how many it looks through at a time, and elements of the row that halve it.
_SEARCHED, _SAMPLE = 2048, 1024
# What is looked at to guess a bound that few hundred elements reach: runs of neighbours, spread over the row.
_RUNS, _RUN = 512, 32
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_WARPS = 8


@triton.jit(do_not_specialize=["x_stride"])
def _guess_kernel(
    x_ptr,
    k_ptr,
    p_ptr,
    bound_ptr,
    count_ptr,
    x_stride,
    width: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    SAMPLE: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    """A bound that the wanted elements of the row reach, most likely. Nothing but time depends on it."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(k_ptr + row)
    if (k < width) | (tl.load(p_ptr + row) < 1.0):
        run = tl.arange(0, RUNS)[:, None] * (width // RUN) // RUNS * RUN
        column = run + tl.arange(0, RUN)[None, :]
        x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        maxima = tl.max(x, axis=1)
        wanted = tl.where(k < width, 2 * tl.minimum(k, 4096) + 100, 600)
        rank = wanted * SAMPLE // width
        rank = tl.minimum(tl.maximum(rank, 8), RUNS * 3 // 4)
        finite = maxima > float("-inf")
        high = tl.max(maxima, axis=0)
        low = tl.min(tl.where(finite, maxima, high), axis=0)
        # There is room for all, or few runs are finite, as where a grammar allows little: all finite elements.
        few = (width <= CAPACITY) | (tl.sum(finite.to(tl.int32), axis=0) < rank)
        for _ in range(12):
            middle = low + (high - low) * 0.5
            enough = tl.sum((maxima >= middle).to(tl.int32), axis=0) >= rank
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        tl.store(bound_ptr + row, tl.where(few, _LOWEST, low))
        tl.store(count_ptr + row, 0)


@triton.jit(do_not_specialize=["x_stride"])
def _candidates_kernel(
    x_ptr,
    k_ptr,
    p_ptr,
    bound_ptr,
    count_ptr,
    candidates_ptr,
    maximum_ptr,
    mass_ptr,
    x_stride,
    width: tl.constexpr,
    PART: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    """The keys of the elements that reach the bound, in any order, and each part's maximum and mass."""
    begin(PDL)
    row, _, column = part_of_row(width, PART)
    row = row.to(tl.int64)
    k = tl.load(k_ptr + row)
    if (k < width) | (tl.load(p_ptr + row) < 1.0):
        x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        maximum = tl.max(x, axis=0)
        tl.store(maximum_ptr + tl.program_id(0), maximum)
        if k >= width:
            tl.store(mass_ptr + tl.program_id(0), tl.sum(mass(x, maximum), axis=0))
        reaches = ((x >= tl.load(bound_ptr + row)) & (column < width)).to(tl.int32)
        start = tl.atomic_add(count_ptr + row, tl.sum(reaches, axis=0), sem="relaxed")
        place = start + tl.cumsum(reaches, axis=0) - 1
        stored = (reaches == 1) & (place < CAPACITY)
        tl.store(candidates_ptr + row * CAPACITY + place, element_key(x, column), mask=stored)


@triton.jit(do_not_specialize=["x_stride"])
def _cut_kernel(
    x_ptr,
    k_ptr,
    p_ptr,
    bound_ptr,
    count_ptr,
    candidates_ptr,
    maximum_ptr,
    mass_ptr,
    cut_ptr,
    x_stride,
    width: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SEARCHED: tl.constexpr,
    SAMPLE: tl.constexpr,
    PIVOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    k, p = tl.load(k_ptr + row), tl.load(p_ptr + row)
    cut = tl.full([], NO_KEY, dtype=tl.int64)
    if (k < width) | (p < 1.0):
        parts, each = tl.cdiv(width, PART), tl.arange(0, PARTS)
        maxima = tl.load(maximum_ptr + row * parts + each, mask=each < parts, other=float("-inf"))
        maximum = tl.max(maxima, axis=0)
        x_row, candidates_row = x_ptr + row * x_stride, candidates_ptr + row * CAPACITY
        count = tl.load(count_ptr + row)
        need = tl.full([], 1, dtype=tl.int64)
        enough = count >= k
        if k >= width:
            masses = tl.load(mass_ptr + row * parts + each, mask=each < parts, other=0)
            need = needed_mass(p, fold_masses(maximum, maxima, masses))
            among = tl.minimum(count, CAPACITY)
            enough = total_mass(x_row, candidates_row, among, cut, maximum, False, SEARCHED) >= need
        # Where all finite elements are candidates, nothing is left to look for in the row.
        enough = enough | (tl.load(bound_ptr + row) == _LOWEST)
        if width <= CAPACITY:
            # Then they always are; for such rows the compiler fails on the other road.
            cut = cut_candidates(candidates_row, count, k, p, need, maximum, width, SEARCHED, PIVOTS)
        elif enough & (count <= CAPACITY):
            cut = cut_candidates(candidates_row, count, k, p, need, maximum, width, SEARCHED, PIVOTS)
        else:
            cut = cut_row(x_row, candidates_row, k, p, need, maximum, width, PART, PIVOTS, SAMPLE, CAPACITY, SEARCHED)
    tl.store(cut_ptr + row, cut)


@triton.jit(do_not_specialize=["x_stride"])
def _mask_kernel(x_ptr, cut_ptr, x_stride, width: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row, _, column = part_of_row(width, PART)
    row = row.to(tl.int64)
    cut = tl.load(cut_ptr + row)
    if cut != NO_KEY:
        x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0)
        below = element_key(x, column) < cut
        tl.store(x_ptr + row * x_stride + column, float("-inf"), mask=(column < width) & below)


def top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Logits outside the top-k and outside the nucleus of mass ``p`` become -inf, in place.

    Candidates stand in descending order, ties by ascending id. The nucleus keeps every candidate before which less than
    ``p`` of the mass of the top-k lies, so always the first. Masses are multiples of 2**-40 of the largest.

    Invariant: a row is cut at one element, which its own values, k and p decide. Only integers are added up, so the
    order in which programs come does not enter.

    Args:
        logits: ``[B, V]`` fp32, V at most 2**24; rows may be strided, their elements may not. NaN is kept.
        k: ``[B]`` int32, V or more for no limit; or None.
        p: ``[B]`` fp32, 1 for no limit; or None.

    Returns:
        ``logits``.

    Raises:
        ValueError: the device, dtype, shape or strides of an argument are none of the above.
    """
    if k is None and p is None:
        return logits
    check_floats("logits", logits)
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(-1) != 1:
        raise ValueError(
            f"logits is {logits.dtype} of shape {tuple(logits.shape)} and strides {logits.stride()}; "
            "fp32 of [B, V] with elements side by side is needed"
        )
    num_rows, width = logits.shape
    if width > LARGEST_WIDTH:
        raise ValueError(f"logits has rows of {width}; at most {LARGEST_WIDTH} is allowed")
    # One compiled kernel, whether or not a neighbour asks for either.
    k = _limits("k", k, width, torch.int32, logits)
    p = _limits("p", p, 1.0, torch.float32, logits)
    if num_rows == 0:
        return logits
    parts = triton.cdiv(width, _PART)
    bounds, counts = torch.empty_like(p), torch.empty_like(k)
    maxima = torch.empty((num_rows, parts), dtype=torch.float32, device=logits.device)
    masses, candidates, cuts = (
        torch.empty((num_rows, count), dtype=torch.int64, device=logits.device) for count in (parts, _CAPACITY, 1)
    )
    options = launch_options(logits, _WARPS)
    stride = logits.stride(0)
    _guess_kernel[(num_rows,)](
        logits,
        k,
        p,
        bounds,
        counts,
        stride,
        width,
        _RUNS,
        _RUN,
        min(width, _RUNS * _RUN),
        _CAPACITY,
        **options,
    )
    _candidates_kernel[(num_rows * parts,)](
        logits,
        k,
        p,
        bounds,
        counts,
        candidates,
        maxima,
        masses,
        stride,
        width,
        _PART,
        _CAPACITY,
        **options,
    )
    _cut_kernel[(num_rows,)](
        logits,
        k,
        p,
        bounds,
        counts,
        candidates,
        maxima,
        masses,
        cuts,
        stride,
        width,
        _PART,
        triton.next_power_of_2(parts),
        _CAPACITY,
        _SEARCHED,
        _SAMPLE,
        4,
        **launch_options(logits, 16),
    )
    _mask_kernel[(num_rows * parts,)](logits, cuts, stride, width, _PART, **options)
    return logits


def _limits(
    name: str, given: torch.Tensor | None, none: float, dtype: torch.dtype, logits: torch.Tensor
) -> torch.Tensor:
    if given is None:
        return torch.full((len(logits),), none, dtype=dtype, device=logits.device)
    if given.shape != logits.shape[:1] or given.dtype != dtype or given.device != logits.device:
        raise ValueError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}; "
            f"{dtype} of [{len(logits)}] on {logits.device} is needed"
        )
    return given.contiguous()
