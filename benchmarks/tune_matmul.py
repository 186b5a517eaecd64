"""Makes the tile table of the matrix product for the GPU at hand, by measuring: one command for a new GPU.

    python benchmarks/tune_matmul.py --measurements tuning.json   # on the GPU, some minutes
    python benchmarks/make_tile_table.py tuning.json              # anywhere: writes triton_kernels/tile_tables/

Times are medians of CUDA graph replays, the weights rotated past the L2 cache.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_timing import environment, graph_time_us
from matmul_shapes import M_VALUES, shapes
from vllm_deterministic.triton_kernels.bit_class import mirrored, same_bytes
from vllm_deterministic.triton_kernels.matmul import matmul
from vllm_deterministic.triton_kernels.tiles import Tile, class_reference

WEIGHT_BYTES = 200_000_000
# M = 2 and 4 use the tiles of M = 1 to 8, and so on up to the next power of two.
TUNED_M = tuple(m for m in M_VALUES if m not in (2, 4))


def candidates(dtype: torch.dtype, m: int, segments: int) -> Iterator[Tile]:
    """The tiles worth timing at ``m`` rows."""
    if dtype == torch.float32:
        for block_m, block_n, block_k in (
            (16, 64, 32),
            (32, 32, 32),
            (32, 64, 32),
            (64, 64, 32),
            (128, 64, 16),
            (64, 64, 16),
            (128, 128, 16),
        ):
            if block_m <= max(16, 2 * m):
                for warps, stages in ((4, 3), (8, 3)):
                    yield Tile(block_m, block_n, block_k, warps, stages)
        return
    if m <= 128:
        rows = max(16, m)
        narrow = [(64, 128, 4, 5), (64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 4), (128, 64, 4, 6), (32, 128, 4, 6), (32, 256, 4, 4), (32, 256, 2, 4), (16, 256, 2, 6), (16, 512, 4, 4), (16, 512, 2, 3), (64, 64, 4, 8)]  # fmt: skip
        for block_n, block_k, warps, stages in narrow:
            variants = [(False, 0), (False, 1024)] if segments == 1 else [(False, 0), (True, 0)]
            for split, prefetch_k in variants:
                if segments > 1 and (rows * block_n > 8192 or block_k > 256):
                    continue
                if (rows + block_n) * block_k * 2 * stages <= 225_000 and (prefetch_k == 0 or block_k != 512):
                    yield Tile(rows, block_n, block_k, warps, stages, swapped=True, split=split, prefetch_k=prefetch_k)
    if m == 64 or m == 128:
        for block_m, block_n, block_k, warps, stages in ((32, 64, 128, 4, 5), (64, 64, 128, 4, 5), (64, 128, 128, 4, 4), (64, 128, 64, 4, 6), (64, 32, 128, 4, 5)):  # fmt: skip
            for swapped in (False, True):
                if block_n >= 64 or not swapped:
                    yield Tile(block_m, block_n, block_k, warps, stages, swapped=swapped)
    if m >= 64:
        wide = [(64, 128, 128, 4, 4, False), (64, 128, 64, 4, 6, False), (64, 256, 64, 4, 4, False), (64, 64, 128, 4, 5, False), (128, 64, 128, 4, 4, True), (128, 64, 64, 4, 6, True), (128, 64, 128, 4, 4, False), (128, 128, 64, 4, 4, True), (128, 128, 64, 4, 4, False), (128, 128, 64, 8, 4, False), (128, 128, 128, 8, 3, False)]  # fmt: skip
        if m >= 128:
            wide += [(128, 256, 64, 8, 3, False), (128, 256, 64, 8, 4, False), (256, 128, 64, 8, 3, True), (256, 128, 64, 8, 4, False), (256, 64, 64, 4, 4, True)]  # fmt: skip
        for block_m, block_n, block_k, warps, stages, swapped in wide:
            if block_m > m:
                continue
            big = block_m * block_n >= 16384
            if segments > 1 and block_m * block_n > 64 * warps * 32:
                continue  # two accumulators do not fit the registers
            for persistent in (False, True) if big else (False,):
                yield Tile(block_m, block_n, block_k, warps, stages, swapped=swapped, persistent=persistent)
            if segments > 1 and m <= 512 and not big:
                yield Tile(block_m, block_n, block_k, warps, stages, swapped=swapped, split=True)
            if big and not swapped and stages == 3:
                yield Tile(block_m, block_n, block_k, warps, stages, persistent=True, tma_store=True)
        if segments == 1:
            for block_m, block_n, block_k, stages in ((64, 128, 64, 4), (64, 128, 128, 3), (128, 64, 64, 5), (128, 64, 128, 4), (128, 128, 64, 3), (128, 128, 64, 4), (128, 128, 64, 5), (128, 128, 128, 2), (128, 256, 64, 3), (128, 256, 64, 4), (256, 128, 64, 3), (256, 128, 64, 4)):  # fmt: skip
                for persistent in (False, True):
                    if block_m <= m:
                        yield Tile(block_m, block_n, block_k, 4, stages, persistent=persistent, warp_specialized=True)
    if m >= 2048 and segments == 1:
        for group_m in (4, 16):
            yield Tile(128, 256, 64, 4, 3, persistent=True, warp_specialized=True, group_m=group_m)
            yield Tile(128, 256, 64, 4, 4, persistent=True, warp_specialized=True, group_m=group_m)
            yield Tile(128, 256, 64, 8, 4, persistent=False, group_m=group_m)


def all_candidates(dtype: torch.dtype) -> list[tuple[Tile, int]]:
    """Every tile with every number of segments, once."""
    found = {
        (tile, segments): None
        for segments in ((1,) if dtype == torch.float32 else (1, 2, 4))
        for m in M_VALUES
        for tile in candidates(dtype, m, segments)
    }
    return list(found)


def compile_all(dtype: torch.dtype, part: int, parts: int) -> None:
    """Compile a part of the candidates into Triton's cache on disk; those that fail are found again when timed."""
    x = torch.randn(512, 4096, device="cuda").to(dtype)
    w = torch.randn(768, 4096, device="cuda").to(dtype)
    for tile, segments in all_candidates(dtype)[part::parts]:
        try:
            matmul(x, w, tile=tile, segments=segments)
            torch.cuda.synchronize()
        except Exception as error:
            print("cannot", tile, segments, type(error).__name__, flush=True)


def outside_class(dtype: torch.dtype) -> set[tuple[Tile, int]]:
    """The candidates that do not give the bytes of the class's reference, or cannot be launched."""
    generator = torch.Generator().manual_seed(0)
    x = mirrored(300, 4096, sign=-1, dtype=dtype, generator=generator).cuda()
    w = mirrored(768, 4096, sign=1, dtype=dtype, generator=generator).cuda()
    outside, references = set(), {}
    for tile, segments in all_candidates(dtype):
        if segments not in references:
            references[segments] = matmul(x, w, tile=class_reference(dtype), segments=segments)
        try:
            same = same_bytes(matmul(x, w, tile=tile, segments=segments), references[segments])
            torch.cuda.synchronize()
            if not same:
                print("outside the class", tile, segments, flush=True)
        except Exception as error:
            same = False
            print("cannot", tile, segments, type(error).__name__, flush=True)
        if not same:
            outside.add((tile, segments))
    print(
        dtype, "library in class:", same_bytes(torch.mm(x, w.t()), references[1]), len(outside), "outside", flush=True
    )
    return outside


def time_shape(
    dtype: torch.dtype, n: int, k: int, m_values: tuple[int, ...], segment_numbers: tuple[int, ...], broken: set
) -> Iterator[dict]:
    """One record for each M: the library's time and every candidate's."""
    generator = torch.Generator("cuda").manual_seed(n + k)
    copies = max(1, min(32, WEIGHT_BYTES // (n * k * dtype.itemsize)))
    weights = [torch.randn(n, k, device="cuda", generator=generator).to(dtype) for _ in range(copies)]
    for m in m_values:
        x = torch.randn(m, k, device="cuda", generator=generator).to(dtype)
        record: dict = {"n": n, "k": k, "m": m, "dtype": str(dtype), "library_us": [], "tiles": []}

        def timed(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor = x) -> float:
            return graph_time_us(lambda: [product(x, w) for w in weights], copies, budget_us=30_000)

        record["library_us"].append(timed(lambda x, w: torch.mm(x, w.t())))
        for segments in segment_numbers:
            if segments > 1 and m not in (1, 16, 64, 256, 1024, 8192):
                continue
            for tile in candidates(dtype, m, segments):
                if (tile, segments) in broken:
                    continue
                try:
                    us = timed(lambda x, w, tile=tile, s=segments: matmul(x, w, tile=tile, segments=s))
                except Exception as error:
                    broken.add((tile, segments))
                    print("cannot", tile, segments, type(error).__name__, flush=True)
                    torch.cuda.synchronize()
                    continue
                record["tiles"].append([segments, list(vars(tile).values()), round(us, 3)])
        record["library_us"].append(timed(lambda x, w: torch.mm(x, w.t())))
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--seconds", type=float, default=480, help="stop after this time and keep what is measured")
    parser.add_argument("--compile-part", type=int, nargs=2, metavar=("PART", "PARTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    started = time.monotonic()
    if args.compile_part:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            compile_all(dtype, *args.compile_part)
        return
    parts = os.cpu_count() or 1
    command = [sys.executable, __file__, "--measurements", str(args.measurements), "--compile-part"]
    workers = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    records: list[dict] = []
    broken = {dtype: outside_class(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    jobs = [(torch.bfloat16, n, k, TUNED_M, (1, 2, 4) if n <= 4096 else (1,)) for n, k in shapes()]
    jobs += [(torch.float32, n, k, (1, 16, 64, 256, 1024), (1,)) for n, k in ((4096, 4096), (12288, 2048))]
    for job in jobs:
        if time.monotonic() - started > args.seconds:
            print("out of time before", job, flush=True)
            break
        records += time_shape(*job, broken[job[0]])
        print(f"{time.monotonic() - started:.0f} s: {job[0]} {job[1]}x{job[2]}", summary(records, job), flush=True)
        args.measurements.write_text(json.dumps({"environment": environment(args.commit), "records": records}))


def summary(records: list[dict], job: tuple) -> str:
    """Library time over our best with one segment, by M."""
    words = []
    for record in records:
        if (record["n"], record["k"], record["dtype"]) == (job[1], job[2], str(job[0])):
            best = {s: min((t[2] for t in record["tiles"] if t[0] == s), default=0) for s in (1, 2, 4)}
            words.append(
                f"{record['m']}:" + "/".join(f"{min(record['library_us']) / b:.2f}" for b in best.values() if b)
            )
    return " ".join(words)


if __name__ == "__main__":
    main()
