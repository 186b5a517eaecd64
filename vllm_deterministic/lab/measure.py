"""Run one strategy again and again: what became of one row, and how long it took."""

import statistics
import time
from collections.abc import Sequence

import torch

from .family import Inputs, Strategy
from .record import Case, Time

_WARM_UP = 3


def measure(
    strategy: Strategy,
    inputs: Inputs,
    oracle: torch.Tensor,
    *,
    data: str,
    hidden: int,
    batch_sizes: Sequence[int],
    repeats: int,
) -> Case:
    """One row's results at every batch size, then ``repeats`` times at the largest one, which is timed.

    Args:
        strategy: what to run.
        inputs: at least as many rows as the largest batch size, on the device.
        oracle: the row's result in float64, on the CPU.
        data, hidden: what to note in the case.
        batch_sizes: one or more.
        repeats: one or more.
    """
    batches = [_row(strategy.run(*inputs.batch(size)), size) for size in batch_sizes]
    largest = max(batch_sizes)
    arguments = inputs.batch(largest)
    for _ in range(_WARM_UP):
        strategy.run(*arguments)
    runs, times_ms = [], []
    for _ in range(repeats):
        synchronize(arguments[0].device)
        start = time.perf_counter()
        out = strategy.run(*arguments)
        synchronize(arguments[0].device)
        times_ms.append((time.perf_counter() - start) * 1e3)
        runs.append(_row(out, largest))
    return Case(
        data=data,
        hidden=hidden,
        results=_distinct([*batches, *runs]),
        results_of_repeats=_distinct(runs),
        across_batches=_spread(batches),
        across_repeats=_spread(runs),
        from_float64=max(float((row.double() - oracle).abs().max()) for row in (*batches, *runs)),
        time=Time(median_ms=statistics.median(times_ms), min_ms=min(times_ms), max_ms=max(times_ms)),
    )


def synchronize(device: torch.device) -> None:
    """Wait for what was launched; a CPU has nothing to wait for."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _row(out: torch.Tensor, size: int) -> torch.Tensor:
    return out[size // 2].cpu()


def _distinct(rows: Sequence[torch.Tensor]) -> int:
    return len({bytes(row.contiguous().view(torch.uint8).flatten().tolist()) for row in rows})


def _spread(rows: Sequence[torch.Tensor]) -> float:
    stacked = torch.stack(list(rows)).double()
    return float((stacked.amax(0) - stacked.amin(0)).max())
