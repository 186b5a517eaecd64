"""Causal attention over a paged KV cache with a fixed split size: one fold for decode, prefill and everything between.

Keys are cut into splits of ``kv_split`` positions aligned to absolute position 0. A split starts from a fresh state
(``split_partial``); splits are folded in ascending order (``merge``). Inside a split, tiles of ``KEY_TILE`` keys are
multiplied by calls of one shape and added in ascending order, so a tile past the last key adds exact zeros and may be
left out. Invariant: the bytes of a row depend on its query, its position and the keys and values before it.
"""

from dataclasses import dataclass

import torch

KEY_TILE = 64


@dataclass(frozen=True)
class Partial:
    """The softmax over some keys: ``maximum`` and ``total`` are ``[..., R]``, ``weighted`` is ``[..., R, D]``, fp32."""

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor


def split_partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, min_batch: int = 1
) -> Partial:
    """The softmax state of ``C`` splits of ``T`` key tiles each.

    Args:
        q: ``[C, H, R, D]`` fp32, scaled.
        k, v: ``[C, T, H, KEY_TILE, D]`` fp32, finite.
        visible: ``[C, T, 1, R, KEY_TILE]`` bool, which keys a row sees.
        min_batch: the least number of products in one library call (see ``bit_class``).

    Returns:
        a ``Partial`` with ``[C, H, R]`` and ``[C, H, R, D]``; maximum -inf and zeros where a row sees no key.
    """
    C, T, H, _, D = k.shape
    R = q.shape[2]
    q = q.unsqueeze(1).expand(C, T, H, R, D).reshape(-1, R, D)
    scores = _bmm(q, k.reshape(-1, KEY_TILE, D).transpose(1, 2), min_batch).view(C, T, H, R, KEY_TILE)
    scores.masked_fill_(~visible, float("-inf"))
    maximum = scores.amax(dim=(1, 4))
    weights = scores.sub_(_finite(maximum).view(C, 1, H, R, 1)).exp_()
    tile_totals = _halving_sum(weights)
    tile_weighted = _bmm(weights.view(-1, R, KEY_TILE), v.reshape(-1, KEY_TILE, D), min_batch).view(C, T, H, R, D)
    total, weighted = tile_totals[:, 0], tile_weighted[:, 0]
    for tile in range(1, T):
        total, weighted = total + tile_totals[:, tile], weighted + tile_weighted[:, tile]
    return Partial(maximum, total, weighted)


def merge(first: Partial, second: Partial) -> Partial:
    """The state over both sets of keys; ``first`` holds the lower positions. Merging with an empty state is exact."""
    maximum = torch.maximum(first.maximum, second.maximum)
    finite = _finite(maximum)
    scale_first, scale_second = torch.exp(first.maximum - finite), torch.exp(second.maximum - finite)
    return Partial(
        maximum,
        first.total * scale_first + second.total * scale_second,
        first.weighted * scale_first.unsqueeze(-1) + second.weighted * scale_second.unsqueeze(-1),
    )


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    # A row that sees no key has maximum -inf, and -inf minus -inf is NaN: shift such rows by zero.
    return maximum.masked_fill(maximum == float("-inf"), 0.0)


def _halving_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, a power of two, by adding its upper half to its lower half until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _bmm(a: torch.Tensor, b: torch.Tensor, min_batch: int) -> torch.Tensor:
    # With fewer products than threads a library cuts one product across threads, which may change its order.
    lacking = min_batch - a.shape[0]
    if lacking <= 0:
        return torch.bmm(a, b)
    a = torch.cat([a, a.new_zeros(lacking, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(lacking, *b.shape[1:])])
    return torch.bmm(a, b)[:-lacking]
