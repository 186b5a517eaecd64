"""What one step of attention computes: which rows share a tile of queries, which splits of keys each tile reads.

The plan depends on the lengths of a step's requests alone, so every layer of the step uses it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .attention import KEY_TILE


@dataclass(frozen=True)
class SplitBatch:
    """Splits that are computed together, in ascending order of split.

    ``tile``: ``[C]``, the query tile of each split. ``units``: ``[C * T * units in a key tile]``, the cache units read.
    ``visible``: ``[C, T, 1, R, KEY_TILE]``. ``runs``: ``(first, last + 1)`` of the splits with the same index.
    """

    tile: torch.Tensor
    units: torch.Tensor
    visible: torch.Tensor
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class QueryTiles:
    """Query tiles of ``tokens`` tokens and, over a KV head's group of query heads, ``rows`` rows.

    ``token``: ``[I, tokens]``, indices into the step's tokens, those past a request's end repeat its last.
    ``valid``: ``[I, tokens]``, which of them are to be written.
    """

    rows: int
    tokens: int
    token: torch.Tensor
    valid: torch.Tensor
    batches: tuple[SplitBatch, ...]


def plan_attention(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int,
    kv_split: int,
    group_size: int,
    row_tiles: Sequence[int],
    window: int | None,
    max_split_rows: int,
) -> tuple[QueryTiles, ...]:
    """Cut a step into query tiles and key splits.

    Args:
        query_start_loc: ``[requests + 1]``, where each request's tokens begin.
        seq_lens: ``[requests]``, tokens of each request including this step's.
        block_table: ``[requests, blocks]``, the cache blocks of each request.
        block_size: slots in a cache block; a power of two from 16 to ``kv_split``.
        kv_split: positions in a split; a power of two, at least ``KEY_TILE``.
        group_size: query heads to a KV head.
        row_tiles: the certified numbers of rows of a query tile, ascending.
        window: how many positions a row sees, itself included; None for all.
        max_split_rows: how many keys times rows one batch of splits may hold.

    Returns:
        the tiles, those of the same number of rows together.
    """
    starts = query_start_loc.long()
    query_lens = starts[1:] - starts[:-1]
    seq_lens = seq_lens.long()
    groups = []
    sizes = torch.tensor(sorted(row_tiles))
    # The smallest tile that takes a request whole, else the largest.
    choice = torch.searchsorted(sizes, query_lens * group_size).clamp(max=len(sizes) - 1)
    choice = torch.where(query_lens > 0, choice, -1)
    for index, rows in enumerate(sizes.tolist()):
        requests = (choice == index).nonzero().squeeze(-1)
        if requests.numel():
            groups.append(
                _plan_group(
                    requests, rows, starts, query_lens, seq_lens, block_table, block_size, kv_split, group_size, window,
                    max_split_rows,
                )
            )  # fmt: skip
    return tuple(groups)


def _plan_group(
    requests: torch.Tensor,
    rows: int,
    starts: torch.Tensor,
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    kv_split: int,
    group_size: int,
    window: int | None,
    max_split_rows: int,
) -> QueryTiles:
    tokens = max(rows // group_size, 1)
    tiles_of = -(-query_lens[requests] // tokens)
    request = requests.repeat_interleave(tiles_of)
    ordinal = _ranges(tiles_of)
    first = ordinal * tokens
    offset = first.unsqueeze(-1) + torch.arange(tokens)
    length = query_lens[request].unsqueeze(-1)
    valid = offset < length
    offset = torch.minimum(offset, length - 1)
    position = (seq_lens[request].unsqueeze(-1) - length) + offset

    lowest = torch.zeros_like(first) if window is None else (position[:, 0] - window + 1).clamp(min=0)
    first_split = lowest // kv_split
    splits_of = position[:, -1] // kv_split - first_split + 1
    tile = torch.arange(len(request)).repeat_interleave(splits_of)
    split = first_split[tile] + _ranges(splits_of)
    order = split.argsort(stable=True)
    tile, split = tile[order], split[order]

    row_position = position.repeat(1, group_size)
    if row_position.shape[1] < rows:
        padding = row_position[:, -1:].expand(-1, rows - row_position.shape[1])
        row_position = torch.cat([row_position, padding], dim=-1)

    per_batch = max(1, max_split_rows // (kv_split * rows))
    batches = []
    for begin in range(0, len(tile), per_batch):
        chosen, index = tile[begin : begin + per_batch], split[begin : begin + per_batch]
        base = index * kv_split
        needed = int((position[chosen, -1] - base).max()) + 1
        num_keys = min(kv_split, -(-needed // KEY_TILE) * KEY_TILE)
        key = base.unsqueeze(-1) + torch.arange(num_keys)
        visible = key.unsqueeze(1) <= row_position[chosen].unsqueeze(-1)
        if window is not None:
            visible &= key.unsqueeze(1) > row_position[chosen].unsqueeze(-1) - window
        num_tiles = num_keys // KEY_TILE
        visible = visible.view(len(chosen), rows, num_tiles, KEY_TILE).transpose(1, 2).unsqueeze(2)
        unit = cache_unit(block_size)
        unit_position = base.unsqueeze(-1) + torch.arange(0, num_keys, unit)
        # Units past a request's last token may lie past its blocks: read its last token's unit, which is masked there.
        unit_position = torch.minimum(unit_position, seq_lens[request[chosen]].unsqueeze(-1) - 1)
        block = block_table[request[chosen].unsqueeze(-1), unit_position // block_size].long()
        units = block * (block_size // unit) + unit_position % block_size // unit
        _, counts = index.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        runs = tuple(zip([0, *ends[:-1]], ends, strict=True))
        batches.append(SplitBatch(chosen, units.flatten(), visible.contiguous(), runs))
    return QueryTiles(rows, tokens, starts[request].unsqueeze(-1) + offset, valid, tuple(batches))


def cache_unit(block_size: int) -> int:
    """Slots that lie together in the cache: a key tile, or a block where blocks are smaller."""
    return min(block_size, KEY_TILE)


def _ranges(counts: torch.Tensor) -> torch.Tensor:
    """``[0..counts[0]), [0..counts[1]), ...`` in one row."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
