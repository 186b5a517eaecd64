# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import itertools
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_deterministic.triton_kernels import tile_table
from vllm_deterministic.triton_kernels.cublaslt import Algorithm
from vllm_deterministic.triton_kernels.tile_table import AlgorithmTable, TileTable, tile_plan
from vllm_deterministic.triton_kernels.tiles import SEGMENT_MULTIPLE, Tile, TilePlan, segments

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = ((0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
FOLDER = Path(tile_table.__file__).parent
TABLES = sorted((FOLDER / "tile_tables").glob("*.json"))
TILE_TABLES = [path for path in TABLES if not path.stem.endswith("_cublaslt")]
ALGORITHM_TABLES = [path for path in TABLES if path.stem.endswith("_cublaslt")]
# What a launch may ask for: shared memory of an H200, and the stages that fit in it.
SHARED_BYTES = 232448
sizes = st.one_of(st.integers(1, 300), st.integers(1, 200_000))


def _tables() -> list[TileTable]:
    return [TileTable.parse(json.loads(path.read_text())) for path in TILE_TABLES]


def _check_tile(tile: Tile) -> None:
    for size in (tile.block_m, tile.block_n, tile.block_k):
        assert size >= 16
        assert size & (size - 1) == 0
    assert tile.side_n & (tile.side_n - 1) == 0
    assert SEGMENT_MULTIPLE % tile.block_k == 0, "a tile would reach across a boundary of segments"
    assert tile.warps in (1, 2, 4, 8, 16)
    assert tile.stages >= 1


@settings(max_examples=200, deadline=None)
@given(n=sizes, k=sizes, dtype=st.sampled_from(DTYPES), capability=st.sampled_from(CAPABILITIES))
def test_every_weight_has_a_tile_for_every_number_of_rows(
    n: int, k: int, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    plan = tile_plan(dtype, capability, n, k)
    assert (plan.n, plan.k, plan.segments) == (n, k, segments(n, k))
    lasts = [last for last, _ in plan.ranges]
    assert lasts == sorted(set(lasts))
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(plan.ranges)), "neighbours of one tile"
    for m in {1, 2, 100_000, *lasts, *(last + 1 for last in lasts)}:
        expected = next((tile for last, tile in plan.ranges if m <= last), plan.ranges[-1][1])
        assert plan.tile(m) is expected
        assert plan.tile(m) in plan.tiles
    assert len(set(plan.tiles)) == len(plan.tiles)
    for tile in plan.tiles:
        _check_tile(tile)


@settings(max_examples=200, deadline=None)
@given(n=sizes, k=sizes)
def test_weights_that_were_not_measured_get_tiles_that_suit_them(n: int, k: int) -> None:
    parts = segments(n, k)
    for tile in tile_plan(torch.bfloat16, (9, 0), n, k).tiles:
        if parts == 1:
            assert not tile.split
        elif not tile.split and (n, k) not in _tables()[0].shapes:
            assert tile.block_m * (tile.block_n + tile.side_n) <= 2048 * tile.warps


@pytest.mark.parametrize("path", TILE_TABLES, ids=lambda path: path.stem)
def test_tile_tables_are_complete(path: Path) -> None:
    table = TileTable.parse(json.loads(path.read_text()))
    assert list(table.last_m) == sorted(set(table.last_m))
    assert len(set(table.tiles)) == len(table.tiles)
    assert len(table.costs) == len(table.last_m)
    assert all(len(row) == len(table.tiles) for row in table.costs)
    assert all(cost is None or cost > 0 for row in table.costs for cost in row)
    for (n, k), chosen in table.shapes.items():
        assert len(chosen) == len(table.last_m)
        assert set(chosen) <= set(range(len(table.tiles)))
        for m, tile in table.ranges(n, k, segments(n, k)):
            _check_tile(tile)
            assert not tile.split or segments(n, k) > 1, (n, k, m)
            operands = (tile.block_m + tile.block_n + tile.side_n) * tile.block_k * 2 * tile.stages
            assert operands <= SHARED_BYTES, (n, k, m)


@pytest.mark.parametrize("path", ALGORITHM_TABLES, ids=lambda path: path.stem)
def test_algorithm_tables_are_complete(path: Path) -> None:
    table = AlgorithmTable.parse(json.loads(path.read_text()))
    assert list(table.last_m) == sorted(set(table.last_m))
    assert len(set(table.algorithms)) == len(table.algorithms)
    named = {index for chosen in table.shapes.values() for index in chosen if index is not None}
    assert named == set(range(len(table.algorithms)))
    assert all(len(chosen) == len(table.last_m) for chosen in table.shapes.values())
    assert set(table.shapes) == set(_tables()[0].shapes)


class Library:
    """Suggests an algorithm that tells what it was asked for."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.asked: list[tuple[int, ...]] = []

    def suggest(self, dtype: torch.dtype, m: int, n: int, k: int, segments: int) -> list[Algorithm]:
        self.asked.append((m, n, k, segments))
        return [Algorithm(66, m, 0, 0, 0, 0, 0)] if m < 1000 else []


def test_the_library_is_taken_as_measured_with_the_version_that_was_measured() -> None:
    table = AlgorithmTable.parse(json.loads(ALGORITHM_TABLES[0].read_text()))
    for (n, k), chosen in table.shapes.items():
        for dtype in (torch.bfloat16, torch.float16):
            library = Library(table.version)
            plan = tile_plan(dtype, (9, 0), n, k, library)
            assert not library.asked
            for m, index in zip(table.last_m, chosen, strict=True):
                assert plan.algorithm(m) == (None if index is None else table.algorithms[index])
            assert plan.algorithm(100_000) == plan.algorithm(table.last_m[-1])
            assert plan == replace(tile_plan(dtype, (9, 0), n, k), library=plan.library)


@pytest.mark.parametrize(
    ("version", "capability", "n", "k"),
    [(0, (9, 0), 6144, 4096), (None, (8, 0), 6144, 4096), (None, (9, 0), 1000, 8008), (None, (9, 0), 1024, 8192)],
)
def test_the_library_chooses_what_was_not_measured(
    version: int | None, capability: tuple[int, int], n: int, k: int
) -> None:
    library = Library(
        AlgorithmTable.parse(json.loads(ALGORITHM_TABLES[0].read_text())).version if version is None else version
    )
    plan = tile_plan(torch.bfloat16, capability, n, k, library)
    first = 256 if plan.segments == 2 and k % 512 == 0 else 64
    if plan.segments == 2 and k % 512:
        assert plan.library == ()  # the halves of K would be of another length than the tiles' segments
        return
    assert {asked[1:] for asked in library.asked} == {(n, k, plan.segments)}
    assert plan.algorithm(first) is None
    assert plan.algorithm(first + 1) == plan.algorithm(min(m for m, *_ in library.asked))
    assert plan.algorithm(896).tile == 896
    assert plan.algorithm(8192) is None, "where it has no suggestion the tile serves"


@pytest.mark.parametrize(
    ("dtype", "n", "k"),
    [(torch.float32, 6144, 4096), (torch.bfloat16, 6145, 4096), (torch.bfloat16, 6144, 4097)],
)
def test_the_library_is_left_out_where_it_cannot_read(dtype: torch.dtype, n: int, k: int) -> None:
    assert tile_plan(dtype, (9, 0), n, k, Library(0)).library == ()


def test_segments_are_the_weights_own() -> None:
    assert segments(768, 4096) == 2
    assert segments(2048, 4096) == 2
    assert segments(2049, 4096) == segments(768, 4095) == 1


def test_dropped_tiles_are_replaced() -> None:
    a, b, c = (Tile(size, 64, 64, warps=4, stages=3) for size in (16, 32, 64))
    plan = TilePlan(100, 200, 1, ((16, a), (64, b), (128, a), (8192, c)))
    assert plan.without([]) == plan
    for dropped in ([a], [b], [c], [a, b], [a, c], [b, c]):
        left = plan.without(dropped)
        assert not set(left.tiles) & set(dropped)
        assert left.ranges[-1][0] == 8192
        for m in (1, 16, 17, 64, 65, 128, 129, 8192, 100_000):
            assert left.tile(m) == plan.tile(m) or plan.tile(m) in dropped
    with pytest.raises(ValueError, match="no tile is left for N=100, K=200"):
        plan.without([a, b, c])
    assert TilePlan(100, 200, 1, ((16, a), (8192, c))).without([c]).tile(100_000) == a


def test_dropped_algorithms_give_way_to_tiles() -> None:
    tile = Tile(16, 64, 64, warps=4, stages=3)
    a, b = (Algorithm(66, number, 0, 0, 0, 0, 0) for number in (1, 2))
    plan = TilePlan(100, 200, 1, ((1 << 30, tile),), ((64, None), (256, a), (512, b), (8192, a)))
    assert plan.tiles == (tile, a, b)
    assert [plan.algorithm(m) for m in (64, 65, 256, 257, 512, 513, 9000)] == [None, a, a, b, b, a, a]
    assert list(plan.rows(a)) == [(64, 256), (512, 8192)]
    left = plan.without([a])
    assert left.tiles == (tile, b)
    assert [left.algorithm(m) for m in (65, 257, 9000)] == [None, b, None]
    with pytest.raises(ValueError, match="no tile is left"):
        plan.without([tile])


def test_the_version_follows_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "tile_table.py",
        "tiles.py",
        "cublaslt.py",
        "matmul.py",
        "matmul_kernel.py",
        *(str(path.relative_to(FOLDER)) for path in TABLES),
    ]

    def version() -> str:
        return str(runpy.run_module("copied.tile_table")["TABLE_VERSION"])

    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "copied"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / name, folder / name)
    assert version() == tile_table.TABLE_VERSION
    for name in names:
        with (folder / name).open("a") as file:
            file.write(" " if name.endswith("json") else "#")
        changed = version()
        assert changed != tile_table.TABLE_VERSION, name
        shutil.copy(FOLDER / name, folder / name)
