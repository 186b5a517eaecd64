"""Attention over a paged KV cache on torch's own FlexAttention, by splits of fixed size."""

import functools
import math

import torch
from triton import cdiv

from .attention import max_splits
from .attention_arguments import bounds, check_features, check_tensors
from .attention_plan import DEFAULT_FOLD, AttentionFold
from .flex_jobs import QueryTiles, gather_split, query_tiles
from .flex_split import BLOCK_M, MaskMod, ScoreMod, SplitKernel, compiled_splits

# One call of FlexAttention takes as many jobs as fit in this much memory, and at most so many.
WORKSPACE_BYTES = 256 << 20
MOST_JOBS = 64
# Rows of a job, where a KV head has no more query heads.
_JOB_ROWS = 2 * BLOCK_M

# The largest log-sum-exp, the sum of weights relative to it, the weighted sum of outputs: [tiles, KV heads, rows], the
# last with [D]; fp32.
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def split_flex_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    fold: AttentionFold = DEFAULT_FOLD,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What ``attention`` computes, on torch's FlexAttention: causal ``softmax(q @ k.T * scale) @ v`` of paged requests.

    Invariant: keys are cut into splits of ``fold.split`` positions from position 0. FlexAttention computes each split
    alone, its key tiles in ascending order, as an output rounded to ``q.dtype`` and a log-sum-exp; ``merge`` folds
    these in ascending order in fp32. Every call has one shape and one compiled kernel, so where torch compiles
    FlexAttention (not on CPU) a row's bytes follow its query, its position and the keys and values before it alone.

    Nothing is read back from the device; the number of calls follows from shapes, ``max_query_len`` and
    ``max_seq_len``, the memory of each from the heads.

    Args:
        q: ``[T, query heads, D]``, bf16 or fp16, on CPU also fp32; D at least 16.
        k_cache, v_cache: ``[blocks, block size, KV heads, D]`` with any strides, dtype of q. Slots that hold none of a
            request's positions may hold anything.
        block_table, query_start_loc, seq_lens: as ``attention`` takes them.
        scale, window, softcap, alibi_slopes, sinks: as ``attention`` takes them.
        max_query_len: at least the most query tokens of a request; None takes T. A request of more is not written.
        max_seq_len: at least the largest of ``seq_lens``; None takes what the block table holds. A longer request
            becomes NaN.
        fold: the order of additions, which decides the bytes.
        score_mod, mask_mod: as torch's ``flex_attention`` takes them, after the above. They are given the query head
            and positions in the request, and 0 for the batch: a request's place there may not matter.
        out: like q with any strides; None allocates it.

    Returns:
        ``[T, query heads, D]`` in ``q.dtype``; zeros for a row that sees nothing. Rows past the last request's are not
        written.

    Raises:
        ValueError: names the argument, its shape or value and what is allowed.
    """
    check_tensors(q, k_cache, v_cache, block_table, query_start_loc, seq_lens)
    check_features(q, scale, window, softcap, alibi_slopes, sinks)
    max_query_len, max_seq_len = bounds(q, block_table, k_cache.shape[1], max_query_len, max_seq_len)
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be like q")
    # What tiles have beyond their tokens ends in one row more.
    results = q.new_empty(len(q) + 1, *q.shape[1:])
    if out is not None:
        results[:-1] = out
    if len(seq_lens) and q.numel() and block_table.shape[1] * k_cache.shape[1]:
        group = q.shape[1] // k_cache.shape[2]
        kernel = SplitKernel(group, fold.key_tile, scale, window, softcap, score_mod, mask_mod)
        attend = functools.partial(_attend, kernel, k_cache, v_cache, block_table, alibi_slopes, fold.split)
        width = max(1, _JOB_ROWS // group)
        splits = max_splits(fold, max_seq_len, window, width)
        jobs = jobs_at_once(k_cache, group, fold.split)
        splits_at_once = min(jobs, 1 << (splits - 1).bit_length())
        tiles_at_once = jobs // splits_at_once
        tiles = query_tiles(
            query_start_loc, seq_lens, rows=len(q), width=width, max_query_len=max_query_len, multiple=tiles_at_once
        )
        for begin in range(0, len(tiles), tiles_at_once):
            part = tiles[begin : begin + tiles_at_once]
            rows = _rows(q[part.tokens(nowhere=0)], k_cache.shape[2])
            first = torch.zeros_like(part.position)
            if window is not None:
                first = (part.position - window + 1).clamp(min=0) // fold.split
            state = _empty(rows)
            for split in range(0, splits, splits_at_once):
                state = fold_splits(state, *attend(rows, part, first + split, splits_at_once))
            result = _finish(_tokens(state, width, group), sinks)
            result.masked_fill_((part.seq_len > max_seq_len)[:, None, None, None], math.nan)
            results[part.tokens(nowhere=len(q))] = result.to(q.dtype)
    return results[:-1] if out is None else out.copy_(results[:-1])


def jobs_at_once(k_cache: torch.Tensor, group: int, split: int) -> int:
    """How many jobs a call of FlexAttention takes: a power of two that follows the model alone."""
    rows = _job_rows(group)
    elements = k_cache.shape[2] * k_cache.shape[3]
    # Keys and values, queries and outputs; a folded state, its successor and two products in fp32.
    each = elements * (2 * (split + rows) * k_cache.element_size() + 4 * rows * 4)
    return 1 << (max(1, min(MOST_JOBS, WORKSPACE_BYTES // each)).bit_length() - 1)


def fold_splits(state: State, out: torch.Tensor, lse: torch.Tensor) -> State:
    """Merge splits into a state in ascending order.

    Args:
        state: of ``tiles`` tiles.
        out: ``[tiles, splits, KV heads, rows, D]``, each split's output.
        lse: ``[tiles, splits, KV heads, rows]`` fp32, each split's log-sum-exp.
    """
    for split in range(out.shape[1]):
        state = merge(state, out[:, split], lse[:, split])
    return state


def merge(state: State, out: torch.Tensor, lse: torch.Tensor) -> State:
    """The state with a split more, whose keys lie after all others; exact where either is empty.

    A split is the state (lse, 1, out). Each operation rounds once, so that shapes cannot decide what is fused.
    """
    m, total, acc = state
    both = torch.maximum(m, lse)
    # Rows that saw no key have the maximum -inf, and -inf minus -inf is NaN.
    shift = both.masked_fill(both == -math.inf, 0.0)
    a, b = (m - shift).exp(), (lse - shift).exp()
    return both, total * a + b, acc * a[..., None] + out.float() * b[..., None]


def _attend(
    kernel: SplitKernel,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    split: int,
    rows: torch.Tensor,
    tiles: QueryTiles,
    first: torch.Tensor,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of ``splits`` splits of each tile from its ``first``, as ``fold_splits`` takes them."""
    numbers = first[:, None] + torch.arange(splits, device=first.device)
    first_key = (numbers * split).flatten()
    jobs = tiles.over_splits(splits)
    k, v = (gather_split(cache, block_table, jobs, first_key, split) for cache in (k_cache, v_cache))
    blocks = _key_blocks(jobs, first_key, split, rows.shape[2], kernel)
    order = torch.arange(split // kernel.key_tile, dtype=torch.int32, device=first.device)
    out, lse = compiled_splits(rows.device.type)(
        kernel, rows.repeat_interleave(splits, 0), k, v,
        blocks[:, None], order.expand(*blocks[:, None].shape, -1).contiguous(),
        *(x.int() for x in (jobs.position, jobs.last, first_key)), alibi_slopes,
    )  # fmt: skip
    return out.unflatten(0, (-1, splits)), lse.unflatten(0, (-1, splits))


def _key_blocks(jobs: QueryTiles, first_key: torch.Tensor, split: int, rows: int, kernel: SplitKernel) -> torch.Tensor:
    """``[jobs, rows / BLOCK_M]`` int32: the key tiles up to the last that a program's rows see."""
    begin = torch.arange(0, rows, BLOCK_M, device=first_key.device)
    first_token, last_token = begin // kernel.group, (begin + BLOCK_M - 1) // kernel.group
    last_token = torch.minimum(last_token, jobs.count[:, None] - 1)
    seen = (jobs.position[:, None] + last_token + 1 - first_key[:, None]).clamp(0, split)
    blocks = (seen + kernel.key_tile - 1) // kernel.key_tile
    return torch.where(first_token < jobs.count[:, None], blocks, 0).int()


def _job_rows(group: int) -> int:
    return cdiv(max(_JOB_ROWS, group), BLOCK_M) * BLOCK_M


def _rows(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[tiles, width, query heads, D]`` as ``[tiles, KV heads, rows, D]``: the heads of a KV head side by side."""
    tiles, width, heads, head_dim = q.shape
    group = heads // kv_heads
    rows = q.new_zeros(tiles, kv_heads, _job_rows(group), head_dim)
    own = rows[:, :, : width * group].unflatten(2, (width, group))
    own.copy_(q.unflatten(2, (kv_heads, group)).transpose(1, 2))
    return rows


def _tokens(state: State, width: int, group: int) -> State:
    """What ``_rows`` did, undone: ``[tiles, width, query heads]``."""
    own = (x[:, :, : width * group].unflatten(2, (width, group)).transpose(1, 2).flatten(2, 3) for x in state)
    m, total, acc = own
    return m, total, acc


def _empty(rows: torch.Tensor) -> State:
    acc = torch.zeros_like(rows, dtype=torch.float32)
    total = acc.new_zeros(acc.shape[:-1])
    return torch.full_like(total, -math.inf), total, acc


def _finish(state: State, sinks: torch.Tensor | None) -> torch.Tensor:
    """The attention of a folded state; zeros for a row that sees nothing."""
    if sinks is not None:
        state = merge(state, torch.zeros_like(state[2]), sinks.float().expand_as(state[0]))
    _, total, acc = state
    # Zero is added so that a sum has one zero, whatever empty splits it passed.
    return torch.where(total[..., None] == 0, 0.0, (acc + 0.0) / total[..., None])
