"""The tiles of the matrix product: which shape of work a program takes, by dtype, architecture, (N, K) and range of M.

All tiles of a table are of one bit class (``certify`` proves it on the machine at hand), so the choice moves time alone.
Only ``segments``, the number of parts that K is cut into, is part of the bytes; it follows (N, K) and never M.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch

# Identifies the table, and with it every choice that is part of the bytes, in caches of what was certified.
TABLE_VERSION = "0"
# K segments begin at multiples of this many columns, which every BLOCK_K divides.
SEGMENT_MULTIPLE = 256


@dataclass(frozen=True, order=True)
class Tile:
    """How one product is cut into programs.

    Attributes:
        block_m, block_n, block_k: elements of M, N and K that a program takes at a time; powers of two from 16.
        warps: warps of a program.
        stages: loads in flight along K.
        swapped: the matrix unit gets ``(w @ x.T).T``, so that few rows of x fill its narrow side.
        persistent: one program a multiprocessor walks many tiles.
        split: each K segment has programs of its own and a second kernel folds them; else one program walks all.
        tma: operands come by tensor descriptors (Hopper and newer) where their layout allows.
        tma_store: the result goes by tensor descriptor too.
        side_n: further columns of N in a second product, for tiles whose width is no power of two; 0 for none.
        prefetch_k: columns of its weights that a program asks into the cache while the kernel ahead of it still runs.
        group_m: tiles of M that go through N together.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swapped: bool = False
    persistent: bool = False
    split: bool = False
    tma: bool = True
    tma_store: bool = False
    side_n: int = 0
    prefetch_k: int = 0
    group_m: int = 8


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one weight.

    Attributes:
        n, k: the weight's shape ``[N, K]``.
        segments: parts of K, each accumulated apart and added in ascending order.
        ranges: ``(last M, tile)`` in ascending order; the last tile serves every larger M.
    """

    n: int
    k: int
    segments: int
    ranges: tuple[tuple[int, Tile], ...]

    def tile(self, m: int) -> Tile:
        """The tile for ``m`` rows."""
        return next((tile for last, tile in self.ranges if m <= last), self.ranges[-1][1])

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Every tile that may be chosen, each once."""
        return tuple(dict.fromkeys(tile for _, tile in self.ranges))

    def without(self, dropped: Collection[Tile]) -> "TilePlan":
        """The plan with each dropped tile replaced by its nearest neighbour's, for smaller M first.

        Raises:
            ValueError: no tile is left.
        """
        kept = [(last, tile) for last, tile in self.ranges if tile not in dropped]
        if not kept:
            raise ValueError(f"no tile is left for N={self.n}, K={self.k}")
        last = self.ranges[-1][0]
        return replace(self, ranges=(*kept[:-1], (max(last, kept[-1][0]), kept[-1][1])))


def class_reference(dtype: torch.dtype) -> Tile:
    """The tile whose order of additions defines the bit class of a dtype: K ascending in each segment, no TMA, no swap."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, warps=4, stages=1, tma=False)
    return Tile(128, 128, 64, warps=8, stages=2, tma=False)


def segments(n: int, k: int) -> int:
    """Parts that K is cut into: more than one where N alone gives too few programs to draw all memory bandwidth."""
    return 1


def tile_plan(dtype: torch.dtype, capability: tuple[int, int], n: int, k: int) -> TilePlan:
    """The tiles for ``x[M, K] @ w[N, K].T``.

    Args:
        dtype: of x and w: bf16, fp16 or fp32.
        capability: of the device; (0, 0) for Triton's interpreter.
        n, k: the weight's shape.
    """
    return TilePlan(n, k, segments(n, k), tuple(_ranges(dtype)))


def _ranges(dtype: torch.dtype) -> Iterable[tuple[int, Tile]]:
    if dtype == torch.float32:
        yield 1 << 30, class_reference(dtype)
        return
    yield 16, Tile(16, 64, 128, 4, 5, swapped=True)
    yield 32, Tile(32, 64, 128, 4, 5, swapped=True)
    yield 64, Tile(64, 64, 128, 4, 4, swapped=True)
    yield 384, Tile(64, 128, 128, 4, 4)
    yield 1024, Tile(128, 128, 64, 4, 4, swapped=True)
    yield 1 << 30, Tile(128, 256, 64, 8, 4)
