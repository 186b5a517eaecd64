"""Matrix product with a library's kernel at fixed tiles of rows."""

from collections.abc import Callable, Iterator, Sequence

import torch


def row_tiles(num_rows: int, tiles: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ``num_rows`` into ``(first_row, tile)`` with every tile from ``tiles``; the last tile may reach past the end.

    A larger tile that is at most half empty beats several small ones, since each tile reads all weights once.
    """
    start = 0
    while start < num_rows:
        left = num_rows - start
        enclosing = [tile for tile in tiles if left <= tile <= left + left // 2]
        inside = [tile for tile in tiles if tile <= left]
        tile = min(enclosing) if enclosing else max(inside) if inside else min(tiles)
        yield start, tile
        start += tile


def matmul(
    x: torch.Tensor, library_matmul: Callable[[torch.Tensor], torch.Tensor], tiles: Sequence[int]
) -> torch.Tensor:
    """``library_matmul`` applied to ``x`` in tiles of rows, the last one filled up with zero rows.

    Invariant: a library chooses its order of additions by the shape of a call, so only the shapes in ``tiles`` are ever
    called. They must be of one bit class (see ``bit_class.certified_row_tiles``).

    Args:
        x: ``[M, K]``, any float dtype, ``M >= 0``.
        library_matmul: maps ``[T, K]`` to ``[T, N]``, for example ``lambda x: F.linear(x, weight, bias)``.
        tiles: the certified numbers of rows ``T``; not empty.

    Returns:
        ``[M, N]``, the dtype that ``library_matmul`` gives.

    Raises:
        ValueError: ``x`` is not a matrix or ``tiles`` is empty.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got shape {tuple(x.shape)}")
    if not tiles:
        raise ValueError("tiles must name at least one number of rows")
    M = x.shape[0]
    if M in tiles:
        return library_matmul(x.contiguous())
    if M == 0:
        return library_matmul(x.new_zeros(min(tiles), x.shape[1]))[:0]
    outs = []
    for start, tile in row_tiles(M, tiles):
        rows = x[start : start + tile]
        if rows.shape[0] < tile:
            rows = torch.cat([rows, x.new_zeros(tile - rows.shape[0], x.shape[1])])
        outs.append(library_matmul(rows.contiguous())[: M - start])
    return outs[0] if len(outs) == 1 else torch.cat(outs)
