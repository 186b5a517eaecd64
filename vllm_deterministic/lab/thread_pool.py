"""The same fixed chunks summed by a pool of threads, and four ways to merge what the threads bring."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from threading import Lock

import torch

from .sums import by_halves, in_order

# Takes a pool and chunks ``[M, up to 64]``, gives their sums ``[M]``.
Merge = Callable[[Executor, Sequence[torch.Tensor]], torch.Tensor]


def merge_by_index(pool: Executor, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Threads sum fixed chunks of 64; the partial sums are added in index order, whichever thread was first (V1)."""
    return in_order(list(pool.map(by_halves, chunks)))


def merge_on_arrival(pool: Executor, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Threads sum fixed chunks of 64; each adds its partial sum under a lock as soon as it has it (V2)."""
    lock = Lock()
    total = torch.zeros_like(chunks[0][..., 0])

    def add(chunk: torch.Tensor) -> None:
        nonlocal total
        partial = by_halves(chunk)
        with lock:
            total = total + partial

    list(pool.map(add, chunks))
    return total


def merge_in_pairs(pool: Executor, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Threads sum fixed chunks of 64, then add neighbours in pairs, stage after stage, until one is left (V3)."""
    parts = list(pool.map(by_halves, chunks))
    while len(parts) > 1:
        unpaired = parts[len(parts) // 2 * 2 :]
        parts = [*pool.map(torch.add, parts[0::2], parts[1::2]), *unpaired]
    return parts[0]


def merge_by_cat(pool: Executor, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Threads sum fixed chunks of 64; the partial sums are put side by side for the library to sum (V4, cat + sum)."""
    return torch.cat([part.unsqueeze(-1) for part in pool.map(by_halves, chunks)], dim=-1).sum(-1)
