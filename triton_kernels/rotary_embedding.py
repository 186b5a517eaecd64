"""Rotary position embedding (https://arxiv.org/abs/2104.09864), alone and with the norm of each head first."""

import torch
import triton
import triton.language as tl

from .launch import check_device
from .rms_norm import reciprocal_rms, scale
from .rows import FLOATS, as_rows, begin, check_floats, check_vector, launch_options, row_offset, row_tile


@triton.jit
def _normalize(x, w, factor, weight_offset: tl.constexpr):
    """Elements of some heads as fp32, normalized and rounded where there is a weight."""
    if w is None:
        return x.to(tl.float32)
    else:
        return scale(x.to(tl.float32) * factor, w, weight_offset).to(x.dtype).to(tl.float32)


@triton.jit
def _rotate(
    x_ptr,
    w_ptr,
    out_ptr,
    cos_sin_ptr,
    first_head,
    num_heads,
    epsilon,
    weight_offset: tl.constexpr,
    head_size: tl.constexpr,
    rotary_dim: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Normalize and rotate up to ``HEADS`` heads of one token.

    All is loaded before anything is computed, the angles last: a load must bring their address.
    """
    half: tl.constexpr = rotary_dim // 2
    head = (first_head + tl.arange(0, HEADS))[:, None]
    x_ptrs = x_ptr + head * head_size
    out_ptrs = out_ptr + head * head_size
    pair = tl.arange(0, PAIRS)[None, :]
    if NEOX:
        inside = (head < num_heads) & (pair < half)
        first = tl.load(x_ptrs + pair, mask=inside, other=0.0)
        second = tl.load(x_ptrs + half + pair, mask=inside, other=0.0)
        first_w = None if w_ptr is None else tl.load(w_ptr + pair, mask=pair < half, other=0.0)
        second_w = None if w_ptr is None else tl.load(w_ptr + half + pair, mask=pair < half, other=0.0)
    else:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        inside = (head < num_heads) & (column < rotary_dim)
        pairs = tl.load(x_ptrs + column, mask=inside, other=0.0)
        w = None if w_ptr is None else tl.load(w_ptr + column, mask=column < rotary_dim, other=0.0)
    factor = 1.0
    if w_ptr is not None:
        # In the chunks of rms_norm, so that the sum has its order; mostly they are the halves.
        squares = tl.zeros([HEADS, COLUMNS], dtype=tl.float32)
        if NEOX and half == COLUMNS:
            squares += first.to(tl.float32) * first.to(tl.float32)
            squares += second.to(tl.float32) * second.to(tl.float32)
        else:
            for start in tl.static_range(0, head_size, COLUMNS):
                column = start + tl.arange(0, COLUMNS)[None, :]
                chunk = tl.load(x_ptrs + column, mask=(head < num_heads) & (column < head_size), other=0.0)
                squares += chunk.to(tl.float32) * chunk.to(tl.float32)
    cos = tl.load(cos_sin_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + half + pair, mask=pair < half, other=0.0).to(tl.float32)
    if w_ptr is not None:
        factor = reciprocal_rms(squares, epsilon, head_size)
    if NEOX:
        first = _normalize(first, first_w, factor, weight_offset)
        second = _normalize(second, second_w, factor, weight_offset)
        tl.store(out_ptrs + pair, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptrs + half + pair, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        first, second = tl.split(tl.reshape(_normalize(pairs, w, factor, weight_offset), [HEADS, PAIRS, 2]))
        rotated = tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), [HEADS, 2 * PAIRS])
        tl.store(out_ptrs + tl.arange(0, 2 * PAIRS)[None, :], rotated.to(out_ptr.dtype.element_ty), mask=inside)
    # What is not rotated.
    for start in tl.static_range(rotary_dim // COLUMNS * COLUMNS, head_size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (head < num_heads) & (column >= rotary_dim) & (column < head_size)
        rest = tl.load(x_ptrs + column, mask=inside, other=0.0)
        rest_w = None if w_ptr is None else tl.load(w_ptr + column, mask=column < head_size, other=0.0)
        rest = _normalize(rest, rest_w, factor, weight_offset)
        tl.store(out_ptrs + column, rest.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_stride", "k_stride"])
def _rotary_embedding_kernel(
    positions_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_sin_ptr,
    q_stride,
    k_stride,
    epsilon,
    weight_offset: tl.constexpr,
    q_heads: tl.constexpr,
    k_heads: tl.constexpr,
    head_size: tl.constexpr,
    rotary_dim: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    q_programs: tl.constexpr = (q_heads + HEADS - 1) // HEADS
    programs: tl.constexpr = q_programs + (k_heads + HEADS - 1) // HEADS
    token = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    cos_sin_row = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * rotary_dim
    if program < q_programs:
        x_ptr = q_ptr + row_offset(token, q_stride, head_size)
        out_ptr = q_out_ptr + row_offset(token, q_heads * head_size, head_size)
        _rotate(
            x_ptr, q_weight_ptr, out_ptr, cos_sin_row, program * HEADS, q_heads, epsilon,
            weight_offset, head_size, rotary_dim, NEOX, HEADS, COLUMNS, PAIRS,
        )  # fmt: skip
    else:
        x_ptr = k_ptr + row_offset(token, k_stride, head_size)
        out_ptr = k_out_ptr + row_offset(token, k_heads * head_size, head_size)
        _rotate(
            x_ptr, k_weight_ptr, out_ptr, cos_sin_row, (program - q_programs) * HEADS, k_heads, epsilon,
            weight_offset, head_size, rotary_dim, NEOX, HEADS, COLUMNS, PAIRS,
        )  # fmt: skip


def rotary_embedding(
    positions: torch.Tensor, x: torch.Tensor, cos_sin_cache: torch.Tensor, head_size: int, is_neox_style: bool
) -> torch.Tensor:
    """Rotate the first ``rotary_dim`` elements of each head by its token's position; the others pass through.

    Products and sums are fp32, each rounded by itself, with one rounding to ``x.dtype`` at the end.

    Invariant: every element is computed by the same instructions, wherever it lies.

    Args:
        positions: ``[T]`` int64 or int32, below ``max_position`` (not checked).
        x: ``[T, heads * head_size]``, bf16, fp16 or fp32, head_size up to 2048; rows may be strided.
        cos_sin_cache: ``[max_position, rotary_dim]``: the cosines, then the sines; bf16, fp16 or fp32.
        head_size: elements in a head.
        is_neox_style: pairs are (i, i + rotary_dim / 2); otherwise (2 i, 2 i + 1).

    Returns:
        ``[T, heads * head_size]`` in ``x.dtype``.

    Raises:
        ValueError: a tensor's device, dtype or shape is none of the above.
    """
    return _launch(positions, {"x": x}, {}, 0.0, cos_sin_cache, head_size, is_neox_style)[0]


def qk_rotary_embedding(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rotary_embedding`` of ``q`` and of ``k``, byte for byte, in one launch.

    Args:
        q: ``[T, query heads * head_size]``, such as a view of a packed projection.
        k: ``[T, KV heads * head_size]`` in ``q.dtype``.
        positions, cos_sin_cache, head_size, is_neox_style: see ``rotary_embedding``.

    Returns:
        the rotated ``q`` and ``k``, contiguous.

    Raises:
        ValueError: a tensor's device, dtype or shape is none of the above.
    """
    return _launch(positions, {"q": q, "k": k}, {}, 0.0, cos_sin_cache, head_size, is_neox_style)


def qk_norm_rotary_embedding(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    epsilon: float,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rotary_embedding`` of the ``rms_norm`` of each head of ``q`` and ``k``, byte for byte, in one launch.

    Args:
        q_weight, k_weight: ``[head_size]``, which must be a multiple of 8.
        epsilon, weight_offset: see ``rms_norm``.
        positions, q, k, cos_sin_cache, head_size, is_neox_style: see ``qk_rotary_embedding``.

    Returns:
        the rotated ``q`` and ``k``, contiguous.

    Raises:
        ValueError: a tensor's device, dtype or shape is none of the above.
    """
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    return _launch(
        positions, {"q": q, "k": k}, weights, epsilon, cos_sin_cache, head_size, is_neox_style, weight_offset
    )


def _launch(
    positions: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    epsilon: float,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        check_floats(name, x)
        if (
            x.dim() != 2
            or x.shape[1] % head_size
            or (x.shape[0], x.dtype, x.device)
            != (
                first.shape[0],
                first.dtype,
                first.device,
            )
        ):
            raise ValueError(
                f"{name} is {tuple(x.shape)} in {x.dtype} on {x.device}; [{first.shape[0]}, heads * {head_size}] "
                f"in {first.dtype} on {first.device} is needed"
            )
    num_tokens = first.shape[0]
    check_device("positions", positions)
    if positions.shape != (num_tokens,) or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions is {tuple(positions.shape)} in {positions.dtype}; [{num_tokens}] in int64 or int32 is needed"
        )
    rotary_dim = cos_sin_cache.shape[-1]
    if (
        cos_sin_cache.dim() != 2
        or cos_sin_cache.dtype not in FLOATS
        or cos_sin_cache.device != first.device
        or rotary_dim % 2
        or not 0 < rotary_dim <= head_size
    ):
        raise ValueError(
            f"cos_sin_cache is {tuple(cos_sin_cache.shape)} in {cos_sin_cache.dtype} on {cos_sin_cache.device}; "
            f"[positions, even rotary_dim up to {head_size}] in bf16, fp16 or fp32 on {first.device} is needed"
        )
    if head_size > 2048:
        raise ValueError(f"head_size is {head_size}; up to 2048 is allowed")
    if weights and head_size % 8:
        raise ValueError(f"head_size is {head_size}; a multiple of 8 is needed to normalize in the order of rms_norm")
    scales = [check_vector(name, w, first, head_size) for name, w in weights.items()] or [None, None]
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors.values())
    rows = [as_rows(x, head_size) for x in tensors.values()]
    heads = [x.shape[1] // head_size for x in rows]
    if num_tokens == 0:
        return outs
    tile = row_tile(head_size)
    programs = sum(triton.cdiv(number, tile.rows) for number in heads)
    _rotary_embedding_kernel[(num_tokens * programs,)](
        positions.contiguous(),
        rows[0],
        rows[-1],
        scales[0],
        scales[1],
        outs[0],
        outs[-1],
        cos_sin_cache.contiguous(),
        rows[0].stride(0),
        rows[-1].stride(0),
        epsilon,
        weight_offset,
        heads[0],
        heads[1] if len(heads) == 2 else 0,
        head_size,
        rotary_dim,
        is_neox_style,
        tile.rows,
        tile.columns,
        triton.next_power_of_2(rotary_dim // 2),
        **launch_options(first, tile.warps),
    )
    return outs
