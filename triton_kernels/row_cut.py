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
def load_keys(x_ptr, candidates_ptr, place, count, IN_ROW: tl.constexpr):
    """Keys of the row's elements or, where they suffice, of its candidates; NO_KEY past the end."""
    if IN_ROW:
        x = tl.load(x_ptr + place, mask=place < count, other=0.0)
        keys = tl.where(place < count, element_key(x, place), NO_KEY)
    else:
        keys = tl.load(candidates_ptr + place, mask=place < count, other=NO_KEY)
    return keys


@triton.jit
def total_mass(x_ptr, candidates_ptr, count, floor, maximum, IN_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the keys from ``floor`` on."""
    masses = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, count, BLOCK):
        keys = load_keys(x_ptr, candidates_ptr, start + tl.arange(0, BLOCK), count, IN_ROW)
        counts = (keys >= floor) & (keys != NO_KEY)
        masses += tl.where(counts, mass(element_value(keys), maximum), 0)
    return tl.sum(masses, axis=0)


@triton.jit
def search(
    x_ptr,
    candidates_ptr,
    count,
    floor,
    maximum,
    need,
    MASS: tl.constexpr,
    IN_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The largest key from which on the keys weigh ``need`` or more; the smallest of all where they never do.

    A key weighs one, or with MASS its mass, or nothing if it is below ``floor``.
    """
    low, high = tl.full([], -(1 << 56), dtype=tl.int64), tl.full([], 1 << 56, dtype=tl.int64)
    # From `low` on the keys weigh enough, from `high` on they do not.
    while high - low > 1:
        pivots = low + (high - low) * (tl.arange(0, PIVOTS) + 1) // (PIVOTS + 1)
        weights = tl.zeros([PIVOTS, BLOCK], dtype=tl.int64)
        smallest = tl.full([BLOCK], 1 << 62, dtype=tl.int64)
        largest = tl.full([BLOCK], -(1 << 62), dtype=tl.int64)
        for start in range(0, count, BLOCK):
            keys = load_keys(x_ptr, candidates_ptr, start + tl.arange(0, BLOCK), count, IN_ROW)
            weight = tl.full([BLOCK], 1, dtype=tl.int64)
            if MASS:
                weight = tl.where(keys >= floor, mass(element_value(keys), maximum), 0)
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
def needed_mass(p, total):
    """The least mass that is no less than ``p`` of ``total``; at least 1, so that no row is left without an element."""
    exact = p.to(tl.float64) * total.to(tl.float64)
    least = exact.to(tl.int64)
    least = tl.where(least.to(tl.float64) < exact, least + 1, least)
    return tl.maximum(tl.minimum(least, total), 1)


@triton.jit
def find_cut(
    x_ptr,
    candidates_ptr,
    count,
    k,
    p,
    need,
    maximum,
    width: tl.constexpr,
    IN_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The smallest key that a draw may take; ``need`` is the mass that p asks for where k limits nothing."""
    cut = tl.full([], NO_KEY, dtype=tl.int64)
    if k < width:
        cut = search(x_ptr, candidates_ptr, count, cut, maximum, k.to(tl.int64), False, IN_ROW, BLOCK, PIVOTS)
        need = needed_mass(p, total_mass(x_ptr, candidates_ptr, count, cut, maximum, IN_ROW, BLOCK))
    if p < 1.0:
        found = search(x_ptr, candidates_ptr, count, cut, maximum, need, True, IN_ROW, BLOCK, PIVOTS)
        cut = tl.maximum(cut, found)
    return cut
