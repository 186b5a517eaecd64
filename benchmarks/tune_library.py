"""Finds where an algorithm of cuBLASLt is faster than the tile of the matrix product, and which: some minutes on a GPU.

    python benchmarks/tune_library.py triton_kernels/tile_tables/sm90_cublaslt.json
    python benchmarks/tune_library.py triton_kernels/tile_tables/sm90_cublaslt.json --only 768,4096 --rows 1024 2048

For each shape and range of M the library suggests algorithms; each is compared with the class reference, byte for byte,
and timed at the last M of the range, as is the tile that ``make_tile_table.py`` chose. Times are medians of CUDA graph
replays with the weights rotated past the L2 cache.

With ``--only`` or ``--rows`` the table that is there keeps what it has for all else, and its own algorithms of
neighbouring ranges are tried with those that the library suggests.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Warmup, environment, graph_time_us, in_parts, rotated_weights
from make_tile_table import write_table
from matmul_shapes import add_selection, arguments, selected
from vllm_deterministic.triton_kernels import matmul as matmul_module
from vllm_deterministic.triton_kernels.bit_class import mirrored, same_bytes
from vllm_deterministic.triton_kernels.cublaslt import Algorithm, CublasLt, cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.tile_table import AlgorithmTable, tile_plan
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan, class_reference

# An algorithm's tile wastes what M leaves of its last row of tiles, so that ranges are as narrow as tiles are high.
LAST_M = (
    *(16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048),
    *(2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
)
DTYPE = torch.bfloat16
SUGGESTIONS = 12
COMPARED_ROWS, COMPARED_COLUMNS = 1100, 8192
# Few rows are multiplied between kernels of ours, which start early after a tile and not after the library.
LIBRARY_GAIN = {m: 1.02 if m <= 64 else 1.0 for m in LAST_M}
# An algorithm that the shape has already is taken where it is no slower than this, so that fewer are certified.
SAME_ALGORITHM = 1.01
# An algorithm, or None for the tile, for each range of M.
Row = list[Algorithm | None]
matmul = matmul_module.matmul


def compile_part(args: argparse.Namespace, part: int, parts: int) -> None:
    """Compile a part of the tiles that the library is compared with."""
    matmul_module.matmul_kernel = Warmup(matmul_module.matmul_kernel)
    tiles = {}
    for n, k in selected(args.only):
        plan = tile_plan(DTYPE, torch.cuda.get_device_capability(), n, k)
        tiles |= {(plan.tile(m), plan.segments): k for m in LAST_M}
    for (tile, segments), k in list(tiles.items())[part::parts]:
        x, w = (torch.empty(rows, k, device="cuda", dtype=DTYPE) for rows in (512, 768))
        matmul(x, w, tile=tile, segments=segments)


class Shape:
    """One weight: which algorithms are in its class, and how long each takes."""

    def __init__(self, plan: TilePlan) -> None:
        self.plan = plan
        generator = torch.Generator("cuda").manual_seed(0)
        rows = {"dtype": DTYPE, "generator": generator}
        self.compared_x = mirrored(COMPARED_ROWS, plan.k, sign=-1, **rows)
        self.compared_w = mirrored(min(plan.n, COMPARED_COLUMNS), plan.k, sign=1, **rows)
        self.expected = self.product(self.compared_x, self.compared_w, class_reference(DTYPE))
        self.weights = rotated_weights(plan.n, plan.k, DTYPE)
        self.verdicts: dict[Algorithm, bool] = {}

    def product(self, x: torch.Tensor, w: torch.Tensor, tile: Tile | Algorithm) -> torch.Tensor:
        return matmul(x, w, plan=self.plan, tile=tile, segments=self.plan.segments)

    def is_in_class(self, algorithm: Algorithm) -> bool:
        if algorithm not in self.verdicts:
            self.verdicts[algorithm] = all(
                same_bytes(self.product(self.compared_x[:m], self.compared_w, algorithm), self.expected[:m])
                for m in (COMPARED_ROWS, 77, 1)
            )
        return self.verdicts[algorithm]

    def time_us(self, m: int, tile: Tile | Algorithm) -> float:
        x = torch.randn(m, self.plan.k, device="cuda", dtype=DTYPE)
        call: Callable[[], Any] = lambda: [self.product(x, w, tile) for w in self.weights]  # noqa: E731
        return graph_time_us(call, len(self.weights), budget_us=15_000, replays=5)

    def choose(self, library: CublasLt, table: Row, rows: Sequence[int]) -> Row:
        """The algorithm for each range of M; None where the tile is as fast.

        Args:
            table: what the present table has, None everywhere if there is none.
            rows: the ranges to measure; the others keep what the table has.
        """
        chosen: Row = []
        for at, m in enumerate(LAST_M):
            if m not in rows:
                chosen.append(table[at])
                continue
            had = [algorithm for algorithm in dict.fromkeys(reversed(chosen)) if algorithm]
            near = [algorithm for algorithm in table[max(0, at - 2) : at + 3] if algorithm]
            suggested = library.suggest(DTYPE, m, self.plan.n, self.plan.k, self.plan.segments, SUGGESTIONS)
            candidates = [a for a in dict.fromkeys([*suggested, *had[:2], *near]) if self.is_in_class(a)]
            times = {algorithm: self.time_us(m, algorithm) for algorithm in candidates}
            tile_us = self.time_us(m, self.plan.tile(m))
            best = min(times, key=times.__getitem__, default=None)
            if best is None or times[best] * LIBRARY_GAIN[m] >= tile_us:
                chosen.append(None)
                continue
            known = [a for a in had if a in times and times[a] <= SAME_ALGORITHM * times[best]]
            chosen.append(known[0] if known and times[known[0]] < tile_us else best)
        return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--commit", default="unknown")
    add_selection(parser)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_part(args, *map(int, args.compile.split("/")))
        return
    device = torch.device("cuda", torch.cuda.current_device())
    library = cublaslt(device)
    if library is None:
        parser.error("torch came without cuBLASLt")
    content: dict[str, Any] = {"version": library.version, "last_m": list(LAST_M), "algorithms": [], "shapes": {}}
    improving = bool(args.only or args.rows)
    if improving:
        content = json.loads(args.table.read_text())
        if content["version"] != library.version or content["last_m"] != list(LAST_M):
            parser.error(f"{args.table} is of another version or of other ranges: leave --only and --rows out")
    table = AlgorithmTable.parse(content)
    chosen: dict[tuple[int, int], Row] = {
        shape: [None if index is None else table.algorithms[index] for index in row]
        for shape, row in table.shapes.items()
    }
    in_parts([__file__, "-", *arguments(args), "--compile"])
    tried: dict[Algorithm, bool] = {}
    for n, k in selected(args.only):
        shape = Shape(tile_plan(DTYPE, capability(device), n, k, library))
        chosen[n, k] = shape.choose(library, chosen.get((n, k), [None] * len(LAST_M)), args.rows or LAST_M)
        for algorithm, good in shape.verdicts.items():
            tried[algorithm] = tried.get(algorithm, True) and good
        print(n, k, " ".join("." if a is None else "L" for a in chosen[n, k]), flush=True)
        del shape
        torch.cuda.empty_cache()
    algorithms = sorted({algorithm for row in chosen.values() for algorithm in row if algorithm})
    print(f"{sum(tried.values())} of {len(tried)} algorithms are in their class; the table names {len(algorithms)}")
    content["algorithms"] = [astuple(algorithm) for algorithm in algorithms]
    content["shapes"] = {
        f"{n}x{k}": [None if a is None else algorithms.index(a) for a in row] for (n, k), row in chosen.items()
    }
    if improving:
        content["improved"] = environment(args.commit) | {"shapes": [f"{n}x{k}" for n, k in selected(args.only)]}
    else:
        content = {"environment": environment(args.commit)} | content
    write_table(content, args.table)


if __name__ == "__main__":
    main()
