"""The tables that tiles are chosen from: by dtype, architecture, (N, K) and range of M."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .cublaslt import ALIGNMENT, Algorithm, CublasLt
from .tiles import SEGMENT_MULTIPLE, Tile, TilePlan, segments

_TABLES = Path(__file__).parent / "tile_tables"
_SOURCES = (
    *sorted(Path(__file__).parent.glob("matmul*.py")),
    *(Path(__file__).with_name(name) for name in ("cublaslt.py", "tiles.py", "tile_table.py")),
    *sorted(_TABLES.glob("*.json")),
)
# Identifies the tables and the kernels in caches of what was certified.
TABLE_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]
# Of the GPU that the table was measured on.
_MULTIPROCESSORS = 132
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
