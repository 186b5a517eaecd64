"""The search for the one element at which top-k and top-p cut a row.

The elements of a row are ordered by value and, where they are equal, by falling id, as integers that are all different.
The search counts elements and adds masses, both integers, which are exact in any order.
"""

import triton
import triton.language as tl

from .fixed_point import mass
from .top_k import _keys

LARGEST_WIDTH = 1 << 24
# Below any element's key.
NO_KEY = tl.constexpr(-(1 << 62))
_BELOW, _ABOVE = tl.constexpr(-(1 << 56)), tl.constexpr(1 << 56)


@triton.jit
def element_key(x, id):
    """An int64 that orders elements; of 56 bits, so that differences of two do not overflow."""
    return (_keys(x, 0) >> 32 << 24) | (0xFFFFFF - id)


@triton.jit
def element_value(key):
    """The value in a key."""
    ordered = (key >> 24).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _row_keys(x_ptr, place, width):
    """Keys of the row's elements; NO_KEY past its end."""
    x = tl.load(x_ptr + place, mask=place < width, other=0.0)
    return tl.where(place < width, element_key(x, place), NO_KEY)


@triton.jit
def _weights(keys, floor, maximum, MASS: tl.constexpr):
    """One for each key or, with MASS, its mass and nothing below ``floor``."""
    if MASS:
        weights = tl.where((keys >= floor) & (keys != NO_KEY), mass(element_value(keys), maximum), 0)
    else:
        weights = (keys != NO_KEY).to(tl.int64)
    return weights


@triton.jit
def total_mass(x_ptr, candidates_ptr, count, floor, maximum, IN_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the keys from ``floor`` on, of the row's elements or of its candidates."""
    masses = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        if IN_ROW:
            keys = _row_keys(x_ptr, place, count)
        else:
            keys = tl.load(candidates_ptr + place, mask=place < count, other=NO_KEY)
        masses += _weights(keys, floor, maximum, True)
    return tl.sum(masses, axis=0)


@triton.jit
def search(candidates_ptr, count, floor, maximum, need, MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """The largest key from which on the candidates weigh ``need`` or more; the smallest of all where they never do."""
    low, high = tl.full([], _BELOW, dtype=tl.int64), tl.full([], _ABOVE, dtype=tl.int64)
    # From `low` on the keys weigh enough, from `high` on they do not.
    while high - low > 1:
        pivots = low + (high - low) * (tl.arange(0, PIVOTS) + 1) // (PIVOTS + 1)
        weights = tl.zeros([PIVOTS, BLOCK], dtype=tl.int64)
        smallest = tl.full([BLOCK], 1 << 62, dtype=tl.int64)
        largest = tl.full([BLOCK], -(1 << 62), dtype=tl.int64)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            keys = tl.load(candidates_ptr + place, mask=place < count, other=NO_KEY)
            weight = _weights(keys, floor, maximum, MASS)
            weights += tl.where(keys[None, :] >= pivots[:, None], weight[None, :], 0)
            between = (keys >= low) & (keys < high)
            smallest = tl.minimum(smallest, tl.where(between, keys, 1 << 62))
            largest = tl.maximum(largest, tl.where(between, keys, -(1 << 62)))
        enough = tl.sum(weights, axis=1) >= need
        # There is nothing to look for outside of the keys that are left.
        new_low = tl.maximum(tl.max(tl.where(enough, pivots, low), axis=0), tl.min(smallest, axis=0))
        high = tl.minimum(tl.min(tl.where(enough, high, pivots), axis=0), tl.max(largest, axis=0) + 1)
        low = new_low
    return low


@triton.jit
def search_row(
    x_ptr, candidates_ptr, width, floor, maximum, need,
    MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr, SAMPLE: tl.constexpr, CAPACITY: tl.constexpr,
    SEARCHED: tl.constexpr,
):  # fmt: skip
    """As ``search`` has it, over all of a row's elements; what ``candidates_ptr`` held is lost.

    Elements of the row, in order, halve what is left as often as needed for the rest to find room there: a few times,
    where steps through the range of keys would take ten and more.
    """
    sample = tl.sort(_row_keys(x_ptr, (tl.arange(0, SAMPLE).to(tl.int64) * width // SAMPLE).to(tl.int32), width))
    low, high = tl.full([], _BELOW, dtype=tl.int64), tl.full([], _ABOVE, dtype=tl.int64)
    # How many keys reach `low` and `high`, and what those that reach `high` weigh.
    reach_low, reach_high, weight_high = width, width * 0, tl.full([], 0, dtype=tl.int64)
    while reach_low - reach_high > CAPACITY:
        order = tl.arange(0, PIVOTS)
        pivots = low + (high - low) * (order + 1) // (PIVOTS + 1)
        between = tl.sum(((sample > low) & (sample < high)).to(tl.int32), axis=0)
        if between >= PIVOTS:
            rank = tl.sum((sample <= low).to(tl.int32), axis=0) + between * (order + 1) // (PIVOTS + 1)
            pivots = tl.sum(tl.where(tl.arange(0, SAMPLE)[None, :] == rank[:, None], sample[None, :], 0), axis=1)
        weights, counts = tl.zeros([PIVOTS, BLOCK], dtype=tl.int64), tl.zeros([PIVOTS, BLOCK], dtype=tl.int32)
        for start in range(0, width, BLOCK):
            keys = _row_keys(x_ptr, start + tl.arange(0, BLOCK), width)
            reaches = keys[None, :] >= pivots[:, None]
            weights += tl.where(reaches, _weights(keys, floor, maximum, MASS)[None, :], 0)
            counts += reaches.to(tl.int32)
        weight, count = tl.sum(weights, axis=1), tl.sum(counts, axis=1)
        enough = weight >= need
        low = tl.max(tl.where(enough, pivots, low), axis=0)
        high = tl.min(tl.where(enough, high, pivots), axis=0)
        reach_low = tl.min(tl.where(enough, count, reach_low), axis=0)
        reach_high = tl.max(tl.where(enough, reach_high, count), axis=0)
        weight_high = tl.max(tl.where(enough, weight_high, weight), axis=0)
    # Every thread has read what candidates there were.
    tl.debug_barrier()
    stored = width * 0
    for start in range(0, width, BLOCK):
        keys = _row_keys(x_ptr, start + tl.arange(0, BLOCK), width)
        taken = ((keys >= low) & (keys < high)).to(tl.int32)
        tl.store(candidates_ptr + stored + tl.cumsum(taken, axis=0) - 1, keys, mask=taken == 1)
        stored += tl.sum(taken, axis=0)
    tl.debug_barrier()
    return search(candidates_ptr, stored, floor, maximum, need - weight_high, MASS, SEARCHED, PIVOTS)


@triton.jit
def needed_mass(p, total):
    """The least mass that is no less than ``p`` of ``total``; at least 1, so that no row is left without an element."""
    exact = p.to(tl.float64) * total.to(tl.float64)
    least = exact.to(tl.int64)
    least = tl.where(least.to(tl.float64) < exact, least + 1, least)
    return tl.maximum(tl.minimum(least, total), 1)


@triton.jit
def cut_candidates(
    candidates_ptr, count, k, p, need, maximum, width: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr
):
    """The smallest key that a draw may take, which is a candidate's.

    ``need`` is the mass that p asks for where k limits nothing.
    """
    cut = tl.full([], NO_KEY, dtype=tl.int64)
    if k < width:
        cut = search(candidates_ptr, count, cut, maximum, k.to(tl.int64), False, BLOCK, PIVOTS)
        need = needed_mass(p, total_mass(candidates_ptr, candidates_ptr, count, cut, maximum, False, BLOCK))
    if p < 1.0:
        found = search(candidates_ptr, count, cut, maximum, need, True, BLOCK, PIVOTS)
        cut = tl.maximum(cut, found)
    return cut


@triton.jit
def cut_row(
    x_ptr, candidates_ptr, k, p, need, maximum, width: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
    SAMPLE: tl.constexpr, CAPACITY: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """The same where the candidates do not suffice; ``candidates_ptr`` is room for others."""
    cut = tl.full([], NO_KEY, dtype=tl.int64)
    if k < width:
        cut = search_row(
            x_ptr, candidates_ptr, width, cut, maximum, k.to(tl.int64), False, BLOCK, PIVOTS, SAMPLE, CAPACITY, SEARCHED
        )
        need = needed_mass(p, total_mass(x_ptr, candidates_ptr, width, cut, maximum, True, BLOCK))
    if p < 1.0:
        found = search_row(
            x_ptr, candidates_ptr, width, cut, maximum, need, True, BLOCK, PIVOTS, SAMPLE, CAPACITY, SEARCHED
        )
        cut = tl.maximum(cut, found)
    return cut
