"""Claim: on an H200 the row kernels move bytes at 0.9 of a device copy's rate or more for 8192 rows of 1024 to 16384
elements, and are no slower than what vLLM runs by default, down to one row.

Each call is captured many times in a CUDA graph, on inputs that together exceed the L2 cache where one call's bytes are
a fair share of it, and the median over replays is taken. The floor is a device copy of as many bytes, timed alike.

    python benchmarks/bench_row_kernels.py --commit $(git rev-parse HEAD) --output benchmarks/results/row_kernels.json
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import environment, graph_time_us
from vllm_deterministic.triton_kernels.activation import silu_and_mul
from vllm_deterministic.triton_kernels.layer_norm import layer_norm
from vllm_deterministic.triton_kernels.mean import mean
from vllm_deterministic.triton_kernels.rms_norm import fused_add_rms_norm, rms_norm
from vllm_deterministic.triton_kernels.rotary_embedding import qk_norm_rotary_embedding, qk_rotary_embedding
from vllm_deterministic.triton_kernels.softmax import log_softmax, softmax
from vllm_deterministic.triton_kernels.top_k import top_k
from vllm_deterministic.triton_kernels.top_p import top_p_mass

ROWS = (1, 16, 64, 1024, 8192)
HIDDEN, VOCABULARY = (1024, 4096, 5120, 16384), (151936,)
HEADS, KV_HEADS, HEAD_SIZE, EPSILON = 32, 8, 128, 1e-6
# Bytes of the inputs that calls rotate through: past the L2 cache of any device so far.
ROTATED_BYTES = 256 << 20
MOST_ROWS = {"softmax": 1024, "log_softmax": 1024, "top_p_mass": 64, "top_20": 64}

Call = Callable[[int], object]
# Our call and the default's (None: there is none here), each of the number of an input; bytes read and written.
Case = tuple[Call, Call | None, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = []
    print(f"{'op':26} {'width':>7} {'rows':>5} {'us':>8} {'default':>8} {'copy':>8} {'of copy':>7} {'of default':>10}")
    for (op, width), rows in itertools.product(cases(), ROWS):
        if rows > MOST_ROWS.get(op, ROWS[-1]):
            continue
        result = measure(op, width, rows)
        results.append(result)
        us, copy_us, default_us = result["us"], result["copy_us"], result["default_us"] or float("nan")
        print(
            f"{op:26} {width:7} {rows:5} {us:8.2f} {default_us:8.2f} {copy_us:8.2f} {copy_us / us:7.2f} "
            f"{default_us / us:10.2f}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if args.output:
        args.output.write_text(
            json.dumps({"environment": environment(args.commit), "results": results}, indent=1) + "\n"
        )


def cases() -> list[tuple[str, int]]:
    wide = [(op, width) for op in ("rms_norm", "fused_add_rms_norm", "layer_norm", "mean") for width in HIDDEN]
    gated = [("silu_and_mul", width) for width in (3072, 14336)]
    heads = [(op, (HEADS + 2 * KV_HEADS) * HEAD_SIZE) for op in ("qk_rotary_embedding", "qk_norm_rotary_embedding")]
    return wide + gated + heads + [(op, width) for op in MOST_ROWS for width in VOCABULARY]


def measure(op: str, width: int, rows: int) -> dict[str, Any]:
    """Microseconds of our call, of the default's and of a copy that reads and writes as many bytes."""
    columns = 2 * width if op == "silu_and_mul" else width
    dtype = torch.float32 if op in MOST_ROWS else torch.bfloat16
    size = rows * columns * dtype.itemsize
    inputs = [
        torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(min(16, max(2, ROTATED_BYTES // size + 1)))
    ]
    ours, default, moved = case(op, width, inputs)
    half = [torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2 * len(inputs))]
    copy_us = microseconds(lambda i: half[2 * i].copy_(half[2 * i + 1]), len(inputs))
    return {
        "op": op,
        "width": width,
        "rows": rows,
        "bytes": moved,
        "us": microseconds(ours, len(inputs)),
        "default_us": microseconds(default, len(inputs)) if default else None,
        "copy_us": copy_us,
    }


def case(op: str, width: int, inputs: list[torch.Tensor]) -> Case:
    """One operation on the given inputs."""
    x = inputs[0]
    rows, size = x.shape[0], x.numel() * x.element_size()
    weight = torch.ones(width, device="cuda", dtype=x.dtype)
    native = vllm_ops()
    out = torch.empty_like(x)
    if op == "rms_norm":
        default = native and (lambda i: native.rms_norm(out, inputs[i], weight, EPSILON))
        return lambda i: rms_norm(inputs[i], weight, EPSILON), default, 2 * size
    if op == "fused_add_rms_norm":
        residual = torch.randn_like(x)
        # vLLM's own works in place.
        default = native and (lambda i: native.fused_add_rms_norm(inputs[i], residual, weight, EPSILON))
        return lambda i: fused_add_rms_norm(inputs[i], residual, weight, EPSILON), default, 4 * size
    if op == "layer_norm":
        native_norm = torch.nn.functional.layer_norm
        return (
            lambda i: layer_norm(inputs[i], weight, weight, EPSILON),
            lambda i: native_norm(inputs[i], (width,), weight, weight, EPSILON),
            2 * size,
        )
    if op == "mean":
        return lambda i: mean(inputs[i], -1), lambda i: inputs[i].mean(-1), size
    if op == "silu_and_mul":
        gated = torch.empty(rows, width, device="cuda", dtype=x.dtype)
        default = native and (lambda i: native.silu_and_mul(gated, inputs[i]))
        return lambda i: silu_and_mul(inputs[i]), default, size + size // 2
    if op in ("softmax", "log_softmax"):
        kernel = softmax if op == "softmax" else log_softmax
        return lambda i: kernel(inputs[i]), lambda i: getattr(inputs[i], op)(-1), 2 * size
    if op == "top_p_mass":
        return lambda i: top_p_mass(inputs[i]), lambda i: inputs[i].cumsum(-1), 2 * size
    if op == "top_20":
        return lambda i: top_k(inputs[i], 20), lambda i: inputs[i].topk(20, dim=-1), size
    return rotary(op, inputs, native)


def rotary(op: str, inputs: list[torch.Tensor], native: Any) -> Case:
    x = inputs[0]
    positions = torch.arange(len(x), device="cuda")
    cache = torch.randn(len(x), HEAD_SIZE, device="cuda").to(x.dtype)
    weight = torch.ones(HEAD_SIZE, device="cuda", dtype=x.dtype)
    parts = [HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
    split = [one.split(parts, dim=-1)[:2] for one in inputs]

    def default(i: int) -> None:
        q, k = split[i]
        if op == "qk_norm_rotary_embedding":
            normalized = []
            for heads in (q, k):
                by_head = heads.view(len(heads), -1, HEAD_SIZE)
                out = torch.empty(by_head.shape, device="cuda", dtype=x.dtype)
                native.rms_norm(out, by_head, weight, EPSILON)
                normalized.append(out.flatten(1))
            q, k = normalized
        native.rotary_embedding(positions, q, k, HEAD_SIZE, cache, True)

    def ours(i: int) -> object:
        q, k = split[i]
        if op == "qk_rotary_embedding":
            return qk_rotary_embedding(positions, q, k, cache, HEAD_SIZE, True)
        return qk_norm_rotary_embedding(positions, q, k, weight, weight, EPSILON, cache, HEAD_SIZE, True)

    return ours, native and default, 2 * sum(part.numel() * part.element_size() for part in split[0])


def vllm_ops() -> Any:
    """vLLM's CUDA operations, or None where vLLM is not installed."""
    try:
        import vllm._custom_ops  # noqa: F401 (it registers them)
    except ImportError:
        return None
    return torch.ops._C


def microseconds(call: Call, inputs: int) -> float:
    """Time of one call where each input is taken in turn."""
    calls = max(inputs, 32 // inputs * inputs)
    return graph_time_us(lambda: [call(number % inputs) for number in range(calls)], calls, replays=11)


if __name__ == "__main__":
    main()
