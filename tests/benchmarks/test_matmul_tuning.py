# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
"""What is timed for the matrix product, and how a table takes in the tiles of a few shapes."""

import json
from argparse import ArgumentParser
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from make_tile_table import improve, read, write_table
from matmul_candidates import TUNED_M, candidates
from matmul_shapes import add_selection, arguments, selected, shapes
from vllm_deterministic.triton_kernels.tile_table import TileTable
from vllm_deterministic.triton_kernels.tiles import SEGMENT_MULTIPLE, Tile

A, B, C = (Tile(size, 64, 64, warps=4, stages=3) for size in (16, 32, 64))
FASTER = Tile(128, 128, 64, warps=8, stages=5, persistent=True, flatten=True)


def table() -> dict[str, Any]:
    """Two shapes at two ranges of M, its tiles written as before they could be flattened."""
    return {
        "last_m": [64, 8192],
        "tiles": [list(astuple(tile))[:13] for tile in (A, B, C)],
        "costs": [[1.0, None, 2.0], [None, 3.0, 4.0]],
        "shapes": {"768x4096": [0, 1], "6144x4096": [0, 2]},
    }


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("m", TUNED_M)
def test_candidates_can_be_launched(m: int, segments: int) -> None:
    tiles = list(candidates(torch.bfloat16, m, segments))
    assert len(tiles) == len(set(tiles)) > 20
    for tile in tiles:
        assert SEGMENT_MULTIPLE % tile.block_k == 0
        assert (tile.block_m + tile.block_n + tile.side_n) * tile.block_k * 2 * tile.stages <= 232448
        assert segments > 1 or not tile.split
        assert tile.persistent or not (tile.flatten or tile.whole_waves)
        assert not (tile.flatten and tile.side_n), "the compiler makes two products wait for each other"


def test_faster_tiles_take_their_places_and_the_rest_stays() -> None:
    content = table()
    changed = improve(content, {64: {(768, 4096): {A: 10.0, B: 9.95}}, 8192: {(768, 4096): {B: 10.0, FASTER: 8.0}}})
    assert [line.partition(", Tile")[0] for line in changed] == ["768x4096 M <= 8192: 10.00 -> 8.00 us"]
    parsed = TileTable.parse(content)
    assert [tile for _, tile in parsed.ranges(768, 4096, 2)] == [A, FASTER]
    assert [tile for _, tile in parsed.ranges(6144, 4096, 1)] == [A, C]
    assert parsed.costs == ((1.0, None, 2.0, None), (None, 3.0, 4.0, None))


def test_a_range_is_cut_where_it_was_measured_within() -> None:
    content = table()
    improve(content, {4096: {(768, 4096): {B: 10.0, C: 8.0}}, 32: {}})
    parsed = TileTable.parse(content)
    assert parsed.ranges(768, 4096, 2) == [(64, A), (4096, C), (8192, B)]
    assert parsed.ranges(6144, 4096, 1) == [(64, A), (4096, C), (8192, C)]
    assert parsed.costs[1] == parsed.costs[2]


def test_records_are_read_at_the_segments_of_the_shape(tmp_path: Path) -> None:
    record = {"dtype": "torch.bfloat16", "n": 768, "k": 4096, "m": 64}
    times = [[1, list(astuple(A)), 1.0], [2, list(astuple(A)), 2.0], [2, list(astuple(B)), 3.0]]
    (tmp_path / "records.jsonl").write_text(json.dumps(record | {"tiles": times}) + "\n")
    points = read(tmp_path)
    assert points[64] == {(768, 4096): {A: 2.0, B: 3.0}}
    assert not any(at_m for m, at_m in points.items() if m != 64)


def test_a_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    write_table(table(), tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == table()


def test_a_selection_survives_the_command_line() -> None:
    parser = ArgumentParser()
    add_selection(parser)
    args = parser.parse_args(["--only", "768,4096", "1280,5120", "--rows", "64", "128"])
    assert args.only == [(768, 4096), (1280, 5120)]
    assert parser.parse_args(arguments(args)) == args
    assert arguments(parser.parse_args([])) == []
    assert list(selected(args.only)) == args.only
    assert list(selected([])) == list(shapes())
