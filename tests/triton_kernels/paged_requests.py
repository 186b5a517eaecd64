"""Sequences of which any piece may be asked, laid out in a paged KV cache whose every other slot is NaN."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LAYOUTS = ("heads first", "slots first", "apart")


@dataclass(frozen=True)
class Tokens:
    """A sequence: ``q`` ``[T, query heads, D]``, ``k`` and ``v`` ``[T, KV heads, D]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.q)


@dataclass(frozen=True)
class Piece:
    """The query tokens from ``start`` to before ``stop`` of a sequence, its keys before ``stop`` being in the cache."""

    tokens: Tokens
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def random_tokens(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    spread: float = 2.0,
) -> Tokens:
    """A sequence whose softmax is neither flat nor one-sided, with values spread over ``2 ** ±spread``.

    Where magnitudes are spread the order of additions shows in the result.
    """
    device = generator.device

    def normal(count: int) -> torch.Tensor:
        return torch.randn(length, count, head_dim, generator=generator, device=device)

    exponent = torch.rand(length, kv_heads, 1, generator=generator, device=device).mul(2 * spread).sub(spread)
    return Tokens(normal(heads).to(dtype), normal(kv_heads).to(dtype), (normal(kv_heads) * exponent.exp2()).to(dtype))


def cancelling_tokens(
    length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> Tokens:
    """A sequence at whose end all weights are equal and the values cancel but for a few small ones.

    What is left is little more than fp32's rounding on the way, so that another order of additions shows in any dtype.
    """
    tokens = random_tokens(length, heads, kv_heads, head_dim, dtype, generator)
    half, v = length // 2, tokens.v.clone()
    v[-half:] = -v[:half]
    for part in (v[:half], v[-half:]):
        part[::5] = torch.randn(part[::5].shape, generator=generator, device=v.device).mul(2.0**-14).to(dtype)
    return Tokens(torch.zeros_like(tokens.q), tokens.k, v)


def whole(tokens: Tokens) -> Piece:
    return Piece(tokens, 0, len(tokens))


def paged(
    pieces: Sequence[Piece], block_size: int, layout: str = LAYOUTS[0], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors that ``attention`` takes for these pieces, the blocks of all in one random order.

    Returns:
        q, k_cache, v_cache, block_table, query_start_loc, seq_lens. NaN fills the slots past each request's last
        position and the blocks of none; one of those stands in the table where a request has no block.
    """
    first = pieces[0].tokens
    device, dtype = first.k.device, first.k.dtype
    _, kv_heads, head_dim = first.k.shape
    columns = [-(-piece.stop // block_size) for piece in pieces]
    blocks = sum(columns) + 2
    if layout == "heads first":
        both = torch.full((blocks, kv_heads, block_size, 2 * head_dim), math.nan, dtype=dtype, device=device)
        k_cache, v_cache = both.transpose(1, 2).split(head_dim, dim=-1)
    elif layout == "slots first":
        both = torch.full((blocks, block_size, kv_heads, 2 * head_dim), math.nan, dtype=dtype, device=device)
        k_cache, v_cache = both.split(head_dim, dim=-1)
    else:
        both = torch.full((2, blocks, block_size, kv_heads, head_dim), math.nan, dtype=dtype, device=device)
        k_cache, v_cache = both
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).to(device)
    table = torch.full((len(pieces), max(columns)), int(order[-1]), dtype=torch.int32, device=device)
    taken = 0
    for request, (piece, count) in enumerate(zip(pieces, columns, strict=True)):
        own = order[taken : taken + count]
        taken += count
        table[request, :count] = own.int()
        position = torch.arange(piece.stop, device=device)
        slots = own[position // block_size], position % block_size
        k_cache[slots] = piece.tokens.k[: piece.stop]
        v_cache[slots] = piece.tokens.v[: piece.stop]
    q = torch.cat([piece.tokens.q[piece.start : piece.stop] for piece in pieces])
    starts = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0)
    return (
        q,
        k_cache,
        v_cache,
        table,
        starts.to(device, torch.int32),
        torch.tensor([piece.stop for piece in pieces], dtype=torch.int32, device=device),
    )
