"""The tiles of the matrix product: the work of one program, by dtype, architecture, (N, K) and range of M.

All tiles are of one bit class (``certify`` proves it on the machine at hand), so the choice moves time alone.
Only ``segments``, the number of parts that K is cut into, is part of the bytes; it follows (N, K) and never M.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

_TABLES = Path(__file__).parent / "tile_tables"
_SOURCES = (*sorted(Path(__file__).parent.glob("matmul*.py")), Path(__file__), *sorted(_TABLES.glob("*.json")))
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
        """The plan with each dropped tile replaced by that of the next larger range of M, or of the last one kept.

        Raises:
            ValueError: no tile is left.
        """
        kept = [(last, tile) for last, tile in self.ranges if tile not in dropped]
        if not kept:
            raise ValueError(f"no tile is left for N={self.n}, K={self.k}")
        last = self.ranges[-1][0]
        return replace(self, ranges=(*kept[:-1], (max(last, kept[-1][0]), kept[-1][1])))


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


@functools.cache
def _table(name: str) -> TileTable:
    return TileTable.parse(json.loads((_TABLES / f"{name}.json").read_text()))


def tile_plan(dtype: torch.dtype, capability: tuple[int, int], n: int, k: int) -> TilePlan:
    """The tiles for ``x[M, K] @ w[N, K].T``.

    Args:
        dtype: of x and w: bf16, fp16 or fp32.
        capability: of the device; (0, 0) for Triton's interpreter.
        n, k: the weight's shape.
    """
    parts = segments(n, k)
    if dtype == torch.float32:
        ranges = _FP32
    elif capability == (9, 0):
        ranges = tuple(_table("sm90").ranges(n, k, parts))
    else:
        ranges = _UNTUNED
    merged = [
        pair for pair, following in itertools.pairwise((*ranges, None)) if not following or pair[1] != following[1]
    ]
    return TilePlan(n, k, parts, tuple(merged))
