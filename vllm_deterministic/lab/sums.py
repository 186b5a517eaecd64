"""Sums out of elementwise additions alone: their order is the one written here, on every device."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad


def in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``((parts[0] + parts[1]) + parts[2]) + ...``; at least one part."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def by_halves(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension: its upper half is added to its lower half until one is left.

    A width that is no power of two is filled up with zeros.
    """
    x = pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def chunk_sums(x: torch.Tensor, chunk: int) -> tuple[torch.Tensor, ...]:
    """The sums of every ``chunk`` neighbours in the last dimension, each ``by_halves``; the last chunk may be short."""
    sums: torch.Tensor = by_halves(pad(x, (0, -x.shape[-1] % chunk)).unflatten(-1, (-1, chunk)))
    return tuple(sums.unbind(-1))
