"""Attention under one CUDA graph, replayed on other batches than it was captured with."""

import math
from collections.abc import Callable

import torch

from ..triton_kernels.invariance import assert_same_bytes
from ..triton_kernels.paged_requests import Piece, Tokens, paged

# Stands where nothing may be written.
POISON = 77.0
_REQUESTS, _QUERY_TOKENS, _BLOCKS = 4, 512, 64


def assert_one_graph_serves_any_lengths(
    attend: Callable[..., torch.Tensor], tokens: Tokens, expected: torch.Tensor, block_size: int
) -> None:
    """Capture ``attend`` twice in a graph and replay it on decodes and chunks, with padding rows and requests.

    Args:
        attend: takes q, k_cache, v_cache, block_table, query_start_loc, seq_lens and ``out``.
        tokens: a sequence of 1300 to 1600 tokens.
        expected: its rows.
        block_size: of the cache.
    """
    length, (_, kv_heads, head_dim) = len(tokens), tokens.k.shape
    caches = tokens.k.new_zeros(2, _BLOCKS, block_size, kv_heads, head_dim)
    q = tokens.q.new_zeros(_QUERY_TOKENS, *tokens.q.shape[1:])
    table, starts, lengths = (
        torch.zeros(shape, dtype=torch.int32, device=q.device)
        for shape in ((_REQUESTS, -(-length // block_size)), _REQUESTS + 1, _REQUESTS)
    )
    out = torch.full_like(q, POISON)
    attend(q, *caches, table, starts, lengths, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(q, *caches, table, starts, lengths, out=out)
        attend(q, *caches, table, starts, lengths, out=out)
    for pieces in (
        [Piece(tokens, 1000, 1300), Piece(tokens, length - 1, length), Piece(tokens, 0, 40)],
        [Piece(tokens, length - 3, length), Piece(tokens, length - 1, length)],
        [Piece(tokens, 511, 512)],
    ):
        queries, k, v, blocks, begins, ends = paged(pieces, block_size)
        caches.fill_(math.nan)
        caches[0, : len(k)], caches[1, : len(v)] = k, v
        q[: len(queries)] = queries
        table[: len(blocks), : blocks.shape[1]] = blocks
        starts.fill_(len(queries))
        starts[: len(begins)] = begins
        lengths.zero_()
        lengths[: len(ends)] = ends
        out.fill_(POISON)
        graph.replay()
        wanted = torch.cat([expected[piece.start : piece.stop] for piece in pieces])
        assert_same_bytes(out[: len(queries)], wanted, "replayed")
        assert bool((out[len(queries) :] == POISON).all()), "written past the last row"
