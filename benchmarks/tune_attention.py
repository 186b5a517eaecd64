"""Time plans of attention, for the numbers in `triton_kernels/attention_plan.py`: tiles, warps, stages and parts.

Every plan gives the same bytes; see `bench_attention.py` for the loads and how they are timed.

    python benchmarks/tune_attention.py --only decode
"""

import argparse
import itertools
from dataclasses import replace

import torch
from bench_attention import ROTATED_BYTES, Load, fold, loads, ours, tensors, there_and_back
from gpu_timing import Warmup, in_parts
from vllm_deterministic.triton_kernels import attention as attention_module
from vllm_deterministic.triton_kernels.attention import max_splits
from vllm_deterministic.triton_kernels.attention_plan import (
    DEFAULT_FOLD,
    MOST_SHORT_ROWS,
    WORKSPACE_BYTES,
    AttentionFold,
    AttentionPlan,
    AttentionTile,
    HopperTile,
    attention_plan,
    workspace_bytes,
)

WARPS, STAGES = (1, 2, 4, 8), (3, 5)
LEAST = (1, 2, 4, 8, 16)
LONG = [AttentionTile(*tile) for tile in ((64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3), (128, 4, 2))]
HOPPER = [HopperTile(2, stages) for stages in (3, 4, 6)]


def plans(load: Load, of: AttentionFold) -> list[AttentionPlan]:
    """The plan that the load gets, and others."""
    group, longest = load.heads // load.kv_heads, max(tokens for tokens, _ in load.requests)
    splits = max_splits(of, max(positions for _, positions in load.requests), None, MOST_SHORT_ROWS // group)
    chosen = attention_plan(
        head_dim=load.head_dim,
        group=group,
        kv_heads=load.kv_heads,
        requests=len(load.requests),
        max_query_len=longest,
        max_splits=splits,
    )
    found = [chosen]
    if chosen.short and not chosen.long:
        held = workspace_bytes(len(load.requests), load.kv_heads, splits, chosen.short_rows, load.head_dim)
        most = splits if held <= WORKSPACE_BYTES else 1
        parts = sorted({1, chosen.parts, *(p for p in (2, 4, 8, 16, 32, 64) if p < most), most})
        for number, warps, stages in itertools.product(parts, WARPS, STAGES):
            found.append(replace(chosen, short=replace(chosen.short, warps=warps, stages=stages), parts=number))
        found += [replace(chosen, least=least) for least in LEAST]
    if chosen.long:
        found += [replace(chosen, hopper=tile) for tile in HOPPER]
        # These are the Triton kernel's.
        found += [replace(chosen, long=tile, descriptors=on, hopper=None) for tile in LONG for on in (True, False)]
    return list(dict.fromkeys(found))


def compile_part(part: int, parts: int, asked: list[Load], of: AttentionFold, block_size: int) -> None:
    """Compile a part of the kernels that are timed."""
    attention_module.attention_kernel = Warmup(attention_module.attention_kernel)
    attention_module.fold_kernel = Warmup(attention_module.fold_kernel)
    work = [(load, plan) for load in asked for plan in plans(load, of)]
    for load, plan in work[part::parts]:
        tokens, positions = load.requests[-1]
        small = replace(load, requests=((tokens, min(positions, 16 * of.split)),))
        ours(small, of, tensors(small, block_size, 1), plan)[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="time the loads whose name begins so")
    parser.add_argument("--fold", type=fold, default=DEFAULT_FOLD, help="split,key_tile")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--most-positions", type=int, default=1 << 20, help="leave out loads of more, in all requests")
    parser.add_argument("--shown", type=int, default=4, help="plans shown for each load, the fastest first")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = [
        load
        for load in loads()
        if load.name.startswith(args.only) and sum(n for _, n in load.requests) <= args.most_positions
    ]
    if args.compile:
        compile_part(*map(int, args.compile.split("/")), asked, args.fold, args.block_size)
        return
    of = f"{args.fold.split},{args.fold.key_tile}"
    options = ["--only", args.only, "--fold", of, "--block-size", str(args.block_size)]
    in_parts([__file__, *options, "--most-positions", str(args.most_positions), "--compile"])
    for load in asked:
        arguments = tensors(load, args.block_size, max(1, min(8, ROTATED_BYTES // load.kv_bytes)))
        found = plans(load, args.fold)
        times = there_and_back([ours(load, args.fold, arguments, plan) for plan in found])
        print(f"{load.name} {load.heads}/{load.kv_heads}: chosen {times[0]:.1f} us", flush=True)
        for time, plan in sorted(zip(times, found, strict=True), key=lambda pair: pair[0])[: args.shown]:
            tile = plan.short if plan.short and not plan.long else plan.long
            dealt = f"parts {plan.parts} least {plan.least}"
            print(f"  {time:8.1f}  {dealt} {tile} descriptors {plan.descriptors} {plan.hopper or ''}", flush=True)
        del arguments
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
