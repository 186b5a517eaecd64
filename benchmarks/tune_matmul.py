"""Makes the tile table of the matrix product for the GPU at hand, by measuring: one command for a new GPU.

    python benchmarks/tune_matmul.py tuning/          # on the GPU, some minutes; again to resume
    python benchmarks/make_tile_table.py tuning/      # anywhere: writes triton_kernels/tile_tables/

Every tile is first compared with its class's reference, byte for byte. Times are medians of CUDA graph replays with the
weights rotated past the L2 cache. All that runs on the GPU runs in a child process: a tile that hangs or crashes costs
the child, is noted, and is left out when the next child goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Warmup, environment, graph_time_us, in_parts, rotated_weights
from matmul_candidates import TUNED_M, all_candidates, candidates
from matmul_shapes import shapes
from vllm_deterministic.triton_kernels import matmul as matmul_module
from vllm_deterministic.triton_kernels.bit_class import mirrored, same_bytes
from vllm_deterministic.triton_kernels.tiles import Tile, class_reference

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
    return (tile.persistent, tile.split, tile.tma_store, tile.side_n > 0, tile.prefetch_k > 0)


def compile_part(part: int, parts: int) -> None:
    """Compile a part of the candidates into Triton's cache on disk, without running them."""
    matmul_module.matmul_kernel = Warmup(matmul_module.matmul_kernel)
    for dtype in DTYPES:
        x, w = (torch.empty(rows, 4096, device="cuda", dtype=dtype) for rows in (512, 768))
        for tile, segments in all_candidates(dtype)[part::parts]:
            try:
                matmul(x, w, tile=tile, segments=segments)
            except Exception as error:
                print("cannot compile", tile, segments, type(error).__name__, flush=True)


def compare_with_class(journal: Journal) -> None:
    """Judge every candidate that has no verdict yet."""
    judged = journal.judged()
    hung = {_ways(json.loads(key)) for key, verdict in judged.items() if verdict == HUNG}
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        x = mirrored(300, 4096, sign=-1, dtype=dtype, generator=generator).cuda()
        w = mirrored(768, 4096, sign=1, dtype=dtype, generator=generator).cuda()
        references: dict[int, torch.Tensor] = {}
        for tile, segments in all_candidates(dtype):
            key = _key(dtype, tile, segments)
            if json.dumps(key) in judged or _ways(key) in hung:
                continue
            if segments not in references:
                references[segments] = matmul(x, w, tile=class_reference(dtype), segments=segments)
            journal.note_trying(dtype, tile, segments)
            try:
                same = same_bytes(matmul(x, w, tile=tile, segments=segments), references[segments])
                verdict = "in class" if same else "outside"
            except Exception as error:
                verdict = f"cannot: {type(error).__name__}"
                torch.cuda.synchronize()  # ends this process where the error is one of the device
            journal.add(journal.verdicts, [key, verdict])
        if 1 in references:
            torch.backends.cuda.matmul.allow_tf32 = False
            journal.add(journal.verdicts, [[str(dtype), "library"], str(same_bytes(torch.mm(x, w.t()), references[1]))])


def jobs() -> Iterator[tuple[torch.dtype, int, int, int, tuple[int, ...]]]:
    """(dtype, N, K, M, numbers of segments) in the order of measuring."""
    for n, k in shapes():
        for m in TUNED_M:
            yield torch.bfloat16, n, k, m, (1, 2) if n <= 2048 and k >= 4096 else (1,)
    for n, k in ((4096, 4096), (12288, 2048)):
        for m in (1, 16, 64, 256, 1024):
            yield torch.float32, n, k, m, (1,)


def time_all(journal: Journal) -> None:
    """Time every candidate of the class at every job that has no record yet."""
    good = {key for key, verdict in journal.judged().items() if verdict == "in class"}
    done = {(r["dtype"], r["n"], r["k"], r["m"]) for r in journal.read(journal.records)}
    made_for, weights = None, []
    for dtype, n, k, m, numbers in jobs():
        if (str(dtype), n, k, m) in done:
            continue
        if made_for != (dtype, n, k):
            weights = []  # those of the shape before go first
            weights = rotated_weights(n, k, dtype)
            made_for = (dtype, n, k)
        x = torch.randn(m, k, device="cuda", dtype=dtype)

        def timed(product: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor] = weights) -> float:
            return graph_time_us(lambda: [product(w) for w in weights], len(weights), budget_us=20_000, replays=5)

        library = [timed(lambda w, x=x: torch.mm(x, w.t()))]
        times = []
        for segments in numbers:
            for tile in candidates(dtype, m, segments):
                if json.dumps(_key(dtype, tile, segments)) in good:
                    journal.note_trying(dtype, tile, segments)
                    us = timed(lambda w, x=x, tile=tile, s=segments: matmul(x, w, tile=tile, segments=s))
                    times.append([segments, list(astuple(tile)), round(us, 2)])
        library.append(timed(lambda w, x=x: torch.mm(x, w.t())))
        journal.add(
            journal.records, {"dtype": str(dtype), "n": n, "k": k, "m": m, "library_us": library, "tiles": times}
        )


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
    parser.add_argument("--role", help=argparse.SUPPRESS)
    args = parser.parse_args()
    journal, until = Journal(args.folder), time.monotonic() + args.seconds
    if args.role == "child":
        compare_with_class(journal)
        time_all(journal)
        return
    if args.role:
        compile_part(*map(int, args.role.split("/")))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    command = [__file__, str(args.folder), "--role"]
    in_parts(command)
    print(f"compiled, {until - time.monotonic():.0f} s left", flush=True)
    while time.monotonic() < until and not watch([sys.executable, *command, "child"], journal, until):
        pass
    (args.folder / "environment.json").write_text(json.dumps(environment(args.commit)))


if __name__ == "__main__":
    main()
