"""Attention over a paged KV cache, one fold for decode, prefill and everything between."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_arguments import bounds, check_features, check_tensors
from .attention_hopper import attention_hopper, takes
from .attention_kernel import attention_kernel, fold_kernel
from .attention_plan import (
    DEFAULT_FOLD,
    MOST_SHORT_ROWS,
    AttentionFold,
    AttentionPlan,
    AttentionTile,
    attention_plan,
    long_tiles,
)
from .launch import capability, check_device, programmatic_launch

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
_LOG2E = math.log2(math.e)
# A tensor descriptor and how it counts: rows of a block, rows of a head, columns of a head.
_NO_DESCRIPTOR = (None, 0, 0, 0)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    decodes: int = 0,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    fold: AttentionFold = DEFAULT_FOLD,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    mod_data: torch.Tensor | None = None,
    plan: AttentionPlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal ``softmax(q @ k.T * scale) @ v`` of each request's last tokens over its keys, accumulated in fp32.

    Invariant: keys are cut into splits of ``fold.split`` positions from position 0. In a split a softmax runs over key
    tiles in ascending order from an empty state; splits are merged in ascending order. So a row's bytes follow its
    query, its position and the keys and values before it (all finite): not other rows, the plan, the query lengths,
    the block size or where blocks lie.

    Nothing is read back from the device; grids and workspace follow from shapes, ``max_query_len`` and ``max_seq_len``.

    Args:
        q: ``[T, query heads, D]``, contiguous along D, bf16 or fp16, under Triton's interpreter also fp32; D is 64, 80,
            96, 128, 192 or 256.
        k_cache, v_cache: ``[blocks, block size, KV heads, D]``, contiguous along D, else with any strides, as halves of
            one tensor have. Dtype of q. Slots that hold none of a request's positions may hold anything.
        block_table: ``[requests, columns]`` int32, the blocks of each request by position.
        query_start_loc: ``[requests + 1]`` int32, where each request's rows of q begin; rows past the last are not
            written.
        seq_lens: ``[requests]`` int32, positions of each request, its query tokens being the last.
        scale: positive factor of the products.
        decodes: so many of the first requests have one query token each, for sure. Fewer programs look for work.
        max_query_len: at least the most query tokens of a request; None takes T. A request of more is not written.
        max_seq_len: at least the largest of ``seq_lens``; None takes what the block table holds. A longer request
            becomes NaN.
        fold: the order of additions, which decides the bytes.
        window: how many positions a row sees, its own included; None for all.
        softcap: ``softcap * tanh(score / softcap)`` takes the score's place; None for none.
        alibi_slopes: ``[query heads]`` fp32; ``slope * (key position - query position)`` is added to a score.
        sinks: ``[query heads]`` float; for each head a score that takes part in the softmax without a value.
        score_mod: a Triton function ``(score, head, query position, key position, mod_data) -> score``, elementwise,
            after the above. Padding rows have head ``query heads`` and position -1.
        mask_mod: a Triton function ``(head, query position, key position, mod_data) -> bool``: what a row may see of
            what it sees without.
        mod_data: a tensor whose pointer both get; None for none.
        plan: None takes ``attention_plan``'s. Decides speed alone.
        out: like q with contiguous along D, else with any strides; None allocates it.

    Returns:
        ``[T, query heads, D]`` in ``q.dtype``; zeros for a row that sees nothing.

    Raises:
        ValueError: names the argument, its shape or value and what is allowed.
    """
    check_device("q", q)
    indices = {"block_table": block_table, "query_start_loc": query_start_loc, "seq_lens": seq_lens}
    check_tensors(q, k_cache, v_cache, **indices)
    check_features(q, scale, window, softcap, alibi_slopes, sinks)
    heads = {"alibi_slopes": alibi_slopes, "sinks": sinks}
    _check(q, {"k_cache": k_cache, "v_cache": v_cache}, indices, heads, fold)
    group = q.shape[1] // k_cache.shape[2]
    requests, block_size, kv_heads = len(seq_lens), k_cache.shape[1], k_cache.shape[2]
    max_query_len, max_seq_len = bounds(q, block_table, block_size, max_query_len, max_seq_len)
    if not 0 <= decodes <= min(requests, len(q)):
        raise ValueError(f"decodes is {decodes}; of {requests} requests with {len(q)} query tokens that cannot be")
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    elif out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or out.stride(2) != 1:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; {q.dtype} {tuple(q.shape)} on {q.device}, "
            "contiguous along D, is needed"
        )
    if requests == 0 or q.numel() == 0 or block_table.numel() == 0:
        return out
    if plan is None:
        plan = attention_plan(
            head_dim=q.shape[2],
            group=group,
            kv_heads=kv_heads,
            requests=requests,
            max_query_len=max_query_len,
            max_splits=max_splits(fold, max_seq_len, window, MOST_SHORT_ROWS // group),
        )
    if plan.short_rows < group:
        decodes = 0  # they are among the long ones
    pdl = programmatic_launch(q)
    common = {
        "KV_HEADS": kv_heads, "G": group, "D": q.shape[2], "DP": triton.next_power_of_2(q.shape[2]),
        "SPLIT": fold.split, "SINKS": sinks is not None, "WINDOW": window is not None,
        "PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": False,
    }  # fmt: skip
    modified = softcap is not None or alibi_slopes is not None or score_mod is not None

    def launch(
        tile: AttentionTile,
        programs: int,
        tiles: int,
        slots: int,
        partial: Sequence[Any],
        k: Sequence[Any] = _NO_DESCRIPTOR,
        v: Sequence[Any] = _NO_DESCRIPTOR,
        beside_long: bool = False,
        **options: bool,
    ) -> None:
        attention_kernel[(programs,)](
            q, k_cache, v_cache, k[0], v[0], block_table, query_start_loc, seq_lens, sinks, alibi_slopes, mod_data,
            out, *partial,
            requests, decodes, int(beside_long), tiles, plan.parts, plan.least, plan.at_once, slots, plan.short_rows,
            max_seq_len, _LOG2E if modified else scale * _LOG2E, scale, softcap or 0.0, window or 0,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), block_table.stride(0),
            *k_cache.stride()[:3], *v_cache.stride()[:3], *k[1:], *v[1:],
            BLOCK_SIZE=block_size, BLOCK_M=tile.block_m, BLOCK_N=fold.key_tile, SOFTCAP=softcap is not None,
            ALIBI=alibi_slopes is not None, SCORE_MOD=score_mod, MASK_MOD=mask_mod, DESCRIPTORS=k[0] is not None,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages, **common, **options,
        )  # fmt: skip

    if plan.long:
        k, v = _descriptor(k_cache, fold.key_tile), _descriptor(v_cache, fold.key_tile)
        if k and v and plan.hopper and not modified and mask_mod is None and takes(q, fold.key_tile):
            attention_hopper(
                q, k, v, block_table, query_start_loc, seq_lens, out, tile=plan.hopper, decodes=decodes,
                short_rows=plan.short_rows, max_seq_len=max_seq_len, factor=scale * _LOG2E, window=window, sinks=sinks,
                block_size=block_size, kv_heads=kv_heads, split=fold.split, pdl=pdl,
            )  # fmt: skip
        else:
            tiles = long_tiles(len(q), requests, decodes, group, plan.long.block_m)
            described = (k, v) if k and v and plan.descriptors else ()
            launch(plan.long, tiles * kv_heads, tiles, 0, (None, None, None), *described, SHORT=False)
    if plan.short:
        tiles = triton.cdiv(plan.short_rows, plan.short.block_m)
        slots = max_splits(fold, max_seq_len, window, triton.cdiv(plan.short.block_m, group)) if plan.parts > 1 else 0
        states = requests * kv_heads * slots * plan.short_rows
        partial = q.new_empty(states, q.shape[2], dtype=torch.float32), *q.new_empty(2, states, dtype=torch.float32)
        # Long requests come first, and these take the multiprocessors that they leave.
        beside_long = pdl and plan.long is not None
        programs = requests * tiles * plan.parts * kv_heads + beside_long
        launch(plan.short, programs, tiles, slots, partial, SHORT=True, beside_long=beside_long)
        if slots:
            # Where most splits are folded already, few programs look for the rest.
            columns, rows_each = (common["DP"], plan.short_rows) if plan.busy else (32, 1)
            programs = common["DP"] // columns * requests * kv_heads * triton.cdiv(plan.short_rows, rows_each)
            fold_kernel[(programs,)](
                *partial, query_start_loc, seq_lens, sinks, out, requests, plan.parts, plan.least, plan.at_once, slots,
                plan.short_rows, plan.short.block_m, rows_each, max_seq_len, window or 0, out.stride(0), out.stride(1),
                COLUMNS=columns, AT_ONCE=8 if slots <= 8 or plan.busy else 32, num_warps=1, **common,
            )  # fmt: skip
    return out


def max_splits(fold: AttentionFold, max_seq_len: int, window: int | None, tokens: int) -> int:
    """The most splits that a tile of rows of up to ``tokens`` tokens and one more sees."""
    splits = triton.cdiv(max_seq_len, fold.split)
    return splits if window is None else min(splits, triton.cdiv(window + tokens, fold.split) + 1)


def _descriptor(cache: torch.Tensor, key_tile: int) -> tuple[TensorDescriptor, int, int, int] | None:
    """Half a cache as a matrix with a slot of one head in a row, or of all; None where it cannot be read so."""
    blocks, block_size, kv_heads, head_dim = cache.shape
    stride_block, stride_slot, stride_head, _ = cache.stride()
    width = triton.next_power_of_2(head_dim)
    bytes_aligned = cache.data_ptr() % 16 == 0 and stride_slot * cache.element_size() % 16 == 0
    if block_size % key_tile or stride_block % stride_slot or not bytes_aligned or capability(cache.device)[0] == 8:
        return None
    if stride_head % stride_slot == 0:
        rows_head, columns_head, columns = stride_head // stride_slot, 0, head_dim
    elif stride_head * kv_heads <= stride_slot and width == head_dim:
        rows_head, columns_head, columns = 0, stride_head, stride_head * (kv_heads - 1) + head_dim
    else:
        return None
    rows_block = stride_block // stride_slot
    rows = (blocks - 1) * rows_block + (kv_heads - 1) * rows_head + block_size
    if rows >= 2**31:
        return None
    descriptor = TensorDescriptor(cache, [rows, columns], [stride_slot, 1], [key_tile, width])
    return descriptor, rows_block, rows_head, columns_head


def _check(
    q: torch.Tensor,
    caches: dict[str, torch.Tensor],
    indices: dict[str, torch.Tensor],
    heads: dict[str, torch.Tensor | None],
    fold: AttentionFold,
) -> None:
    """Refuse what these kernels cannot read of tensors that fit together."""
    if q.shape[2] not in HEAD_DIMS or q.stride(2) != 1:
        raise ValueError(
            f"q is {tuple(q.shape)} with strides {q.stride()}; [T, query heads, D] contiguous along D is needed, "
            f"D one of {HEAD_DIMS}"
        )
    for name, cache in caches.items():
        if cache.stride(3) != 1:
            raise ValueError(f"{name} has strides {cache.stride()}; it must be contiguous along D")
        if cache.shape[1] == 0 or fold.split % cache.shape[1]:
            raise ValueError(f"a block has {cache.shape[1]} slots and a split {fold.split} positions; they must divide")
    for name, x in {**indices, **heads}.items():
        if x is not None and x.numel() and x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; it must be contiguous along its last dimension")
