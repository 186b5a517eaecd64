"""The largest elements of each row in order, ties by ascending id."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import programmatic_launch
from .rows import as_rows, check_floats

LARGEST_K = 1024
# Keys that one program selects from. The last program takes all keys that are left, so it orders up to LARGEST_K.
_PART = 4096
_WARPS = 8
_ORDERED = 64


@triton.jit
def _keys(x, id, ID_BITS: tl.constexpr):
    """One int64 for each element, in the order of values and, where they are equal, of falling ids; none are equal.

    -0 equals 0, and NaN is larger than any number, as torch has it.
    """
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    bits = tl.where(x != x, 0x7FFFFFFF, x.to(tl.int32, bitcast=True))
    # Negative floats count down in their bits: flip them so that integer order is float order, then start at 0.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return (ordered << ID_BITS) + ((1 << ID_BITS) - 1 - id)


@triton.jit
def _select_kernel(
    x_ptr,
    keys_ptr,
    out_ptr,
    x_stride,
    count,
    K: tl.constexpr,
    ID_BITS: tl.constexpr,
    PART: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The K largest keys of a part in any order, filled up with -1; of ``x`` where there are no keys yet."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts = (count + PART - 1) // PART
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * PART + tl.arange(0, PART)
    if keys_ptr is None:
        keys = _keys(tl.load(x_ptr + row * x_stride + column, mask=column < count, other=0.0), column, ID_BITS)
        keys = tl.where(column < count, keys, -1)
    else:
        keys = tl.load(keys_ptr + row * count + column, mask=column < count, other=-1)
    # The largest bound that K keys reach, bit by bit: as keys differ, exactly K do, or all where there are fewer.
    bound = tl.zeros([], dtype=tl.int64)
    for step in range(32 + ID_BITS):
        raised = bound | (tl.full([], 1, tl.int64) << (31 + ID_BITS - step))
        bound = tl.where(tl.sum((keys >= raised).to(tl.int32), axis=0) >= K, raised, bound)
    selected = (keys >= bound).to(tl.int32)
    out_row = out_ptr + tl.program_id(0).to(tl.int64) * K
    tl.store(out_row + tl.cumsum(selected, axis=0) - 1, keys, mask=selected == 1)
    slot = tl.arange(0, SLOTS)
    tl.store(out_row + slot, -1, mask=(slot < K) & (slot >= tl.sum(selected, axis=0)))


@triton.jit
def _order_kernel(
    x_ptr,
    keys_ptr,
    values_ptr,
    ids_ptr,
    x_stride,
    count,
    K: tl.constexpr,
    ID_BITS: tl.constexpr,
    ORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write each key's element at its rank: the number of larger keys."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts = (count + ORDERED - 1) // ORDERED
    row = (tl.program_id(0) // parts).to(tl.int64)
    own = tl.program_id(0) % parts * ORDERED + tl.arange(0, ORDERED)
    keys = tl.load(keys_ptr + row * count + own, mask=own < count, other=-1)
    rank = tl.zeros([ORDERED], dtype=tl.int32)
    for start in range(0, count, ORDERED):
        other = start + tl.arange(0, ORDERED)
        others = tl.load(keys_ptr + row * count + other, mask=other < count, other=-1)
        rank += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
    id = (1 << ID_BITS) - 1 - (keys & ((1 << ID_BITS) - 1))
    inside = (keys >= 0) & (rank < K)
    tl.store(ids_ptr + row * K + rank, id, mask=inside)
    tl.store(values_ptr + row * K + rank, tl.load(x_ptr + row * x_stride + id, mask=inside), mask=inside)


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest elements of each row in descending order, ties by ascending id.

    Value and id are joined in one integer, so no two are equal; what is selected and where it stands is the result of
    comparing and counting integers alone, which is exact in any order.

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
    id_bits = max(1, (width - 1).bit_length())
    pdl = programmatic_launch(x)
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
            id_bits,
            part,
            triton.next_power_of_2(k),
            PDL=pdl,
            num_warps=_WARPS,
            launch_pdl=pdl,
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
        id_bits,
        _ORDERED,
        PDL=pdl,
        num_warps=_WARPS,
        launch_pdl=pdl,
    )
    return values, ids
