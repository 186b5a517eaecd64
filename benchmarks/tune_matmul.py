"""Makes the tile table of the matrix product for the GPU at hand, by measuring: one command for a new GPU.

    python benchmarks/tune_matmul.py tuning/          # on the GPU, some minutes; again to resume
    python benchmarks/make_tile_table.py tuning/      # anywhere: writes triton_kernels/tile_tables/

With ``--only`` some shapes are measured, and what is found goes into the table that is there:

    python benchmarks/tune_matmul.py tuning/ --only 768,4096 1280,5120 --rows 1024 2048
    python benchmarks/make_tile_table.py tuning/ triton_kernels/tile_tables/sm90.json --improve

Every tile is first compared with its class's reference, byte for byte. Times are medians of CUDA graph replays with the
weights rotated past the L2 cache. All that runs on the GPU runs in a child process: a tile that hangs or crashes costs
the child, is noted, and is left out when the next child goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Warmup, environment, graph_time_us, in_parts, rotated_weights
from matmul_candidates import TUNED_M, candidates
from matmul_shapes import Shape, add_selection, arguments, selected
from vllm_deterministic.triton_kernels import matmul as matmul_module
from vllm_deterministic.triton_kernels.bit_class import mirrored, same_bytes
from vllm_deterministic.triton_kernels.cublaslt import cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.tile_table import tile_plan
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan, class_reference, segments

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HUNG = "hung or crashed"
STALLED_SECONDS, STARTING_SECONDS = 20, 60
matmul = matmul_module.matmul


class Journal:
    """What is known so far, a JSON line each, and the tile that is being tried."""

    def __init__(self, folder: Path) -> None:
        self.verdicts, self.records, self.trying = (
            folder / "verdicts.jsonl",
            folder / "records.jsonl",
            folder / "trying",
        )

    @staticmethod
    def read(path: Path) -> list[Any]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @staticmethod
    def add(path: Path, value: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(value) + "\n")

    def note_trying(self, dtype: torch.dtype, tile: Tile, segments: int) -> None:
        self.trying.write_text(json.dumps(_key(dtype, tile, segments)))

    def judged(self) -> dict[str, str]:
        """Verdict by key; the last one counts."""
        return {json.dumps(key): verdict for key, verdict in self.read(self.verdicts)}


def _key(dtype: torch.dtype, tile: Tile, segments: int) -> list[Any]:
    return [str(dtype), segments, list(astuple(tile))]


def _ways(key: list[Any]) -> tuple[bool, ...]:
    """How a tile works, whatever its sizes: where one such tile hangs, the others are not tried."""
    tile = Tile(*key[2])
    return (tile.persistent, tile.split, tile.tma_store, tile.side_n > 0, tile.prefetch_k > 0, tile.flatten)


@dataclass(frozen=True)
class Job:
    """A product at which tiles are timed.

    Attributes:
        tiles: with the number of segments.
        plan: what the present tables say, for the rows that a tile of whole waves leaves.
    """

    dtype: torch.dtype
    n: int
    k: int
    m: int
    tiles: tuple[tuple[Tile, int], ...]
    plan: TilePlan


def jobs(only: Sequence[Shape], rows: Sequence[int]) -> list[Job]:
    """Those of the chosen shapes, or all, in the order of measuring."""
    device = torch.device("cuda", torch.cuda.current_device())
    points = [(torch.bfloat16, *shape, m) for shape in selected(only) for m in TUNED_M]
    if not only:
        points += [(torch.float32, n, k, m) for n, k in ((4096, 4096), (12288, 2048)) for m in (1, 16, 64, 256, 1024)]
    made = []
    for dtype, n, k, m in points:
        if rows and m not in rows:
            continue
        own = segments(n, k)
        plan = tile_plan(dtype, capability(device), n, k, cublaslt(device))
        numbers = (own,) if only or own == 1 or dtype == torch.float32 else (1, 2)
        tiles = [(tile, number) for number in numbers for tile in candidates(dtype, m, number)]
        made.append(Job(dtype, n, k, m, tuple(dict.fromkeys([*tiles, (plan.tile(m), own)])), plan))
    return made


def all_tiles(jobs: Sequence[Job], dtype: torch.dtype) -> list[tuple[Tile, int]]:
    """Every tile with every number of segments, once."""
    return list(dict.fromkeys(pair for job in jobs if job.dtype == dtype for pair in job.tiles))


def compile_part(jobs: Sequence[Job], part: int, parts: int) -> None:
    """Compile a part of the tiles into Triton's cache on disk, without running them."""
    matmul_module.matmul_kernel = Warmup(matmul_module.matmul_kernel)
    for dtype in DTYPES:
        x, w = (torch.empty(rows, 4096, device="cuda", dtype=dtype) for rows in (512, 768))
        # Whole waves are no other kernel.
        kernels = dict.fromkeys((replace(tile, whole_waves=False), number) for tile, number in all_tiles(jobs, dtype))
        for tile, number in list(kernels)[part::parts]:
            try:
                matmul(x, w, tile=tile, segments=number)
            except Exception as error:
                print("cannot compile", tile, number, type(error).__name__, flush=True)


def compare_with_class(jobs: Sequence[Job], journal: Journal) -> None:
    """Judge every tile that has no verdict yet."""
    judged = journal.judged()
    hung = {_ways(json.loads(key)) for key, verdict in judged.items() if verdict == HUNG}
    for dtype in {job.dtype for job in jobs}:
        generator = torch.Generator().manual_seed(0)
        x = mirrored(300, 4096, sign=-1, dtype=dtype, generator=generator).cuda()
        w = mirrored(768, 4096, sign=1, dtype=dtype, generator=generator).cuda()
        references: dict[int, torch.Tensor] = {}
        for tile, number in all_tiles(jobs, dtype):
            key = _key(dtype, tile, number)
            if json.dumps(key) in judged or _ways(key) in hung:
                continue
            if number not in references:
                references[number] = matmul(x, w, tile=class_reference(dtype), segments=number)
            journal.note_trying(dtype, tile, number)
            try:
                same = same_bytes(matmul(x, w, tile=tile, segments=number), references[number])
                verdict = "in class" if same else "outside"
            except Exception as error:
                verdict = f"cannot: {type(error).__name__}"
                torch.cuda.synchronize()  # ends this process where the error is one of the device
            journal.add(journal.verdicts, [key, verdict])
        if 1 in references:
            torch.backends.cuda.matmul.allow_tf32 = False
            journal.add(journal.verdicts, [[str(dtype), "library"], str(same_bytes(torch.mm(x, w.t()), references[1]))])


def time_all(jobs: Sequence[Job], journal: Journal) -> None:
    """Time every tile of the class at every job that has no record yet."""
    good = {key for key, verdict in journal.judged().items() if verdict == "in class"}
    done = {(r["dtype"], r["n"], r["k"], r["m"]) for r in journal.read(journal.records)}
    made_for, weights = None, []
    for job in jobs:
        dtype, n, k, m = job.dtype, job.n, job.k, job.m
        if (str(dtype), n, k, m) in done:
            continue
        if made_for != (dtype, n, k):
            weights = []  # those of the shape before go first
            weights = rotated_weights(n, k, dtype)
            made_for = (dtype, n, k)
        x = torch.randn(m, k, device="cuda", dtype=dtype)

        def timed(product: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor] = weights) -> float:
            return graph_time_us(lambda: [product(w) for w in weights], len(weights), budget_us=20_000, replays=5)

        def product(tile: Tile, number: int, x: torch.Tensor = x, plan: TilePlan = job.plan) -> float:
            return timed(lambda w: matmul(x, w, plan=plan, tile=tile, segments=number))

        library = [timed(lambda w, x=x: torch.mm(x, w.t()))]
        times = []
        for tile, number in job.tiles:
            if json.dumps(_key(dtype, tile, number)) in good:
                journal.note_trying(dtype, tile, number)
                times.append([number, list(astuple(tile)), round(product(tile, number), 2)])
        library.append(timed(lambda w, x=x: torch.mm(x, w.t())))
        journal.add(
            journal.records, {"dtype": str(dtype), "n": n, "k": k, "m": m, "library_us": library, "tiles": times}
        )
        best = min(times, key=lambda row: row[2])
        print(f"{n:6} {k:6} {m:5}  torch.mm {min(library):8.2f}  best {best[2]:8.2f}  {best[1]}", flush=True)


def watch(command: list[str], journal: Journal, until: float) -> bool:
    """Run a child to its end; True when it finished. A tile that it hung or crashed on gets its verdict."""
    journal.trying.write_text("")
    child = subprocess.Popen(command)
    while child.poll() is None:
        time.sleep(0.5)
        limit = STALLED_SECONDS if journal.trying.stat().st_size else STARTING_SECONDS
        stalled = time.time() - journal.trying.stat().st_mtime > limit
        if stalled or time.monotonic() > until:
            child.kill()
            child.wait()
            if not stalled:
                print("out of time", flush=True)
                return True
            break
    if child.returncode == 0:
        return True
    trying = journal.trying.read_text()
    print("hung or crashed:", child.returncode, trying, flush=True)
    if not trying:
        return True
    journal.add(journal.verdicts, [json.loads(trying), HUNG])
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time and keep what is measured")
    add_selection(parser)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    args = parser.parse_args()
    journal, until = Journal(args.folder), time.monotonic() + args.seconds
    if args.role == "child":
        todo = jobs(args.only, args.rows)
        compare_with_class(todo, journal)
        time_all(todo, journal)
        return
    if args.role:
        compile_part(jobs(args.only, args.rows), *map(int, args.role.split("/")))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    command = [__file__, str(args.folder), *arguments(args), "--role"]
    in_parts(command)
    print(f"compiled, {until - time.monotonic():.0f} s left", flush=True)
    while time.monotonic() < until and not watch([sys.executable, *command, "child"], journal, until):
        pass
    (args.folder / "environment.json").write_text(json.dumps(environment(args.commit)))


if __name__ == "__main__":
    main()
