"""Claim: `vllm serve --enable-deterministic` answers each request with the same bytes under load on an H200: every arm
of verify with 1000 requests of 256 tokens, and 100,000 short completions mixed at random, of which none differs.

Writes a model of random weights and starts a server of each mode in turn. Parts: `crowds`, verify's arms identical and
mixed; `sequences`, its arms prefix and sampled; `many`, short completions, several prompts to an HTTP request, each
against the first answer of its target; `receipts`, taken by the command line and replayed beside other requests. The
last two are for the deterministic server alone. Load comes from processes of its own, whose CPU time is in the result
beside the server's. The result is written after each part. On an otherwise idle machine:

    python benchmarks/bench_serving.py --model-dir MODEL --serve-args='--api-server-count 4' --output RESULT.json

On a CPU, with small numbers, it takes two minutes a mode:

    python benchmarks/bench_serving.py --model tiny --model-dir MODEL --requests 24 --tokens 16 --concurrency 8 \\
        --mixed-runs 2 --completions 400 --targets 100 --in-flight 32 --processes 2 --receipts 10 --kv-split 256 \\
        --serve-args='--kv-cache-memory-bytes 500000000 --enforce-eager'
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import random_model
import serving_many
import serving_receipts
import serving_verify
from load_processes import Load, ServerShares, Task, cpu_shares
from machine import gpu_and_driver, versions

from vllm_deterministic.certify.whole_file import write_whole
from vllm_deterministic.local_server import LocalServer, ServerError
from vllm_deterministic.verify.metrics import Counters, read_counters

MODES = {"deterministic": ["--enable-deterministic"], "default": []}
PARTS = ("sequences", "crowds", "many", "receipts")
OF_DEFAULT = ("sequences", "crowds")
_START_LIMIT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=random_model.SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--model-dir", type=Path, required=True, help="where the model is, or is to be written")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--at-once", action="store_true", help="verify's arms beside each other; each then sees the shares of all"
    )
    parser.add_argument("--limit-s", type=float, default=240, help="of each part; what was done by then is told")
    parser.add_argument("--serve-args", default="", help="further arguments of vllm serve, in one word")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="of the server: its prefill chunks")
    parser.add_argument("--kv-split", type=int, default=512, help="the server's, which prompts are built around")
    parser.add_argument("--requests", type=int, default=1000, help="of each arm of verify")
    parser.add_argument("--tokens", type=int, default=256, help="of each compared answer of verify")
    parser.add_argument(
        "--concurrency", type=int, default=256, help="of each run of mixed and prefix; of the others together"
    )
    parser.add_argument("--mixed-runs", type=int, default=22, help="that share the requests of verify's arm mixed")
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--in-flight", type=int, default=1024, help="completions at a time")
    parser.add_argument("--batch", type=int, default=8, help="prompts in one HTTP request")
    parser.add_argument(
        "--cold", type=float, default=0.05, help="share of completions with a prefix cache of their own"
    )
    parser.add_argument("--processes", type=int, default=6, help="that send completions")
    parser.add_argument("--receipts", type=int, default=100)
    parser.add_argument("--commit", default="unknown", help="that is measured, to be noted in the result")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    begin = time.monotonic()
    # In a process of its own, which gives back what it took of the GPU.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        config = pool.submit(random_model.write_random_model, args.model_dir, args.model, args.layers).result()
    told = {name: value for name, value in vars(args).items() if name not in ("model_dir", "output", "commit")}
    result: dict[str, Any] = {"environment": environment(args.commit), "settings": told, "modes": {}}
    result["model"] = {"config": config, "written_s": time.monotonic() - begin}
    for mode in args.modes:
        measure(mode, args, config["vocab_size"], result)


def measure(mode: str, args: argparse.Namespace, vocab_size: int, result: dict[str, Any]) -> None:
    """Start the server of a mode, run its parts, and keep what came of each at once."""
    print(f"{mode}: starting", flush=True)
    found: dict[str, Any] = {}
    result["modes"][mode] = found
    begin = time.monotonic()
    try:
        with server_of(mode, args) as server:
            found["startup_s"] = time.monotonic() - begin
            found["fingerprint"] = probe(server.base_url, server_name(args))
            print(f"{mode}: {found}", flush=True)
            for parts in groups(mode, args):
                with ThreadPoolExecutor(len(parts)) as pool:
                    measured = pool.map(lambda part: measure_part(part, server, args, vocab_size), parts)
                    for part, found[part] in zip(parts, measured, strict=True):
                        print(f"{mode}: {part} {json.dumps(found[part], indent=1)}", flush=True)
                        write(result, args.output)
    except (ServerError, httpx.HTTPError, psutil.Error) as error:
        found["error"] = str(error)
        print(f"{mode}: {error}", flush=True)
    write(result, args.output)


def groups(mode: str, args: argparse.Namespace) -> list[list[str]]:
    """The parts of a mode, those together that run beside each other."""
    parts = [part for part in args.parts if mode != "default" or part in OF_DEFAULT]
    if not args.at_once:
        return [[part] for part in parts]
    beside = [part for part in parts if part in OF_DEFAULT]
    return [*([beside] if beside else []), *([part] for part in parts if part not in OF_DEFAULT)]


def server_of(mode: str, args: argparse.Namespace) -> LocalServer:
    """The server of a mode. It tells the parts of its fingerprint, so that receipts hold them."""
    flags = ["--max-model-len", "4096", "--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    flags += ["--disable-uvicorn-access-log", *MODES[mode], *shlex.split(args.serve_args)]
    return LocalServer(
        args.model_dir,
        flags,
        log=args.model_dir.with_name(f"serve-{mode}.log"),
        env={"VLLM_PLUGINS": "deterministic"},
        kv_cache_bytes=None,
        program=[sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"],
        ready_timeout_s=_START_LIMIT_S,
    )


def server_name(args: argparse.Namespace) -> str:
    """What the server calls the model."""
    return str(args.model_dir)


def probe(base_url: str, model: str) -> str | None:
    """The fingerprint that the server's answers carry."""
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 1}
    reply = httpx.post(f"{base_url}/v1/completions", json=body, timeout=120, trust_env=False).raise_for_status()
    fingerprint: str | None = reply.json().get("system_fingerprint")
    return fingerprint


def measure_part(part: str, server: LocalServer, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """One part, with the CPU shares of the processes that sent it and of the server's."""
    url = server.base_url
    plan = serving_many.Plan(args.completions, args.targets, args.batch, args.cold, vocab_size)
    before, shares, begin = counters(url), ServerShares(server.pid), time.monotonic()
    if part == "receipts":
        load = {"processes": args.processes, "in_flight": args.in_flight, "limit_s": args.limit_s}
        found = serving_receipts.measure_receipts(
            url, server_name(args), plan, receipts=args.receipts, tokens=min(64, args.tokens), load=load
        )
    else:
        tasks, planned, summarize = work_of(part, url, args, plan)
        with Load(part, tasks, planned, args.limit_s) as load_processes:
            results = load_processes.results()
        found = summarize(results) | {"load": cpu_shares(results)}
    seconds = time.monotonic() - begin
    found |= {"seconds": seconds, "server_cpu_shares": shares.shares(), "cores": os.cpu_count()}
    if "output_tokens" in found:
        found["tokens_per_s"] = found["output_tokens"] / seconds
    if before is not None and (after := counters(url)) is not None:
        found["server_counters"] = dataclasses.asdict(after - before)
    return found


def work_of(
    part: str, url: str, args: argparse.Namespace, plan: serving_many.Plan
) -> tuple[list[Task], int, Callable[[Sequence[dict[str, Any]]], dict[str, Any]]]:
    """The tasks of a part that is load alone, how many requests they plan, and what tells their results together."""
    if part == "many":
        tasks = serving_many.many_tasks(url, server_name(args), plan, args.processes, args.in_flight)
        return tasks, plan.completions, functools.partial(serving_many.summarize, plan)
    common = serving_verify.common_settings(
        url,
        tokens=args.tokens,
        concurrency=args.concurrency,
        kv_split=args.kv_split,
        chunk_budget=args.max_num_batched_tokens,
    )
    if part == "crowds":
        tasks = serving_verify.crowd_tasks(common, requests=args.requests, runs=args.mixed_runs)
    else:
        tasks = serving_verify.sequence_tasks(common, requests=args.requests)
    return tasks, serving_verify.planned(tasks), serving_verify.summarize


def counters(base_url: str) -> Counters | None:
    """The server's counts of prefix cache and preemptions."""
    return read_counters(httpx.get(f"{base_url}/metrics", timeout=120, trust_env=False).text)


def write(result: dict[str, Any], output: Path | None) -> None:
    """Replace the result by what is known so far."""
    if output is not None:
        write_whole(output, json.dumps(result, indent=1) + "\n", mode=0o644)


def environment(commit: str) -> dict[str, Any]:
    """Date, device, driver, versions and the commit that was measured."""
    gpu, driver = gpu_and_driver() or ("none", "none")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": gpu,
        "driver": driver,
        **versions("vllm", "torch", "triton", "transformers"),
        "python": platform.python_version(),
        "commit": commit,
    }


if __name__ == "__main__":
    main()
