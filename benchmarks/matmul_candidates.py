"""The tiles that ``tune_matmul.py`` times."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from vllm_deterministic.triton_kernels.tiles import Tile

# What is not timed borrows the tile of the next larger M.
TUNED_M = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# BLOCK_N, BLOCK_K, warps, stages; operands swapped, BLOCK_M the number of rows.
_NARROW = (
    (64, 128, 4, 5),
    (64, 128, 4, 4),
    (64, 256, 4, 3),
    (128, 128, 4, 4),
    (128, 64, 4, 6),
    (32, 256, 4, 4),
    (32, 256, 2, 4),
    (16, 256, 2, 6),
    (64, 64, 4, 8),
    (64, 128, 4, 8),
    (64, 256, 4, 4),
    (32, 128, 4, 8),
)
# BLOCK_M, BLOCK_N, SIDE_N, BLOCK_K, warps, stages, swapped, for 64 to 1024 rows.
_MIDDLE = (
    (32, 64, 0, 128, 4, 5, True),
    (64, 64, 0, 128, 4, 5, True),
    (64, 64, 0, 128, 4, 5, False),
    (64, 128, 0, 128, 4, 4, True),
    (64, 128, 0, 128, 4, 4, False),
    (64, 32, 0, 128, 4, 5, False),
    (64, 64, 32, 128, 4, 4, False),
    (64, 64, 16, 128, 4, 4, False),
    (64, 128, 32, 64, 4, 5, False),
    (64, 128, 32, 128, 4, 3, False),
    (64, 128, 64, 128, 4, 3, False),
    (128, 64, 0, 128, 4, 4, True),
    (128, 64, 0, 128, 4, 4, False),
    (128, 64, 16, 128, 8, 3, False),
    (128, 64, 32, 128, 8, 3, False),
    (128, 64, 32, 64, 8, 6, False),
    (64, 128, 0, 128, 4, 3, False),
    (64, 128, 0, 64, 4, 8, False),
    (64, 256, 0, 64, 4, 4, False),
    (64, 256, 0, 64, 4, 5, False),
)
# The same for 128 rows and more.
_WIDE = (
    (64, 128, 64, 64, 4, 3, False),
    (64, 128, 64, 64, 4, 5, False),
    (64, 128, 64, 128, 4, 3, False),
    (64, 256, 0, 64, 4, 4, False),
    (64, 256, 0, 64, 4, 2, False),
    (128, 64, 32, 64, 4, 3, False),
    (128, 128, 0, 64, 4, 3, False),
    (128, 128, 0, 64, 4, 4, False),
    (128, 128, 0, 64, 4, 4, True),
    (128, 128, 0, 64, 8, 5, False),
    (128, 128, 0, 128, 8, 3, False),
    (128, 128, 32, 64, 8, 5, False),
    (128, 128, 32, 128, 8, 2, False),
    (128, 128, 32, 128, 8, 3, False),
    (128, 128, 64, 64, 8, 4, False),
    (128, 128, 64, 64, 8, 5, False),
    (128, 128, 64, 128, 8, 2, False),
    (128, 256, 0, 64, 8, 3, False),
    (128, 256, 0, 64, 8, 4, False),
    (128, 256, 0, 64, 8, 3, True),
    (256, 64, 32, 64, 8, 4, False),
    (256, 128, 0, 64, 8, 3, False),
    (256, 128, 0, 64, 8, 4, False),
)
# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages.
_FP32 = ((16, 64, 32, 4, 3), (32, 32, 32, 4, 3), (64, 64, 16, 4, 3), (16, 16, 64, 4, 3), (16, 16, 128, 4, 2))
_SHARED_MEMORY = 225_000
# Elements of a tile, a warp, of which two accumulators fit the registers: of 4096 some dozens move out once a tile.
_TWO_ACCUMULATORS = 4096


def candidates(dtype: torch.dtype, m: int, segments: int) -> Iterator[Tile]:
    """The tiles worth timing at ``m`` rows with K cut into ``segments``, each once."""
    yield from dict.fromkeys(_candidates(dtype, m, segments))


def _candidates(dtype: torch.dtype, m: int, segments: int) -> Iterator[Tile]:
    if dtype == torch.float32:
        yield from (Tile(*sizes) for sizes in _FP32 if sizes[0] <= max(16, 2 * m))
        return
    if m <= 128:
        yield from _narrow(max(16, m), segments)
    for block_m, block_n, side_n, block_k, warps, stages, swapped in (
        *(_MIDDLE if 64 <= m <= 1024 else ()),
        *(_WIDE if m >= 128 else ()),
    ):
        tile = Tile(block_m, block_n, block_k, warps, stages, swapped, side_n=side_n)
        if block_m <= max(64, m):  # else half of it is empty
            yield from _ways(tile, m, segments)


def _ways(tile: Tile, m: int, segments: int) -> Iterator[Tile]:
    elements = tile.block_m * (tile.block_n + tile.side_n)
    if segments > 1 and elements > _TWO_ACCUMULATORS * tile.warps:
        return
    if segments > 1 and m <= 1024:
        yield replace(tile, split=True)
    yield tile
    if elements >= 12288:
        yield replace(tile, persistent=True)
    if m <= 64 and segments == 1:
        yield replace(tile, prefetch_k=1024)
    if tile.side_n == 0:
        # Two products in one loop are made to wait for each other.
        flat = replace(tile, persistent=True, flatten=True)
        yield flat
        if segments > 1 and m >= 2048:
            yield replace(flat, whole_waves=True)
    if segments == 1 and elements >= 16384 and tile.side_n == 0 and tile.stages == 3 and m >= 256:
        yield replace(tile, persistent=True, tma_store=True)
    if m >= 2048 and elements >= 24576 and not tile.swapped:
        for group_m in (4, 16):
            yield replace(tile, group_m=group_m)
            if segments == 1 and tile.side_n == 0 and tile.stages == 3:
                yield replace(tile, persistent=True, tma_store=True, group_m=group_m)


def _narrow(rows: int, segments: int) -> Iterator[Tile]:
    for block_n, block_k, warps, stages in _NARROW:
        if (rows + block_n) * block_k * 2 * stages > _SHARED_MEMORY:
            continue
        if segments == 1:
            yield Tile(rows, block_n, block_k, warps, stages, True)
            yield Tile(rows, block_n, block_k, warps, stages, True, prefetch_k=1024)
        elif rows * block_n <= 8192:
            yield Tile(rows, block_n, block_k, warps, stages, True)
            yield Tile(rows, block_n, block_k, warps, stages, True, split=True)
