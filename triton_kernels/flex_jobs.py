"""What one call of torch's FlexAttention computes: tiles of query tokens, each over one split of its request's keys.

Plain tensor operations on the device that holds the batch; sizes follow from shapes, nothing is read back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton import cdiv


@dataclass(frozen=True)
class QueryTiles:
    """Up to ``width`` consecutive query tokens of one request each; ``[tiles]`` int64, a tile of no request all zeros.

    ``row`` is where its first token lies in q, ``position`` that token's position, ``count`` how many tokens it has,
    ``seq_len`` its request's positions.
    """

    width: int
    request: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    count: torch.Tensor
    seq_len: torch.Tensor

    def __len__(self) -> int:
        return len(self.request)

    @property
    def last(self) -> torch.Tensor:
        """The position of each tile's last token."""
        return self.position + self.count - 1

    def __getitem__(self, part: slice) -> "QueryTiles":
        return self._of_each(lambda x: x[part])

    def over_splits(self, splits: int) -> "QueryTiles":
        """Each tile ``splits`` times in a row."""
        return self._of_each(lambda x: x.repeat_interleave(splits))

    def _of_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "QueryTiles":
        tensors = (self.request, self.row, self.position, self.count, self.seq_len)
        return QueryTiles(self.width, *map(change, tensors))

    def tokens(self, nowhere: int) -> torch.Tensor:
        """``[tiles, width]``: rows of q, ``nowhere`` for those that a tile lacks."""
        place = torch.arange(self.width, device=self.row.device)
        return torch.where(place < self.count[:, None], self.row[:, None] + place, nowhere)


def query_tiles(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, *, rows: int, width: int, max_query_len: int, multiple: int
) -> QueryTiles:
    """The tiles of all requests of at most ``max_query_len`` query tokens, then empty ones up to a ``multiple``.

    Args:
        query_start_loc, seq_lens: as ``attention`` takes them.
        rows: rows of q.
        width: query tokens of a tile.
        max_query_len: requests of more tokens have no tiles.
        multiple: what the number of tiles is a multiple of.
    """
    requests = len(seq_lens)
    tiles = min(requests * cdiv(min(max_query_len, rows), width), rows // width + requests)
    starts, lengths = query_start_loc.long(), seq_lens.long()
    query_lens = starts.diff()
    query_lens = torch.where(query_lens > max_query_len, 0, query_lens)
    ends = ((query_lens + width - 1) // width).cumsum(0)
    number = torch.arange(cdiv(tiles, multiple) * multiple, device=ends.device)
    request = torch.searchsorted(ends, number, right=True).clamp(max=requests - 1)
    # Where a request's tiles begin is where those before it end.
    begin = torch.cat([ends.new_zeros(1), ends[:-1]])[request]
    first = (number - begin) * width
    count = (query_lens[request] - first).clamp(0, width)
    row, position = starts[request] + first, lengths[request] - query_lens[request] + first
    own = (count > 0).long()
    return QueryTiles(width, request * own, row * own, position * own, count, lengths[request] * own)


def gather_split(
    cache: torch.Tensor, block_table: torch.Tensor, jobs: QueryTiles, first_key: torch.Tensor, split: int
) -> torch.Tensor:
    """The keys or values of each job's split: ``[jobs, KV heads, split, D]``, zeros where its request has none.

    Args:
        cache: ``[blocks, block size, KV heads, D]`` with any strides.
        block_table: ``[requests, columns]``.
        jobs: whose ``request`` and ``seq_len`` are read.
        first_key: ``[jobs]``, the position at which each job's split begins.
        split: positions of a split.
    """
    block_size = cache.shape[1]
    position = first_key[:, None] + torch.arange(split, device=cache.device)
    held = position < jobs.seq_len[:, None]
    # A table may hold anything where a request has no block.
    column = torch.where(held, position // block_size, 0).clamp(max=block_table.shape[1] - 1)
    block = torch.where(held, block_table[jobs.request[:, None], column], 0)
    gathered = cache[block, position % block_size]
    # Slots that hold none of the request's positions may be NaN, and a weight of 0 does not hide that.
    return gathered.masked_fill_(~held[:, :, None, None], 0).transpose(1, 2)
