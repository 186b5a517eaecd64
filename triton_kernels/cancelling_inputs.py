"""Families of inputs on which a matrix product shows its order of additions.

Each family maps ``(m, n, k, dtype, generator)`` to x ``[M, K]`` and w ``[N, K]`` on the generator's device. Where terms
cancel exactly, the rounding errors on the way are the whole result, and an order shows even in eight bits.
"""

import math
from collections.abc import Callable

import torch

from .bit_class import cancelling, mirrored

Pair = tuple[torch.Tensor, torch.Tensor]
Family = Callable[[int, int, int, torch.dtype, torch.Generator], Pair]


def normal(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """Nothing cancels: what the error against float64 is measured on."""
    return _randn(m, k, generator).to(dtype), _randn(n, k, generator).to(dtype)


def mirrored_halves(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """The second half of K takes back the first."""
    return (
        mirrored(m, k, sign=-1, dtype=dtype, generator=generator),
        mirrored(n, k, sign=1, dtype=dtype, generator=generator),
    )


def wide_exponents(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """Magnitudes spread over 2^±12 along K; the second half takes back the first."""
    half = cancelling(m, k // 2, dim=1, dtype=dtype, generator=generator)
    x = torch.cat([half, -half, half.new_zeros(m, k % 2)], dim=1)
    return x, mirrored(n, k, sign=1, dtype=dtype, generator=generator)


def alternating_signs(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """Each term has the sign opposite to its neighbours'; read backwards, K takes itself back."""

    def palindrome(rows: int) -> torch.Tensor:
        half = (_randn(rows, k // 2, generator).abs() * 8).to(dtype)
        return torch.cat([half, half.flip(1), half.new_zeros(rows, k % 2)], dim=1)

    signs = 1 - 2 * (torch.arange(k, device=generator.device) % 2)
    return palindrome(m) * signs.to(dtype), palindrome(n)


def huge_pair(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """In each row one huge term, taken back half of K later: what is added between the two loses its low bits."""
    half = k // 2
    x = _randn(m, k, generator) / 16
    if half:
        place = torch.randint(half, (m, 1), generator=generator, device=generator.device)
        x.scatter_(1, place, 2.0**15).scatter_(1, place + half, -(2.0**15))
    w = _randn(n, half, generator).to(dtype)
    return x.to(dtype), torch.cat([w, w, w.new_zeros(n, k % 2)], dim=1)


def subnormal(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """x lies around the smallest normal number; even rows of w bring the products back to 1, odd rows do not."""
    smallest = torch.finfo(dtype).tiny
    w = _randn(n, k, generator) / 64
    w[::2] /= smallest * 4
    return (_randn(m, k, generator) * smallest).to(dtype), w.to(dtype)


def non_finite(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Pair:
    """Every other row of x holds infinities or NaN, and one row of w: they pass, and the other rows do not change."""
    x, w = normal(m, n, k, dtype, generator)
    x[1::8, k // 3] = math.inf
    x[3::8, k - 1] = math.nan
    x[5::8, 0] = math.inf
    x[5::8, k - 1] = -math.inf
    x[7::8, k // 2] = -math.inf
    if n > 2:
        w[n // 2, k // 2] = math.inf
    return x, w


FAMILIES: dict[str, Family] = {
    "normal": normal,
    "mirrored halves": mirrored_halves,
    "wide exponents": wide_exponents,
    "alternating signs": alternating_signs,
    "huge pair": huge_pair,
    "subnormal": subnormal,
    "non-finite": non_finite,
}


def _randn(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device=generator.device)
