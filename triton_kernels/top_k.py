"""The largest elements of each row in order, ties by ascending id."""

import torch
import triton
import triton.language as tl

from .rows import as_rows, begin, check_floats, launch_options, part_of_row

LARGEST_K = 1024
# Keys that one program selects from. The last program takes all keys that are left, so it orders up to LARGEST_K.
_PART = 4096
_WARPS = 8
_ORDERED = 64
# The key of no element: its value, the upper half, is below that of any float.
_NO_KEY = tl.constexpr(-(1 << 63))
_LARGEST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys(x, id):
    """One int64 for each element, in the order of values and, where they are equal, of falling ids; none are equal.

    -0 equals 0, and NaN is larger than any number, as torch has it.
    """
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    bits = tl.where(x != x, 0x7FFFFFFF, x.to(tl.int32, bitcast=True))
    # Negative floats count down in their bits: flip them so that integer order is float order.
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (value.to(tl.int64) << 32) | (_LARGEST_ID - id)


@triton.jit
def _slots(values, K: tl.constexpr):
    """A place below K for each of the K largest int32 ``values``, of equals the first, in their order; K for others."""
    # The largest bound that K values reach, bit by bit until no more than they do: mostly after a few bits.
    bound = tl.full([], -(1 << 31), dtype=tl.int32)
    reaching = tl.full([], values.shape[0], dtype=tl.int32)
    bit = tl.full([], 1 << 31, dtype=tl.uint32)
    while (bit != 0) & (reaching > K):
        raised = bound ^ bit.to(tl.int32, bitcast=True)
        reached = tl.sum((values >= raised).to(tl.int32), axis=0)
        bound = tl.where(reached >= K, raised, bound)
        reaching = tl.where(reached >= K, reached, reaching)
        bit = bit >> 1
    above, equal = (values > bound).to(tl.int32), (values == bound).to(tl.int32)
    # Both counts in one scan: neither needs more than 16 bits.
    counts = tl.cumsum((equal << 16) + above, axis=0)
    above_so_far, equal_so_far = counts & 0xFFFF, counts >> 16
    wanted = K - tl.sum(above, axis=0)
    slot = above_so_far + tl.minimum(equal_so_far, wanted) - 1
    return tl.where((above == 1) | ((equal == 1) & (equal_so_far <= wanted)), slot, K)


@triton.jit
def _select_kernel(
    x_ptr,
    keys_ptr,
    out_ptr,
    x_stride,
    count,
    K: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """The K largest keys of a part, or of ``x`` where there are no keys yet, filled up with _NO_KEY.

    They stay in the order of their ids: of equal values the first is the one with the lowest.
    """
    begin(PDL)
    row, _, column = part_of_row(count, PART)
    row = row.to(tl.int64)
    if keys_ptr is None:
        x = tl.load(x_ptr + row * x_stride + column, mask=column < count, other=0.0)
        keys = tl.where(column < count, _keys(x, column), _NO_KEY)
    else:
        keys = tl.load(keys_ptr + row * count + column, mask=column < count, other=_NO_KEY)
    slots = _slots((keys >> 32).to(tl.int32), K)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * K + slots, keys, mask=slots < K)


@triton.jit
def _order_kernel(
    x_ptr,
    keys_ptr,
    values_ptr,
    ids_ptr,
    x_stride,
    count,
    K: tl.constexpr,
    ORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write each key's element at its rank: the number of larger keys."""
    begin(PDL)
    row, _, own = part_of_row(count, ORDERED)
    row = row.to(tl.int64)
    keys = tl.load(keys_ptr + row * count + own, mask=own < count, other=_NO_KEY)
    rank = tl.zeros([ORDERED], dtype=tl.int32)
    for start in range(0, count, ORDERED):
        other = start + tl.arange(0, ORDERED)
        others = tl.load(keys_ptr + row * count + other, mask=other < count, other=_NO_KEY)
        rank += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
    id = _LARGEST_ID - (keys & 0x7FFFFFFF)
    # There are K elements at least, and _NO_KEY ranks behind them.
    tl.store(ids_ptr + row * K + rank, id, mask=rank < K)
    tl.store(values_ptr + row * K + rank, tl.load(x_ptr + row * x_stride + id, mask=rank < K), mask=rank < K)


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest elements of each row in descending order, ties by ascending id.

    What is selected and where it stands is the result of comparing and counting integers alone, which is exact in any
    order: the value's bits select, and the value and the id, joined in one integer, give the rank.

    Args:
        x: ``[..., V]``, bf16, fp16 or fp32; rows may be strided. NaN is larger than any number; -0 equals 0.
        k: from 1 to V and at most 1024.

    Returns:
        values ``[..., k]`` in ``x.dtype``, byte for byte, and ids ``[..., k]`` int64.

    Raises:
        ValueError: ``k`` or the device, dtype or shape of ``x`` is none of the above.
    """
    check_floats("x", x)
    width = x.shape[-1]
    if not 1 <= k <= min(width, LARGEST_K):
        raise ValueError(f"k is {k}; 1 to {min(width, LARGEST_K)} is allowed for rows of {width}")
    values = torch.empty((*x.shape[:-1], k), dtype=x.dtype, device=x.device)
    ids = torch.empty((*x.shape[:-1], k), dtype=torch.int64, device=x.device)
    rows = as_rows(x, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return values, ids
    keys, count = None, width
    while keys is None or count > LARGEST_K:
        part = min(triton.next_power_of_2(count), _PART)
        parts = triton.cdiv(count, part)
        selected = torch.empty((num_rows, parts * k), dtype=torch.int64, device=x.device)
        _select_kernel[(num_rows * parts,)](
            rows,
            keys,
            selected,
            rows.stride(0),
            count,
            k,
            part,
            **launch_options(x, _WARPS),
        )
        keys, count = selected, parts * k
    _order_kernel[(num_rows * triton.cdiv(count, _ORDERED),)](
        rows,
        keys,
        values,
        ids,
        rows.stride(0),
        count,
        k,
        _ORDERED,
        **launch_options(x, _WARPS),
    )
    return values, ids
