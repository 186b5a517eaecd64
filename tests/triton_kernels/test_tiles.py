# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import itertools
import json
import runpy
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_deterministic.triton_kernels import tiles
from vllm_deterministic.triton_kernels.tiles import SEGMENT_MULTIPLE, Tile, TilePlan, TileTable, segments, tile_plan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = ((0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
FOLDER = Path(tiles.__file__).parent
TABLES = sorted((FOLDER / "tile_tables").glob("*.json"))
# What a launch may ask for: shared memory of an H200, and the stages that fit in it.
SHARED_BYTES = 232448
sizes = st.one_of(st.integers(1, 300), st.integers(1, 200_000))


def _tables() -> list[TileTable]:
    return [TileTable.parse(json.loads(path.read_text())) for path in TABLES]


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


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_are_complete(path: Path) -> None:
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


def test_the_version_follows_every_byte(tmp_path: Path) -> None:
    names = ["tiles.py", "matmul.py", "matmul_kernel.py", *(str(path.relative_to(FOLDER)) for path in TABLES)]

    def version() -> str:
        return str(runpy.run_path(str(tmp_path / "tiles.py"))["TABLE_VERSION"])

    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER / name, tmp_path / name)
    assert version() == tiles.TABLE_VERSION
    for name in names:
        with (tmp_path / name).open("a") as file:
            file.write(" " if name.endswith("json") else "#")
        changed = version()
        assert changed != tiles.TABLE_VERSION, name
        shutil.copy(FOLDER / name, tmp_path / name)
