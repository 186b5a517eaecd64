"""How the GPU benchmarks take time, and what they note of the machine."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from machine import gpu_and_driver, versions

# Past the L2 cache, and small enough that a copy's first run warms up all of it.
COPY_BYTES = 1 << 28
# Of the weights that products rotate through, past the same cache.
WEIGHT_BYTES = 130_000_000


class Warmup:
    """Stands in a kernel's place and compiles it for each call, into Triton's cache on disk, without running it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def in_parts(command: list[str]) -> None:
    """Run ``python command... part/parts`` once for each core, and wait for all."""
    parts = os.cpu_count() or 1
    workers = [subprocess.Popen([sys.executable, *command, f"{part}/{parts}"]) for part in range(parts)]
    for worker in workers:
        worker.wait()


def rotated_weights(n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random weights ``[N, K]``, so many that a product of each in turn finds none in the cache, 16 at most."""
    copies = max(1, min(16, WEIGHT_BYTES // (n * k * dtype.itemsize)))
    return [torch.randn(n, k, device="cuda", dtype=dtype) for _ in range(copies)]


def graph_time_us(call: Callable[[], Any], calls: int, *, budget_us: float = 50_000, replays: int = 7) -> float:
    """Microseconds of one of the ``calls`` that ``call`` makes: the median of CUDA graph replays.

    ``budget_us``: fewer replays, at least three, where one takes longer than its share.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        graph.replay()
        while len(times) < replays and (len(times) < 3 or sum(times) < budget_us):
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times) / calls


def copy_bytes_per_second() -> float:
    """The device's copy bandwidth, bytes read and bytes written both counted: the floor of what moves memory."""
    pairs = [torch.randint(256, (2, COPY_BYTES), dtype=torch.uint8, device="cuda") for _ in range(4)]
    seconds = graph_time_us(lambda: [target.copy_(source) for source, target in pairs], len(pairs), replays=15) * 1e-6
    return 2 * COPY_BYTES / seconds


def product_flops_per_second() -> float:
    """The library's rate on a large bf16 product of random numbers: the floor of what multiplies."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / (graph_time_us(lambda: [torch.mm(a, b.t()) for _ in range(5)], 5) * 1e-6)


def environment(commit: str) -> dict[str, str]:
    """Date, GPU, driver, versions and the commit that was measured."""
    _, driver = gpu_and_driver() or ("", "unknown")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        **versions("torch", "triton", "vllm"),
        "cuda": str(torch.version.cuda),
        "commit": commit,
    }
