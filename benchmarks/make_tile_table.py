"""Writes the tile table from what ``tune_matmul.py`` measured, and says how good its rule for other shapes is.

    python benchmarks/make_tile_table.py tuning/ triton_kernels/tile_tables/sm90.json
    python benchmarks/make_tile_table.py tuning/ triton_kernels/tile_tables/sm90.json --improve

A few tiles serve all shapes, so that few kernels are compiled and certified: the set grows until every measured
point is within 4% of its best. For shapes that were not measured the time of a tile is modelled as its waves of
programs times its columns of K times a cost, the median of what was measured for that tile near that M.

With ``--improve`` the table that is there is kept, and the tiles that were measured take the places of slower ones.
"""

import argparse
import bisect
import json
import math
import statistics
from dataclasses import astuple
from pathlib import Path
from typing import Any

from matmul_candidates import TUNED_M
from matmul_shapes import Shape
from vllm_deterministic.triton_kernels.tile_table import TileTable
from vllm_deterministic.triton_kernels.tiles import Tile, segments

# M = 1 and 16 share their tile: fewer rows than the matrix unit takes cost the same.
STEPS = tuple(m for m in TUNED_M if m > 1)
# A tile takes another's place in a table where it takes less than this share of its time.
GAIN = 0.99
Times = dict[Tile, float]


def read(folder: Path) -> dict[int, dict[Shape, Times]]:
    """Microseconds by last M of a range, shape and tile, with the number of segments that the shape has."""
    points: dict[int, dict[Shape, Times]] = {m: {} for m in STEPS}
    raw = {}
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["dtype"] == "torch.bfloat16":
            n, k = record["n"], record["k"]
            times = {Tile(*fields): us for number, fields, us in record["tiles"] if number == segments(n, k)}
            raw[n, k, record["m"]] = times
    for (n, k, m), times in raw.items():
        if m > 1:
            alone = raw[n, k, 1] if m == 16 else times
            points[m][n, k] = {t: math.sqrt(us * alone[t]) for t, us in times.items() if t in alone}
    return points


def few_tiles(points: dict[int, dict[Shape, Times]], tolerance: float = 1.04) -> list[Tile]:
    """Tiles, the most useful first, of which one is within ``tolerance`` of the best at every point."""
    measured = [times for shapes in points.values() for times in shapes.values()]
    left = {tile for times in measured for tile in times}
    best_so_far = [math.inf] * len(measured)
    chosen: list[Tile] = []
    while any(best > tolerance * min(times.values()) for best, times in zip(best_so_far, measured, strict=True)):

        def total(tile: Tile, best_so_far: list[float] = best_so_far) -> float:
            return sum(
                math.log(min(best, times.get(tile, math.inf), 4 * min(times.values())) / min(times.values()))
                for best, times in zip(best_so_far, measured, strict=True)
            )

        tile = min(sorted(left), key=total)
        left.remove(tile)
        chosen.append(tile)
        best_so_far = [min(best, times.get(tile, math.inf)) for best, times in zip(best_so_far, measured, strict=True)]
    return chosen


def costs(
    points: dict[int, dict[Shape, Times]], tiles: list[Tile], without: Shape | None = None
) -> list[list[float | None]]:
    """Microseconds for a wave and a column of K, by range of M and tile; None where too little was measured."""
    table = []
    for m in STEPS:
        row: list[float | None] = []
        for tile in tiles:
            own = without not in points[m] or any(tile in times for s, times in points[m].items() if s != without)
            samples = [
                times[tile] / TileTable.work(tile, near, n, k, segments(n, k))
                for near in (m // 2, m, 2 * m)
                for (n, k), times in points.get(near, {}).items()
                if tile in times and (n, k) != without
            ]
            row.append(round(statistics.median(samples), 7) if own and len(samples) >= 3 else None)
        table.append(row)
    return table


def improve(content: dict[str, Any], points: dict[int, dict[Shape, Times]]) -> list[str]:
    """Put the faster of the tiles that were measured into a table: what was changed, a line each."""
    tiles = [Tile(*fields) for fields in content["tiles"]]
    changed = []
    for m, shapes in points.items():
        if not shapes:
            continue
        at = bisect.bisect_left(content["last_m"], m)
        if content["last_m"][at] != m:
            # What held for the range up to a larger M holds for both of its parts.
            content["last_m"].insert(at, m)
            for rows in (content["costs"], *content["shapes"].values()):
                rows.insert(at, list(rows[at]) if rows is content["costs"] else rows[at])
        for (n, k), times in shapes.items():
            row = content["shapes"][f"{n}x{k}"]
            before, best = tiles[row[at]], min(times, key=times.__getitem__)
            if times[best] > GAIN * times.get(before, math.inf):
                continue
            if best not in tiles:
                tiles.append(best)
                for costs in content["costs"]:
                    costs.append(None)
            row[at] = tiles.index(best)
            changed.append(f"{n}x{k} M <= {m}: {times.get(before, math.nan):.2f} -> {times[best]:.2f} us, {best}")
    content["tiles"] = [astuple(tile) for tile in tiles]
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--improve", action="store_true", help="keep the table but for the shapes that were measured")
    args = parser.parse_args()
    points = read(args.folder)
    measured_on = json.loads((args.folder / "environment.json").read_text())
    if args.improve:
        content = json.loads(args.table.read_text())
        print(*improve(content, points), sep="\n")
        shapes = sorted({f"{n}x{k}" for at_m in points.values() for n, k in at_m})
        content["improved"] = measured_on | {"shapes": shapes}
        write_table(content, args.table)
        return
    tiles = few_tiles(points)

    def table(without: Shape | None) -> dict[str, Any]:
        return {
            "environment": measured_on,
            "last_m": STEPS,
            "tiles": [list(vars(tile).values()) for tile in tiles],
            "costs": costs(points, tiles, without),
            "shapes": {
                f"{n}x{k}": [
                    tiles.index(min((t for t in tiles if t in points[m][n, k]), key=points[m][n, k].__getitem__))
                    for m in STEPS
                ]
                for n, k in points[STEPS[0]]
                if (n, k) != without
            },
        }

    regrets = {m: [] for m in STEPS}
    for n, k in points[STEPS[0]]:
        ranges = TileTable.parse(table(without=(n, k))).ranges(n, k, segments(n, k))
        for m, (_, tile) in zip(STEPS, ranges, strict=True):
            times = points[m][n, k]
            regrets[m].append(times.get(tile, math.inf) / min(times.values()))
    print(f"{len(tiles)} tiles; a shape that is not in the table, over its best measured tile:")
    for m, values in regrets.items():
        print(f"  M <= {m}: geometric mean {statistics.geometric_mean(values):.3f}, worst {max(values):.2f}")
    args.table.parent.mkdir(exist_ok=True)
    write_table(table(None), args.table)


def write_table(content: dict[str, Any], path: Path) -> None:
    """A row of the table a line."""
    written = json.dumps(content).replace("], [", "],\n[").replace('], "', '],\n"').replace('}, "', '},\n"')
    path.write_text(written + "\n")


if __name__ == "__main__":
    main()
