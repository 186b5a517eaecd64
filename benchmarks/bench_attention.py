"""Attention with fixed splits of keys against vLLM's FlashAttention-3: with its default splits, whose number follows
the batch, and with one, which like ours gives each row one order of additions. Without vLLM ours alone is measured.

Times are medians of CUDA graph replays, with caches rotated past the L2 cache. Blocks lie in random order. The floor is
the larger of the bytes of keys and values at a device copy's rate and of the operations at the rate of the library's
largest product, both of this run.

    python benchmarks/bench_attention.py --commit $(git rev-parse HEAD) --output benchmarks/results/attention.json
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timing import (
    Warmup,
    copy_bytes_per_second,
    environment,
    graph_time_us,
    in_parts,
    product_flops_per_second,
)
from vllm_deterministic.triton_kernels import attention as attention_module
from vllm_deterministic.triton_kernels.attention_plan import DEFAULT_FOLD, AttentionFold, AttentionPlan

ROTATED_BYTES = 130_000_000
# Of keys and values of one point: below it a point is measured.
MOST_CACHE_BYTES = 40_000_000_000
Call = Callable[[], Any]


@dataclass(frozen=True)
class Load:
    """Requests as (query tokens, positions), and how the model is cut into heads."""

    name: str
    requests: tuple[tuple[int, int], ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        return sum(positions for _, positions in self.requests) * self.kv_heads * self.head_dim * 4

    @property
    def decodes(self) -> int:
        """How many of the first requests have one query token, as the engine says too."""
        return sum(1 for _ in itertools.takewhile(lambda request: request[0] == 1, self.requests))

    @property
    def flops(self) -> int:
        """Of both products, over what causality leaves."""
        seen = sum(tokens * positions - tokens * (tokens - 1) // 2 for tokens, positions in self.requests)
        return 4 * seen * self.heads * self.head_dim


def loads() -> list[Load]:
    """Decode, prefill and both in one batch."""
    decode = [
        Load(f"decode {requests} x {positions}", ((1, positions),) * requests, *heads)
        for heads in ((32, 8), (64, 8), (16, 16))
        for requests in (1, 8, 64, 256)
        for positions in (512, 1024, 8192, 32768, 131072)
        if heads == (32, 8) or (requests in (1, 64) and positions in (1024, 8192))
    ]
    prefill = [
        Load(f"prefill {requests} x {tokens} of {positions}", ((tokens, positions),) * requests, *heads)
        for heads in ((32, 8), (64, 8), (16, 16))
        for requests, tokens, positions in ((1, 2048, 2048), (1, 8192, 8192), (4, 4096, 4096), (1, 2048, 32768))
        if heads == (32, 8) or (requests, positions) == (1, 8192)
    ]
    speculative = Load("5 tokens of 64 x 2048", ((5, 2048),) * 64)
    mixed = Load("200 decodes x 1024 and 2048 of 2048", ((1, 1024),) * 200 + ((2048, 2048),))
    return [load for load in (*decode, *prefill, speculative, mixed) if load.kv_bytes <= MOST_CACHE_BYTES]


def tensors(load: Load, block_size: int, copies: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, caches of all copies in one pool, a block table for each copy, query_start_loc and seq_lens."""
    generator = torch.Generator("cuda").manual_seed(seed)
    columns = [-(-positions // block_size) for _, positions in load.requests]
    blocks = sum(columns)
    shape = (blocks * copies, load.kv_heads, block_size, 2 * load.head_dim)
    both = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator).transpose(1, 2)
    order = torch.randperm(blocks * copies, generator=generator, device="cuda").int().view(copies, blocks)
    table = torch.zeros(copies, len(columns), max(columns), dtype=torch.int32, device="cuda")
    begin = 0
    for request, count in enumerate(columns):
        table[:, request, :count] = order[:, begin : begin + count]
        begin += count
    query_lens, seq_lens = (torch.tensor(x, dtype=torch.int32) for x in zip(*load.requests, strict=True))
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).to("cuda", torch.int32)
    q = torch.randn(int(query_lens.sum()), load.heads, load.head_dim, generator=generator, device="cuda").bfloat16()
    return q, *both.split(load.head_dim, dim=-1), table, starts, seq_lens.cuda()


def ours(
    load: Load, fold: AttentionFold, arguments: tuple[torch.Tensor, ...], plan: AttentionPlan | None = None
) -> list[Call]:
    """A call for each copy of the cache; ``plan``: the load's own unless given."""
    q, k, v, tables, starts, lengths = arguments
    options = {
        "scale": load.head_dim**-0.5,
        "decodes": load.decodes,
        "max_query_len": max(tokens for tokens, _ in load.requests),
        "max_seq_len": max(positions for _, positions in load.requests),
        "fold": fold,
        "plan": plan,
    }
    return [
        lambda table=table: attention_module.attention(q, k, v, table, starts, lengths, **options) for table in tables
    ]


def flash(load: Load, arguments: tuple[torch.Tensor, ...], splits: int) -> list[Call] | None:
    """vLLM's FlashAttention-3; None where vLLM is absent. ``splits``: 0 lets it choose."""
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        return None
    q, k, v, tables, starts, lengths = arguments
    options = {
        "max_seqlen_q": max(tokens for tokens, _ in load.requests),
        "max_seqlen_k": max(positions for _, positions in load.requests),
        "cu_seqlens_q": starts,
        "seqused_k": lengths,
        "softmax_scale": load.head_dim**-0.5,
        "causal": True,
        "num_splits": splits,
        "fa_version": 3,
    }
    return [lambda table=table: flash_attn_varlen_func(q=q, k=k, v=v, block_table=table, **options) for table in tables]


def microseconds(calls: list[Call]) -> float:
    """Time of one call, the copies in turn."""
    return round(graph_time_us(lambda: [call() for call in calls], len(calls), budget_us=15_000, replays=5), 2)


def there_and_back(calls: Sequence[list[Call]]) -> list[float]:
    """Times of all, one after the other and then in reverse: means, since the chip's clock falls while it works."""
    there = [microseconds(call) for call in calls]
    back = [microseconds(call) for call in reversed(calls)]
    return [round((x + y) / 2, 2) for x, y in zip(there, reversed(back), strict=True)]


def measure(load: Load, args: argparse.Namespace, bytes_per_second: float, flops_per_second: float) -> dict[str, Any]:
    """Microseconds of FlashAttention-3 and of ours by each fold, and the floor."""
    copies = max(1, min(8, ROTATED_BYTES // load.kv_bytes))
    arguments = tensors(load, args.block_size, copies)
    flashes = {"fa3": flash(load, arguments, 0), "fa3_one_split": flash(load, arguments, 1)}
    calls = {name: call for name, call in flashes.items() if call}
    calls |= {f"ours_{fold.split}_{fold.key_tile}": ours(load, fold, arguments) for fold in args.folds}
    times = {f"{name}_us": us for name, us in zip(calls, there_and_back(list(calls.values())), strict=True)}
    floor_us = 1e6 * max(load.kv_bytes / bytes_per_second, load.flops / flops_per_second)
    first = args.folds[0]
    us = times[f"ours_{first.split}_{first.key_tile}_us"]
    ratio = {"ratio": round(times["fa3_us"] / us, 4)} if "fa3_us" in times else {}
    shape = {key: value for key, value in asdict(load).items() if key != "requests"}
    return shape | times | ratio | {"floor_us": round(floor_us, 2), "tflops": round(load.flops / us / 1e6, 1)}


def compile_part(part: int, parts: int, folds: list[AttentionFold], block_size: int) -> None:
    """Compile a part of the kernels that are measured."""
    attention_module.attention_kernel = Warmup(attention_module.attention_kernel)
    attention_module.fold_kernel = Warmup(attention_module.fold_kernel)
    work = [(load, fold) for load in loads() for fold in folds]
    for load, fold in work[part::parts]:
        rows = sum(tokens for tokens, _ in load.requests)
        q = torch.empty(rows, load.heads, load.head_dim, dtype=torch.bfloat16, device="cuda")
        cache = torch.empty(1, load.kv_heads, block_size, 2 * load.head_dim, dtype=q.dtype, device="cuda")
        columns = -(-max(positions for _, positions in load.requests) // block_size)
        table = torch.zeros(1, len(load.requests), columns, dtype=torch.int32, device="cuda")
        starts, lengths = (torch.zeros(len(load.requests) + n, dtype=torch.int32, device="cuda") for n in (1, 0))
        ours(load, fold, (q, *cache.transpose(1, 2).split(load.head_dim, dim=-1), table, starts, lengths))[0]()


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """FlashAttention-3's time over ours, so that over 1 we are faster."""
    kinds = {"decode": [], "prefill": [], "other": []}
    for record in records:
        kind = record["name"].split()[0]
        kinds[kind if kind in kinds else "other"].append(record)
    return {
        kind: {
            "geometric_mean": round(statistics.geometric_mean(r["ratio"] for r in held), 4),
            "least": min(r["ratio"] for r in held),
            "least_at": min(held, key=lambda r: r["ratio"])["name"],
        }
        for kind, held in kinds.items()
        if held and all("ratio" in r for r in held)
    }


def show(record: dict[str, Any]) -> None:
    """One line for each point."""
    shape = f"{record['heads']}/{record['kv_heads']}"
    times = "  ".join(f"{key[:-3]} {value:.1f}" for key, value in record.items() if key.endswith("_us"))
    print(f"{record['name']:36} {shape:6} {times}  ratio {record.get('ratio', float('nan')):.3f}", flush=True)


def fold(text: str) -> AttentionFold:
    """``512,64``: positions of a split, keys of a tile."""
    split, key_tile = map(int, text.split(","))
    return AttentionFold(split, key_tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--folds", type=fold, nargs="+", default=[DEFAULT_FOLD], help="split,key_tile; the first is held to"
    )
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--only", default="", help="measure the loads whose name begins so")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_part(*map(int, args.compile.split("/")), args.folds, args.block_size)
        return
    folds = [f"{f.split},{f.key_tile}" for f in args.folds]
    in_parts([__file__, "--block-size", str(args.block_size), "--folds", *folds, "--compile"])
    bytes_per_second, flops_per_second = copy_bytes_per_second(), product_flops_per_second()
    torch.cuda.empty_cache()
    records = []
    for load in loads():
        if load.name.startswith(args.only):
            records.append(measure(load, args, bytes_per_second, flops_per_second))
            show(records[-1])
            torch.cuda.empty_cache()
    result = summary(records)
    print(json.dumps(result, indent=1))
    if args.output:
        content = {
            "environment": environment(args.commit),
            "copy_bytes_per_second": round(bytes_per_second),
            "product_flops_per_second": round(flops_per_second),
            "folds": [asdict(f) for f in args.folds],
            "block_size": args.block_size,
            "summary": result,
        }
        lines = ",\n".join(json.dumps(record) for record in records)
        args.output.write_text(json.dumps(content, indent=1)[:-2] + f',\n "points": [\n{lines}\n]\n}}\n')


if __name__ == "__main__":
    main()
