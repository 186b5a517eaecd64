"""Claim: on an H200, --enable-deterministic answers one request in at most 0.95 of the default's time and keeps 0.97 of
its throughput and 0.98 of its prefill, with less than 256 MiB more memory and at most 60 s more to start.

Runs each mode in a process of its own, one after the other, and compares medians. The floor is how far the default's
own rounds lie apart. Run on an otherwise idle machine:

    python benchmarks/bench_engine.py --output benchmarks/results/engine_qwen3-8b.json [--profile]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine_probes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=engine_probes.MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument(
        "--modes", nargs="+", choices=engine_probes.MODES, default=["default", "deterministic"], metavar="MODE"
    )
    parser.add_argument(
        "--probes", nargs="*", choices=engine_probes.PROBES, default=list(engine_probes.PROBES), metavar="PROBE"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all probes, as far as --limit-s allows")
    parser.add_argument("--limit-s", type=float, default=200, help="of one mode, its start included")
    parser.add_argument("--kv-gib", type=int, default=90, help="size of the KV cache")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of a decode step")
    parser.add_argument("--commit", default="unknown", help="that is measured, to be noted in the result")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=engine_probes.MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_mode(args)
        return
    measured = {mode: start_mode(mode, args) for mode in args.modes}
    result = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("child", "output")},
        "summary": summarize(measured),
        "modes": measured,
    }
    print(json.dumps(result["summary"], indent=1))
    for mode, values in measured.items():
        if "profile" in values:
            print(f"\n{mode}\n{profile_table(values['profile'])}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def start_mode(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a mode in a process of its own; what it has measured when its time is over counts."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--child", mode, "--output", str(output)]
        print(f"{mode}: starting", flush=True)
        process = subprocess.Popen(command, env=engine_probes.environment(mode))
        error = ""
        try:
            if process.wait(args.limit_s):
                error = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = f"ended after {args.limit_s:.0f} s"
        result: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    return result | ({"error": error} if error else {})


def run_mode(args: argparse.Namespace) -> None:
    """The process of one mode."""
    # The profile, and writing down, take the last of the time.
    deadline = time.monotonic() + args.limit_s - (25 if args.profile else 5)
    engine = engine_probes.Engine(args.model, args.layers, args.child, args.kv_gib)
    from gpu_timing import environment

    result: dict[str, Any] = {"environment": environment(args.commit), "startup_s": engine.startup_s}
    if args.profile:
        result["profile"] = engine_probes.profile(engine)
        args.output.write_text(json.dumps(result))
    for measured in engine_probes.measure(engine, args.probes, args.rounds, deadline):
        result |= measured
        args.output.write_text(json.dumps(result))
    print(json.dumps({name: value for name, value in result.items() if name != "profile"}), flush=True)


def summarize(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians of each mode; against the default their ratio, and the floor: its lowest round by its highest."""
    default = measured.get("default", {})
    summary: dict[str, Any] = {}
    for mode, result in measured.items():
        for name, values in result.get("values", {}).items():
            row = summary.setdefault(name, {})
            row[mode] = statistics.median(values)
            baseline = default.get("values", {}).get(name)
            if baseline and mode != "default":
                row[f"{mode} / default"] = row[mode] / statistics.median(baseline)
                row["floor"] = min(baseline) / max(baseline)
        for name in ("startup_s", "device_bytes_used"):
            if name in result:
                row = summary.setdefault(name, {})
                row[mode] = result[name]
                if mode != "default" and name in default:
                    row[f"{mode} - default"] = result[name] - default[name]
        for name, count in result.get("unique", {}).items():
            summary.setdefault(f"unique {name}", {})[mode] = count
    return summary


def profile_table(profile: dict[str, Any]) -> str:
    """A line for each kernel, the most expensive first."""
    lines = [f"{'us/step':>9} {'count':>6}  kernel"]
    lines += [f"{row['us']:9.1f} {row['count']:6.1f}  {row['kernel'][:90]}" for row in profile["kernels"]]
    launches = sum(row["count"] for row in profile["kernels"])
    lines.append(f"{profile['kernels_us']:9.1f} {launches:6.1f}  all kernels; a step takes {profile['step_us']:.1f} us")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
