"""The tiles that ``tune_matmul.py`` times."""

from collections.abc import Iterator

import torch
from matmul_shapes import M_VALUES
from vllm_deterministic.triton_kernels.tiles import Tile

# What is not timed borrows the tile of the next larger M.
TUNED_M = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)

# Each line: (BLOCK_M,) BLOCK_N, BLOCK_K, warps, stages (, swapped).
_NARROW = (
    (64, 128, 4, 5),
    (64, 128, 4, 4),
    (64, 256, 4, 3),
    (128, 128, 4, 4),
    (128, 64, 4, 6),
    (32, 128, 4, 6),
    (32, 256, 4, 4),
    (32, 256, 2, 4),
    (16, 256, 2, 6),
    (16, 512, 4, 4),
    (64, 64, 4, 8),
)
_MIDDLE = (
    (32, 64, 128, 4, 5, True),
    (64, 64, 128, 4, 5, True),
    (64, 128, 128, 4, 4, True),
    (64, 128, 64, 4, 6, True),
    (64, 64, 128, 4, 5, False),
    (64, 128, 128, 4, 4, False),
    (64, 128, 64, 4, 6, False),
    (64, 32, 128, 4, 5, False),
)
_WIDE = (
    (64, 256, 64, 4, 4, False),
    (128, 64, 128, 4, 4, True),
    (128, 64, 64, 4, 6, True),
    (128, 64, 128, 4, 4, False),
    (128, 128, 64, 4, 4, True),
    (128, 128, 64, 4, 4, False),
    (128, 128, 64, 8, 4, False),
    (128, 128, 128, 8, 3, False),
    (128, 256, 64, 8, 3, False),
    (128, 256, 64, 8, 4, False),
    (256, 128, 64, 8, 3, True),
    (256, 128, 64, 8, 4, False),
    (256, 64, 64, 4, 4, True),
)
_WARP_SPECIALIZED = (
    (64, 128, 64, 4),
    (64, 128, 128, 3),
    (128, 64, 128, 4),
    (128, 128, 64, 4),
    (128, 128, 128, 2),
    (128, 256, 64, 3),
    (128, 256, 64, 4),
    (256, 128, 64, 3),
    (256, 128, 64, 4),
)
_FP32 = (
    (16, 64, 32, 4, 3),
    (16, 64, 32, 8, 3),
    (32, 32, 32, 4, 3),
    (32, 64, 32, 4, 3),
    (64, 64, 16, 4, 3),
    (64, 64, 32, 8, 3),
    (128, 64, 16, 8, 3),
    (128, 128, 16, 8, 3),
)
_SHARED_MEMORY = 225_000


def candidates(dtype: torch.dtype, m: int, segments: int) -> Iterator[Tile]:
    """The tiles worth timing at ``m`` rows with K cut into ``segments``."""
    if dtype == torch.float32:
        yield from (Tile(*sizes) for sizes in _FP32 if sizes[0] <= max(16, 2 * m))
        return
    if m <= 128:
        yield from _narrow(max(16, m), segments)
    if m >= 64:
        for *sizes, swapped in (*(_MIDDLE if m <= 512 else ()), *(_WIDE if m > 64 else ())):
            # Two accumulators of a larger tile do not fit the registers.
            if segments == 1 or sizes[0] * sizes[1] <= 2048 * sizes[3]:
                yield from _wide(*sizes, swapped, m, segments)
    if m >= 128 and segments == 1:
        yield from _warp_specialized(m)


def _narrow(rows: int, segments: int) -> Iterator[Tile]:
    for block_n, block_k, warps, stages in _NARROW:
        if (rows + block_n) * block_k * 2 * stages > _SHARED_MEMORY:
            continue
        tile = dict(block_m=rows, block_n=block_n, block_k=block_k, warps=warps, stages=stages, swapped=True)
        if segments == 1:
            yield Tile(**tile)
            if block_k <= 256:
                yield Tile(**tile, prefetch_k=1024)
        elif rows * block_n <= 8192 and block_k <= 256:
            yield from (Tile(**tile), Tile(**tile, split=True))


def _wide(
    block_m: int, block_n: int, block_k: int, warps: int, stages: int, swapped: bool, m: int, segments: int
) -> Iterator[Tile]:
    big = block_m * block_n >= 16384
    for persistent in (False, True) if big else (False,):
        yield Tile(block_m, block_n, block_k, warps, stages, swapped=swapped, persistent=persistent)
    if segments > 1 and m <= 512 and not big:
        yield Tile(block_m, block_n, block_k, warps, stages, swapped=swapped, split=True)
    if segments == 1 and big and not swapped and stages == 3:
        yield Tile(block_m, block_n, block_k, warps, stages, persistent=True, tma_store=True)
    if segments == 1 and m >= 2048 and (block_n, stages) == (256, 4) and block_m == 128:
        yield from (Tile(block_m, block_n, block_k, warps, stages, group_m=group_m) for group_m in (4, 16))


def _warp_specialized(m: int) -> Iterator[Tile]:
    for block_m, block_n, block_k, stages in _WARP_SPECIALIZED:
        for persistent in (False, True):
            yield Tile(block_m, block_n, block_k, 4, stages, persistent=persistent, warp_specialized=True)
        if m >= 2048 and block_n == 256:
            for group_m in (4, 16):
                yield Tile(
                    block_m, block_n, block_k, 4, stages, persistent=True, warp_specialized=True, group_m=group_m
                )


def all_candidates(dtype: torch.dtype) -> list[tuple[Tile, int]]:
    """Every tile with every number of segments, once."""
    numbers = (1,) if dtype == torch.float32 else (1, 2, 4)
    return list(dict.fromkeys((t, s) for s in numbers for m in M_VALUES for t in candidates(dtype, m, s)))
