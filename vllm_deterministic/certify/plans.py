"""Certified plans for all shapes of a model: from the cache, or tried now."""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vllm_deterministic.triton_kernels import matmul as kernel
from vllm_deterministic.triton_kernels.cancelling_inputs import FAMILIES
from vllm_deterministic.triton_kernels.cublaslt import Algorithm, cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.tile_table import tile_plan
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan

from .cache import VerdictCache
from .machine import identity
from .plan import ROWS, Matmul, certify_plan
from .verdict import PlanVerdict

logger = logging.getLogger("vllm.deterministic.certify")

Shape = tuple[int, int]
# Called with the steps done, the steps in all, and what is being done.
Progress = Callable[[int, int, str], None]


class NoTileError(ValueError):
    """No tile of a shape may be used on this machine, so its matrix product cannot be made batch-invariant."""


def certified_plans(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
    *,
    cache_directory: Path | None = None,
    matmul: Matmul | None = None,
) -> dict[Shape, TilePlan]:
    """The plans that a server may use, tiles outside the class left out, each with a warning.

    Args:
        shapes: ``(N, K)`` of each weight.
        dtype: bf16, fp16 or fp32.
        device: where the kernels run.
        progress: called with a line when the tiles are compiled and for each shape that is tried, so not at all where
            the cache has every verdict.
        cache_directory: of the verdicts, ``cache.default_directory()`` unless given.
        matmul: the kernel, or another to be tried.

    Raises:
        NoTileError: names a shape of which no tile is left.
    """
    told = ""

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        if progress and what != told:
            progress(f"certifying the matrix product's tiles, step {done} of {total}: {what}")
            told = what

    cache = VerdictCache(identity(device), cache_directory)
    plans = {}
    for plan, verdict in certify(shapes, dtype, device, every_m=False, cache=cache, progress=tell, matmul=matmul):
        where = f"N={plan.n}, K={plan.k}, {verdict.dtype}"
        for tile in verdict.tiles:
            if tile.status != "in class":
                logger.warning("%s: %s is left out, %s: %s", where, tile.tile, tile.status, tile.detail)
        if verdict.refusal or len(verdict.dropped) == len(verdict.tiles):
            reason = verdict.refusal or f"every tile is outside the class, the last at {verdict.tiles[-1].detail}"
            raise NoTileError(f"the matrix product at {where} cannot be made batch-invariant here: {reason}")
        plans[plan.n, plan.k] = plan.without(verdict.dropped) if verdict.dropped else plan
    return plans


def certify(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    every_m: bool,
    cache: VerdictCache | None,
    progress: Progress | None = None,
    matmul: Matmul | None = None,
    rows: Sequence[int] = ROWS,
) -> list[tuple[TilePlan, PlanVerdict]]:
    """Each shape's plan with its verdict, from the cache where there is one, in the order of ``shapes``.

    Args:
        every_m: whether a verdict must be over every M; see ``certify_plan`` for it and the other arguments.
        cache: None certifies all of them anew and keeps nothing.
    """
    name = str(dtype).removeprefix("torch.")
    plans = [tile_plan(dtype, capability(device), n, k, cublaslt(device)) for n, k in dict.fromkeys(shapes)]
    verdicts = {plan: cache.find(plan, name, every_m=every_m) if cache else None for plan in plans}
    missing = [plan for plan in plans if verdicts[plan] is None]
    if missing:
        done = itertools.count(1)
        tiles = {(tile, plan.segments): plan for plan in missing for tile in plan.tiles}
        total = len(tiles) + len(missing) * len(FAMILIES)

        def advance(what: str) -> None:
            if progress:
                progress(next(done), total, what)

        _compile(tiles, dtype, device, matmul, functools.partial(advance, "compiling"))
        for plan in missing:
            tried = functools.partial(advance, f"N={plan.n}, K={plan.k}")
            verdict = certify_plan(plan, dtype, device, every_m=every_m, rows=rows, matmul=matmul, advance=tried)
            if verdict.dropped and not every_m:
                # Another tile will take the place of each that is dropped, so all must hold at every M.
                verdict = certify_plan(plan, dtype, device, rows=rows, matmul=matmul)
            verdicts[plan] = verdict
        if cache:
            cache.add(found for plan in missing if (found := verdicts[plan]))
    return [(plan, verdict) for plan, verdict in verdicts.items() if verdict is not None]


def _compile(
    tiles: dict[tuple[Tile | Algorithm, int], TilePlan],
    dtype: torch.dtype,
    device: torch.device,
    matmul: Matmul | None,
    advance: Callable[[], None],
) -> None:
    """Compile every tile, on all cores at once. What fails here fails again, and is reported, when it is tried."""

    def launch(item: tuple[tuple[Tile | Algorithm, int], TilePlan]) -> None:
        (tile, segments), plan = item
        # As many columns as divide by what the real number divides by: all that the compiler knows of N.
        columns = plan.n if plan.n < 256 else 256 + plan.n % 256
        try:
            with torch.cuda.device(device):  # each thread has a current device of its own
                x = torch.zeros(1, plan.k, dtype=dtype, device=device)
                w = torch.zeros(columns, plan.k, dtype=dtype, device=device)
                (matmul or kernel.matmul)(x, w, tile=tile, segments=segments)
        except Exception as failure:
            logger.debug("%s: %s", tile, failure)

    if device.type != "cuda":
        return  # the interpreter compiles nothing
    first, *others = tiles.items()
    # The first launch of a kernel sets up tables that threads would set up twice.
    launch(first)
    advance()
    with ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        for _ in pool.map(launch, others):
            advance()
