"""Attention of a whole sequence in float64, from its definition."""

import math
from collections.abc import Callable

import torch

from .paged_requests import Tokens


def attention_oracle(
    tokens: Tokens,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    score: Callable[..., torch.Tensor] | None = None,
    mask: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """``[T, query heads, D]``; ``score`` and ``mask`` are given the query head and the positions of query and key."""
    length, heads, _ = tokens.q.shape
    group = heads // tokens.k.shape[1]
    out = torch.empty(tokens.q.shape, dtype=torch.float64, device=tokens.q.device)
    row, key = (x.to(out.device) for x in (torch.arange(length).unsqueeze(1), torch.arange(length)))
    for head in range(heads):
        s = tokens.q[:, head].double() @ tokens.k[:, head // group].double().T * scale
        if softcap is not None:
            s = softcap * (s / softcap).tanh()
        if alibi_slopes is not None:
            s = s + float(alibi_slopes[head]) * (key - row)
        if score is not None:
            s = score(s, head, row, key)
        hidden = key > row
        if window is not None:
            hidden = hidden | (row - key >= window)
        if mask is not None:
            hidden = hidden | ~mask(head, row, key)
        s = s.masked_fill(hidden, -math.inf)
        sink = -math.inf if sinks is None else float(sinks[head])
        s = torch.cat([s, torch.full_like(s[:, :1], sink)], dim=1)
        weights = s.softmax(-1)[:, :-1].nan_to_num(0.0)  # all of a row hidden: nothing is seen
        out[:, head] = weights @ tokens.v[:, head // group].double()
    return out
