"""The tiles of the matrix product: the work of one program, and which of them a weight uses at which M.

For many rows the fastest tile of all is the vendor's, so an algorithm of cuBLASLt may stand in a tile's place.

All tiles are of one bit class (``certify`` proves it on the machine at hand), so the choice moves time alone.
Only ``segments``, the number of parts that K is cut into, is part of the bytes; it follows (N, K) and never M.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .cublaslt import Algorithm

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
        flatten: a program's loads run ahead from each segment and tile to its next, so that none starts with a wait.
        whole_waves: rows past the last whole wave of persistent programs, where they are half a wave or less, are a
            product of their own, at the tile that the plan has for as many.
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
    flatten: bool = False
    whole_waves: bool = False

    def whole_wave_rows(self, m: int, n: int, programs: int) -> int:
        """The rows that come first where the others are a product of their own; ``m`` where there are none.

        Args:
            m, n: rows and columns of the result.
            programs: as many as run at once.
        """
        across = -(-n // (self.block_n + self.side_n))
        waves, left = divmod(-(-m // self.block_m) * across, programs)
        first = waves * programs // across * self.block_m
        return first if self.whole_waves and first and 0 < 2 * left <= programs else m


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one weight.

    Attributes:
        n, k: the weight's shape ``[N, K]``.
        segments: parts of K, each accumulated apart and added in ascending order.
        ranges: ``(last M, tile)`` in ascending order; the last tile serves every larger M.
        library: ``(last M, algorithm)`` likewise, of the ranges in which an algorithm of cuBLASLt is to be preferred
            where it can read the operands as they lie; None in the others.
    """

    n: int
    k: int
    segments: int
    ranges: tuple[tuple[int, Tile], ...]
    library: tuple[tuple[int, Algorithm | None], ...] = ()

    def tile(self, m: int) -> Tile:
        """The tile for ``m`` rows."""
        return _chosen(self.ranges, m)

    def algorithm(self, m: int) -> Algorithm | None:
        """The library's algorithm for ``m`` rows, or None where the tile is to be used."""
        return _chosen(self.library, m) if self.library else None

    @property
    def tiles(self) -> tuple[Tile | Algorithm, ...]:
        """Every tile and algorithm that may be chosen, each once."""
        algorithms = (algorithm for _, algorithm in self.library if algorithm)
        return tuple(dict.fromkeys((*(tile for _, tile in self.ranges), *algorithms)))

    def rows(self, tile: Tile | Algorithm) -> Iterator[tuple[int, int]]:
        """``(M before the first, last M)`` of each range in which ``tile`` may be chosen."""
        for ranges in (self.ranges, self.library):
            before = 0
            for last, chosen in ranges:
                if chosen == tile:
                    yield before, last
                before = last

    def without(self, dropped: Collection[Tile | Algorithm]) -> "TilePlan":
        """The plan without what is dropped: a tile gives way to that of the next larger range of M, or to the last one
        kept; an algorithm gives way to the tile.

        Raises:
            ValueError: no tile is left.
        """
        kept = [(last, tile) for last, tile in self.ranges if tile not in dropped]
        if not kept:
            raise ValueError(f"no tile is left for N={self.n}, K={self.k}")
        last = self.ranges[-1][0]
        library = tuple((m, None if algorithm in dropped else algorithm) for m, algorithm in self.library)
        return replace(self, ranges=(*kept[:-1], (max(last, kept[-1][0]), kept[-1][1])), library=library)


_Choice = TypeVar("_Choice", Tile, Algorithm | None)


def _chosen(ranges: Sequence[tuple[int, _Choice]], m: int) -> _Choice:
    return next((choice for last, choice in ranges if m <= last), ranges[-1][1])


def class_reference(dtype: torch.dtype) -> Tile:
    """The tile that defines the bit class of a dtype: K ascending in each segment, no TMA, no swap."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, warps=4, stages=1, tma=False)
    return Tile(128, 128, 64, warps=8, stages=2, tma=False)


def segments(n: int, k: int) -> int:
    """Parts that K is cut into: more than one where N alone gives too few programs to draw all memory bandwidth."""
    return 2 if n <= 2048 and k >= 4096 else 1
