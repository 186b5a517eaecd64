"""Requests served step by step over one paged KV cache, as an engine does it."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from vllm_deterministic.triton_kernels.reference import paged_attention, plan_attention
from vllm_deterministic.triton_kernels.reference.attention_plan import QueryTiles
from vllm_deterministic.triton_kernels.reference.paged_attention import Workspace, cache_units, write_cache

BASE_ROWS = 16


@dataclass(frozen=True)
class Request:
    """A whole sequence: ``q`` ``[T, heads, D]``, ``k`` and ``v`` ``[T, KV heads, D]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Serving:
    """How requests are served. ``plan`` and ``write`` are what the engine calls, for faults to replace."""

    block_size: int = 128
    kv_split: int = 256
    row_tiles: tuple[int, ...] = (BASE_ROWS,)
    window: int | None = None
    max_split_rows: int = 1 << 16
    stale: float = math.nan
    forget_behind_window: bool = False
    plan: Callable[..., tuple[QueryTiles, ...]] = plan_attention
    write: Callable[..., None] = write_cache


# How many of a request's tokens the next step computes, by request and the number already done.
Schedule = Callable[[int, int], int]


def whole(request: int, done: int) -> int:
    return 1 << 20


def chunks(lowest: int, highest: int) -> Schedule:
    numbers = random.Random(0)
    return lambda request, done: numbers.randint(lowest, highest)


def decode_from(first: int) -> Schedule:
    """A prefill of ``first`` tokens, then one token a step."""
    return lambda request, done: 1 if done else first


def serve(requests: Sequence[Request], schedule: Schedule, serving: Serving) -> list[torch.Tensor]:
    """The attention of every token, step by step over one paged cache that still holds what others left there."""
    lengths = [len(request.q) for request in requests]
    kv_heads, head_size = requests[0].k.shape[1:]
    blocks = [-(-length // serving.block_size) for length in lengths]
    cache = torch.full(
        (sum(blocks) + 1, kv_heads, serving.block_size, 2 * head_size), serving.stale, dtype=requests[0].q.dtype
    )
    cache[0] = 0  # the block that stands for those freed behind a window
    units = cache_units(cache, serving.block_size)
    free = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(sum(blocks))) + 1
    tables = torch.nn.utils.rnn.pad_sequence(free.split(blocks), batch_first=True).int()
    outs, done, workspace = [torch.empty_like(request.q) for request in requests], [0] * len(requests), Workspace()
    while done != lengths:
        step = [
            (i, min(schedule(i, done[i]), lengths[i] - done[i])) for i in range(len(requests)) if done[i] < lengths[i]
        ]
        step = [(i, count) for i, count in step if count]
        if not step:
            continue
        parts = [slice(done[i], done[i] + count) for i, count in step]
        positions = [torch.arange(part.start, part.stop) for part in parts]
        size = serving.block_size
        slots = [tables[i, p // size].long() * size + p % size for (i, _), p in zip(step, positions, strict=True)]
        q, k, v = (
            torch.cat([getattr(requests[i], name)[part] for (i, _), part in zip(step, parts, strict=True)])
            for name in "qkv"
        )
        serving.write(units, k, v, torch.cat(slots))
        table = tables[[i for i, _ in step]]
        if serving.forget_behind_window:
            for row, part in enumerate(parts):
                table[row, : max(0, part.start - serving.window + 1) // size] = 0
        starts = torch.tensor([0, *(count for _, count in step)]).cumsum(0).int()
        plan = serving.plan(
            starts,
            torch.tensor([part.stop for part in parts]).int(),
            table,
            block_size=size,
            kv_split=serving.kv_split,
            group_size=q.shape[1] // kv_heads,
            row_tiles=serving.row_tiles,
            window=serving.window,
            max_split_rows=serving.max_split_rows,
        )
        out = torch.full_like(q, math.nan)
        paged_attention(
            q, units, plan, scale=head_size**-0.5, min_batch=torch.get_num_threads(), workspace=workspace, out=out
        )
        for (i, count), part, rows in zip(step, parts, out.split([count for _, count in step]), strict=True):
            outs[i][part] = rows
            done[i] += count
    return outs
