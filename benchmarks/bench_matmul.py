"""Claim: on an H200 the bf16 product takes no longer than ``torch.mm``, in the geometric mean over the linear layers of
served models at 1 to 8192 rows, and at no point more than 1/0.90 of its time.

Times are medians of CUDA graph replays with the weights rotated past the L2 cache; the library is measured before and
after ours. Our kernels start while the one ahead of them ends, as they do in the engine; a few points are measured
without that too. The floor is the larger of the bytes at a device copy's rate and of the operations at the rate of the
library's largest product, both of this run.

    python benchmarks/bench_matmul.py --commit $(git rev-parse HEAD) --output benchmarks/results/matmul.json
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
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
    rotated_weights,
)
from matmul_shapes import M_VALUES, Shape, add_selection, arguments, selected, shapes
from vllm_deterministic.triton_kernels import matmul as matmul_module
from vllm_deterministic.triton_kernels.cublaslt import cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.tile_table import tile_plan

LEAST_RATIO = 0.90
# Points that are measured without programmatic launch too, and points at which vLLM's product is.
SERIAL_MODEL, SERIAL_M = "Qwen3-8B", (1, 16, 64, 256)
VLLM_MODELS, VLLM_M = ("Qwen3-1.7B", "Qwen3-8B"), (1, 16, 64, 256, 1024, 8192)
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def of_model(layer: str, *models: str) -> bool:
    """Whether a layer is one of a model's on one rank."""
    return layer.startswith(models) and "/" not in layer


def serial(product: Product) -> Product:
    """The product with every kernel launched after the one ahead of it has ended."""

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        before = matmul_module.programmatic_launch
        matmul_module.programmatic_launch = lambda x: False
        try:
            return product(x, w)
        finally:
            matmul_module.programmatic_launch = before

    return call


def compile_part(only: Sequence[Shape], rows: Sequence[int], part: int, parts: int) -> None:
    """Compile a part of the kernels that are measured."""
    matmul_module.matmul_kernel = Warmup(matmul_module.matmul_kernel)
    device = torch.device("cuda", torch.cuda.current_device())
    library = cublaslt(device)
    wanted: dict[Any, tuple[Product, int, int, int]] = {}
    for n, k in selected(only):
        layer = shapes()[n, k]
        plan = tile_plan(torch.bfloat16, capability(device), n, k, library)
        for m in rows:
            if plan.algorithm(m):
                continue
            wanted.setdefault((plan.tile(m), plan.segments, False), (matmul_module.matmul, m, n, k))
            if of_model(layer, SERIAL_MODEL) and m in SERIAL_M:
                wanted.setdefault((plan.tile(m), plan.segments, True), (serial(matmul_module.matmul), m, n, k))
    for product, m, n, k in list(wanted.values())[part::parts]:
        product(*(torch.empty(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n)))


def vllm_product() -> Product | None:
    """vLLM's batch-invariant product, or None where vLLM is absent."""
    try:
        from vllm.model_executor.determinism.batch_invariant import matmul_persistent
    except ImportError as error:
        print("without vLLM:", error)
        return None
    return lambda x, w: matmul_persistent(x, w.t())


def measure(products: dict[str, Product], m: int, weights: list[torch.Tensor]) -> dict[str, float]:
    """Microseconds of each product, and of the library's before and after them."""
    x = torch.randn(m, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)

    def timed(product: Product) -> float:
        us = graph_time_us(lambda: [product(x, w) for w in weights], len(weights), budget_us=15_000, replays=5)
        return round(us, 2)

    times = {"library_us": timed(lambda x, w: torch.mm(x, w.t()))}
    times |= {f"{name}_us": timed(product) for name, product in products.items()}
    return times | {"library_again_us": timed(lambda x, w: torch.mm(x, w.t()))}


def points(
    only: Sequence[Shape], rows: Sequence[int], with_vllm: bool, bytes_per_second: float, flops_per_second: float
) -> list[dict[str, Any]]:
    """A record for each of the shapes (all if there are none) and numbers of rows."""
    theirs = vllm_product() if with_vllm else None
    records: list[dict[str, Any]] = []
    for n, k in selected(only):
        layer = shapes()[n, k]
        weights = rotated_weights(n, k, torch.bfloat16)
        for m in rows:
            products: dict[str, Product] = {"ours": matmul_module.matmul}
            if of_model(layer, SERIAL_MODEL) and m in SERIAL_M:
                products["ours_serial"] = serial(matmul_module.matmul)
            if theirs and of_model(layer, *VLLM_MODELS) and m in VLLM_M:
                products["vllm"] = theirs
            times = measure(products, m, weights)
            floor_us = 1e6 * max(2 * (m * k + n * k + m * n) / bytes_per_second, 2 * m * n * k / flops_per_second)
            library_us = (times["library_us"] + times["library_again_us"]) / 2
            records.append(
                {"layer": layer, "n": n, "k": k, "m": m}
                | times
                | {"ratio": round(library_us / times["ours_us"], 4), "floor_us": round(floor_us, 2)}
                | {"share_of_floor": round(floor_us / times["ours_us"], 4)}
                | ({"vllm_ratio": round(times["vllm_us"] / times["ours_us"], 4)} if "vllm" in products else {})
            )
        del weights
        torch.cuda.empty_cache()
    return records


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios over 1 are ours: geometric means by M and over all, and the points under the least ratio."""

    def means(key: str) -> dict[str, Any]:
        held = [r for r in records if key in r]
        by_m = {m: [r for r in held if r["m"] == m] for m in M_VALUES}
        return {
            "geometric_mean": round(statistics.geometric_mean(r[key] for r in held), 4),
            "by_m": {
                m: {
                    "geometric_mean": round(statistics.geometric_mean(r[key] for r in at_m), 4),
                    "least": min(r[key] for r in at_m),
                    "least_at": min(at_m, key=lambda r: r[key])["layer"],
                    "share_of_floor": round(statistics.geometric_mean(r["share_of_floor"] for r in at_m), 4),
                }
                for m, at_m in by_m.items()
                if at_m
            },
        }

    return {
        "library": means("ratio"),
        "vllm": means("vllm_ratio") if any("vllm_ratio" in r for r in records) else None,
        "points": len(records),
        "points_under_least": [
            {key: r[key] for key in ("layer", "n", "k", "m", "ratio")} for r in records if r["ratio"] < LEAST_RATIO
        ],
        "library_drift": round(max(abs(r["library_again_us"] / r["library_us"] - 1) for r in records), 4),
    }


def show(result: dict[str, Any]) -> None:
    """One line for each M."""
    for name in ("library", "vllm"):
        if not result[name]:
            continue
        print(f"{name}'s time over ours: geometric mean {result[name]['geometric_mean']:.3f}")
        for m, row in result[name]["by_m"].items():
            print(
                f"{m:6} {row['geometric_mean']:6.3f}  least {row['least']:.3f} at {row['least_at']:24}"
                f"  share of floor {row['share_of_floor']:.3f}"
            )
    under = result["points_under_least"]
    print(f"{len(under)} of {result['points']} points under {LEAST_RATIO:.2f}")
    for point in under:
        print(f"  {point['ratio']:.3f}  M {point['m']:5}  N {point['n']:6}  K {point['k']:6}  {point['layer']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--vllm", action="store_true", help="also measure vLLM's batch-invariant product")
    add_selection(parser)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = args.rows or M_VALUES
    if args.compile:
        compile_part(args.only, rows, *map(int, args.compile.split("/")))
        return
    in_parts([__file__, *arguments(args), "--compile"])
    bytes_per_second, flops_per_second = copy_bytes_per_second(), product_flops_per_second()
    torch.cuda.empty_cache()
    records = points(args.only, rows, args.vllm, bytes_per_second, flops_per_second)
    result = summary(records)
    if args.only:
        for record in records:
            print({key: value for key, value in record.items() if key not in ("floor_us", "share_of_floor")})
    show(result)
    if args.output:
        content = {
            "environment": environment(args.commit),
            "copy_bytes_per_second": round(bytes_per_second),
            "product_flops_per_second": round(flops_per_second),
            "summary": result,
        }
        lines = ",\n".join(json.dumps(record) for record in records)
        args.output.write_text(json.dumps(content, indent=1)[:-2] + f',\n "points": [\n{lines}\n]\n}}\n')


if __name__ == "__main__":
    main()
