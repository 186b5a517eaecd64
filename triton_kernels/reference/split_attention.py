"""Attention over a paged KV cache in plain torch, by the fold that the Triton kernels keep.

Written to be read beside ``triton_kernels/attention.py``, not to be fast: one row's scores at a time are a tensor.
"""

import math
from collections.abc import Callable

import torch

from ..attention_plan import DEFAULT_FOLD, AttentionFold

# A tile's maximum this far above the reference takes its place.
MOST_ABOVE = 8.0
# The reference of scores in units of log 2, the sum of weights, the weighted sum of values: [heads, T], the last with
# [D].
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def split_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    fold: AttentionFold = DEFAULT_FOLD,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    score_mod: Callable[..., torch.Tensor] | None = None,
    mask_mod: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Shapes, dtypes and meaning as in ``attention``; ``score_mod`` and ``mask_mod`` are functions of tensors.

    Products and sums in fp32; weights are rounded to ``q.dtype`` before they are multiplied by values. A library
    multiplies and sums here, so the bytes are its own: this states the fold, the kernels keep it.

    Returns:
        ``[T, query heads, D]`` in ``q.dtype``.
    """
    block_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    head = torch.arange(q.shape[1], device=q.device).view(-1, 1, 1)
    out = torch.zeros_like(q)
    for request, seq_len in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[request : request + 2].tolist()
        key = torch.arange(seq_len, device=q.device)
        slots = block_table[request, key // block_size].long(), key % block_size
        k, v = (cache[slots].float().repeat_interleave(group, 1).transpose(0, 1) for cache in (k_cache, v_cache))
        position = torch.arange(seq_len - (end - begin), seq_len, device=q.device).unsqueeze(1)
        scores = q[begin:end].float().transpose(0, 1) @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.float().view(-1, 1, 1) * (key - position)
        if score_mod is not None:
            scores = score_mod(scores, head, position, key)
        visible = key <= position
        if window is not None:
            visible = visible & (key > position - window)
        if mask_mod is not None:
            visible = visible & mask_mod(head, position, key)
        scores = (scores * math.log2(math.e)).masked_fill(~visible, -math.inf)
        state = _empty(scores, v)
        for start in range(0, seq_len, fold.split):
            stop = min(start + fold.split, seq_len)
            state = merge(state, split_partial(scores[..., start:stop], v[:, start:stop], fold.key_tile, q.dtype))
        if sinks is not None:
            sink = (sinks.float() * math.log2(math.e)).unsqueeze(1).expand_as(state[0])
            state = merge(state, (sink, torch.ones_like(sink), torch.zeros_like(state[2])))
        _, total, weighted = state
        result = torch.where(total.unsqueeze(-1) == 0, 0.0, weighted / total.unsqueeze(-1))
        out[begin:end] = result.transpose(0, 1).to(out.dtype)
    return out


def split_partial(scores: torch.Tensor, v: torch.Tensor, key_tile: int, dtype: torch.dtype) -> State:
    """The state over one split: a running softmax over its key tiles, from an empty state."""
    reference, total, weighted = _empty(scores, v)
    for start in range(0, scores.shape[-1], key_tile):
        tile = scores[..., start : start + key_tile]
        largest = tile.amax(-1)
        new = torch.where(largest > reference + MOST_ABOVE, largest, reference)
        shift = _finite(new)
        weights = (tile - shift.unsqueeze(-1)).exp2()
        rescale = (reference - shift).exp2()
        total = total * rescale + weights.sum(-1)
        weighted = weighted * rescale.unsqueeze(-1) + weights.to(dtype).float() @ v[:, start : start + key_tile]
        reference = new
    return reference, total, weighted


def merge(first: State, second: State) -> State:
    """The state over both sets of keys, the first of lower positions."""
    maximum = torch.maximum(first[0], second[0])
    shift = _finite(maximum)
    a, b = (first[0] - shift).exp2(), (second[0] - shift).exp2()
    return maximum, first[1] * a + second[1] * b, first[2] * a.unsqueeze(-1) + second[2] * b.unsqueeze(-1)


def _empty(scores: torch.Tensor, v: torch.Tensor) -> State:
    rows = scores.shape[:2]
    return scores.new_full(rows, -math.inf), scores.new_zeros(rows), scores.new_zeros(*rows, v.shape[-1])


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    return maximum.masked_fill(maximum == -math.inf, 0.0)
