"""The tiles of the matrix product: the work of one program, by dtype, architecture, (N, K) and range of M.

For many rows the fastest tile of all is the vendor's, so an algorithm of cuBLASLt may stand in a tile's place.

All tiles are of one bit class (``certify`` proves it on the machine at hand), so the choice moves time alone.
Only ``segments``, the number of parts that K is cut into, is part of the bytes; it follows (N, K) and never M.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .cublaslt import ALIGNMENT, Algorithm, CublasLt

_TABLES = Path(__file__).parent / "tile_tables"
_SOURCES = (
    *sorted(Path(__file__).parent.glob("matmul*.py")),
    Path(__file__).with_name("cublaslt.py"),
    Path(__file__),
    *sorted(_TABLES.glob("*.json")),
)
# Identifies the tables and the kernel in caches of what was certified.
TABLE_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]
# Of the GPU that the table was measured on.
_MULTIPROCESSORS = 132
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
        return next((tile for last, tile in self.ranges if m <= last), self.ranges[-1][1])

    def algorithm(self, m: int) -> Algorithm | None:
        """The library's algorithm for ``m`` rows, or None where the tile is to be used."""
        after = self.library[-1][1] if self.library else None
        return next((algorithm for last, algorithm in self.library if m <= last), after)

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


def class_reference(dtype: torch.dtype) -> Tile:
    """The tile that defines the bit class of a dtype: K ascending in each segment, no TMA, no swap."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, warps=4, stages=1, tma=False)
    return Tile(128, 128, 64, warps=8, stages=2, tma=False)


def segments(n: int, k: int) -> int:
    """Parts that K is cut into: more than one where N alone gives too few programs to draw all memory bandwidth."""
    return 2 if n <= 2048 and k >= 4096 else 1


_FP32 = (
    (16, Tile(16, 16, 64, warps=4, stages=3)),
    (64, Tile(32, 32, 32, warps=4, stages=3)),
    (1 << 30, Tile(64, 64, 16, warps=4, stages=3)),
)
# Small enough for the shared memory of every GPU from sm_80 on.
_UNTUNED = (
    (16, Tile(16, 64, 64, warps=4, stages=4, swapped=True)),
    (32, Tile(32, 64, 64, warps=4, stages=4, swapped=True)),
    (64, Tile(64, 64, 64, warps=4, stages=4)),
    (1 << 30, Tile(128, 128, 32, warps=8, stages=4)),
)


# Rows past which the library's own choice is taken for shapes that were not measured, by the parts of K.
_LIBRARY_FROM = {1: 64, 2: 256}


@dataclass(frozen=True)
class TileTable:
    """What ``benchmarks/make_tile_table.py`` wrote for one architecture, from measurements in bf16.

    Attributes:
        last_m: the last M of each range.
        tiles: every tile of the table.
        costs: microseconds for a wave of programs and a column of K, by range and tile; None where it was not measured.
        shapes: index of the tile by range, for each ``(N, K)`` that was measured.
    """

    last_m: tuple[int, ...]
    tiles: tuple[Tile, ...]
    costs: tuple[tuple[float | None, ...], ...]
    shapes: dict[tuple[int, int], tuple[int, ...]]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "TileTable":
        """The table from the content of its file."""
        return cls(
            tuple(content["last_m"]),
            tuple(Tile(*fields) for fields in content["tiles"]),
            tuple(tuple(row) for row in content["costs"]),
            {tuple(map(int, shape.split("x"))): tuple(row) for shape, row in content["shapes"].items()},
        )

    def ranges(self, n: int, k: int, segments: int) -> list[tuple[int, Tile]]:
        """``(last M, tile)`` for one weight: as measured, or by the least modelled time where it was not."""
        chosen = self.shapes.get((n, k)) or [
            min(
                (i for i, cost in enumerate(costs) if cost is not None and self._suits(self.tiles[i], segments)),
                key=lambda i: costs[i] * self.work(self.tiles[i], m, n, k, segments),
            )
            for m, costs in zip(self.last_m, self.costs, strict=True)
        ]
        return [(m, self.tiles[index]) for m, index in zip(self.last_m, chosen, strict=True)]

    @staticmethod
    def _suits(tile: Tile, segments: int) -> bool:
        if segments == 1 or tile.split:
            return segments > 1 or not tile.split
        # A program that walks several segments keeps two accumulators in registers.
        return tile.block_m * (tile.block_n + tile.side_n) <= 2048 * tile.warps

    @staticmethod
    def work(tile: Tile, m: int, n: int, k: int, segments: int) -> float:
        """Waves of programs times the columns of K that each walks: what a product's time follows."""
        split = segments if tile.split else 1
        programs = -(-m // tile.block_m) * -(-n // (tile.block_n + tile.side_n)) * split
        return -(-programs // _MULTIPROCESSORS) * k / split


@dataclass(frozen=True)
class AlgorithmTable:
    """What ``benchmarks/tune_library.py`` wrote: where an algorithm of cuBLASLt was faster than the tile, and which.

    Attributes:
        version: of cuBLASLt; another knows other algorithms.
        last_m: the last M of each range.
        algorithms: every algorithm of the table.
        shapes: index of the algorithm by range, None where the tile was faster, for each ``(N, K)`` that was measured.
    """

    version: int
    last_m: tuple[int, ...]
    algorithms: tuple[Algorithm, ...]
    shapes: dict[tuple[int, int], tuple[int | None, ...]]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "AlgorithmTable":
        """The table from the content of its file."""
        return cls(
            content["version"],
            tuple(content["last_m"]),
            tuple(Algorithm(*fields) for fields in content["algorithms"]),
            {tuple(map(int, shape.split("x"))): tuple(row) for shape, row in content["shapes"].items()},
        )


@functools.cache
def _tiles() -> TileTable:
    return TileTable.parse(json.loads((_TABLES / "sm90.json").read_text()))


@functools.cache
def _algorithms() -> AlgorithmTable:
    return AlgorithmTable.parse(json.loads((_TABLES / "sm90_cublaslt.json").read_text()))


def surveyed(capability: tuple[int, int], library: CublasLt) -> bool:
    """Whether ``library`` is the one of which every algorithm that was tried, on this architecture, was in class."""
    return capability == (9, 0) and library.version == _algorithms().version


def tile_plan(
    dtype: torch.dtype, capability: tuple[int, int], n: int, k: int, library: CublasLt | None = None
) -> TilePlan:
    """The tiles for ``x[M, K] @ w[N, K].T``.

    Args:
        dtype: of x and w: bf16, fp16 or fp32.
        capability: of the device; (0, 0) for Triton's interpreter.
        n, k: the weight's shape.
        library: None leaves the library's algorithms out.
    """
    parts = segments(n, k)
    ranges: Sequence[tuple[int, Tile]]
    if dtype == torch.float32:
        ranges = _FP32
    elif capability == (9, 0):
        ranges = _tiles().ranges(n, k, parts)
    else:
        ranges = _UNTUNED
    algorithms = _library_ranges(dtype, capability, n, k, parts, library) if library else ()
    return TilePlan(n, k, parts, _merged(ranges), _merged(algorithms))


def _library_ranges(
    dtype: torch.dtype, capability: tuple[int, int], n: int, k: int, parts: int, library: CublasLt
) -> Sequence[tuple[int, Algorithm | None]]:
    """As measured, or the library's own choice for the last M of each range where nothing was measured."""
    aligned = ALIGNMENT // dtype.itemsize
    # The parts of K must be as long as those that the tiles walk.
    whole = aligned if parts == 1 else parts * SEGMENT_MULTIPLE
    if dtype == torch.float32 or n % aligned or k % whole:
        return ()
    table = _algorithms()
    if surveyed(capability, library) and (n, k) in table.shapes:
        chosen = [None if index is None else table.algorithms[index] for index in table.shapes[n, k]]
    else:
        chosen = [
            next(iter(library.suggest(dtype, m, n, k, parts)), None) if m > _LIBRARY_FROM[parts] else None
            for m in table.last_m
        ]
    return tuple(zip(table.last_m, chosen, strict=True))


_Chosen = TypeVar("_Chosen", Tile, Algorithm | None)


def _merged(ranges: Sequence[tuple[int, _Chosen]]) -> tuple[tuple[int, _Chosen], ...]:
    """The ranges with neighbours of one choice made one."""
    return tuple(
        pair for pair, following in itertools.pairwise((*ranges, None)) if not following or pair[1] != following[1]
    )
