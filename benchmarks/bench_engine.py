"""Claim: on an H200, --enable-deterministic answers one request in at most 0.95 of the default's time and keeps 0.97 of
its throughput and 0.98 of its prefill, with less than 256 MiB more memory and at most 60 s more to start.

The engines of all modes are on the device together, each in a process of its own, started one after the other, and run
each probe in turns: in one round the default first, in the next last. So clocks and temperature are the same for both
sides of a ratio. Medians are compared; the ratios of single rounds show how far they can be trusted, and the floor how
far the default's own rounds lie apart. Bytes are compared in one round. On an otherwise idle machine, in 300 s:

    python benchmarks/bench_engine.py --output benchmarks/results/engine_qwen3-8b.json

Where a decode step's time goes, of one request and of 512, is listed by `--profile`, best with `--probes` and no probe.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import engine_probes

PROFILED_REQUESTS = (1, 512)


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
    parser.add_argument("--rounds", type=int, default=3, help="of the probes that are timed, as far as time allows")
    parser.add_argument("--limit-s", type=float, default=295, help="of the whole run")
    parser.add_argument("--kv-gib", type=int, default=44, help="size of the KV cache of each mode")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a decode step first")
    parser.add_argument(
        "--start-together", action="store_true", help="saves time; what a start takes and holds is then not told"
    )
    parser.add_argument("--commit", default="unknown", help="that is measured, to be noted in the result")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    run = Run(args)
    try:
        run.start()
        if args.profile:
            run.profile()
        run.measure()
    finally:
        run.end()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    result = {"settings": settings, "summary": summarize(run.measured), "modes": run.measured}
    print(json.dumps(result["summary"], indent=1))
    for mode, values in run.measured.items():
        for profile in values.get("profiles", []):
            print(f"\n{mode}, {profile['requests']} requests\n{profile_table(profile)}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


class Run:
    """The processes of the modes, and what they have measured. The others go on without one that fails."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.limit_s
        self.measured: dict[str, dict[str, Any]] = {}
        self._processes: dict[str, tuple[multiprocessing.process.BaseProcess, Connection]] = {}

    def start(self) -> None:
        """Start the engines one after the other or, where their starts are not to be compared, together."""
        if self.args.start_together:
            for mode in self.args.modes:
                self._start(mode)
            for mode in self.args.modes:
                if (started := self._answer(mode)) is not None:
                    self.measured[mode] |= {"environment": started["environment"]}
            return
        for mode in self.args.modes:
            before = device_bytes_used()
            self._start(mode)
            if (started := self._answer(mode)) is not None:
                self.measured[mode] |= started | {"device_bytes_used": device_bytes_used() - before}

    def _start(self, mode: str) -> None:
        print(f"{mode}: starting", flush=True)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=run_mode, args=(there, mode, self.args))
        process.start()
        there.close()  # else its end would not be seen here
        self._processes[mode] = process, here
        self.measured[mode] = {}

    def profile(self) -> None:
        """Profile each mode's decode steps."""
        for requests in PROFILED_REQUESTS:
            for mode in list(self._processes):
                if (found := self._ask(mode, ("profile", requests))) is not None:
                    self.measured[mode].setdefault("profiles", []).append(found)

    def measure(self) -> None:
        """The timed probes in rounds, the others in the first; what would end too late is left out in all modes."""
        took: dict[str, float] = {}
        seen: dict[str, dict[str, set[str]]] = {mode: collections.defaultdict(set) for mode in self.measured}
        for number in range(self.args.rounds):
            for probe in self.args.probes:
                begin = time.monotonic()
                if (probe in engine_probes.ONCE and number) or begin + took.get(probe, 0.0) > self.deadline:
                    continue
                for mode in sorted(self._processes, key=self.args.modes.index, reverse=number % 2 == 1):
                    found = self._ask(mode, ("measure", probe))
                    if found is None:
                        continue
                    result = self.measured[mode]
                    if "device_bytes_used" in result:
                        result["device_bytes_used"] += found["device_bytes"]
                    for name, value in found["values"].items():
                        result.setdefault("values", {}).setdefault(name, []).append(value)
                    for name, outputs in found["outputs"].items():
                        seen[mode][name] |= outputs
                        result.setdefault("unique", {})[name] = len(seen[mode][name])
                    print(f"{mode}: {probe} {found['values']}", flush=True)
                took[probe] = time.monotonic() - begin

    def end(self) -> None:
        """End every process."""
        for process, _ in self._processes.values():
            process.kill()
            process.join()

    def _ask(self, mode: str, what: tuple[str, Any]) -> dict[str, Any] | None:
        with contextlib.suppress(ConnectionError):  # it has ended: so says the answer
            self._processes[mode][1].send(what)
        return self._answer(mode)

    def _answer(self, mode: str) -> dict[str, Any] | None:
        """What the process of a mode sends next; None if it has ended, or is late and is ended."""
        process, connection = self._processes[mode]
        error = f"not done within {self.args.limit_s:.0f} s"
        if connection.poll(max(0.0, self.deadline - time.monotonic())):
            try:
                answer: dict[str, Any] = connection.recv()
            except (EOFError, ConnectionError):
                process.join(10)
                error = f"ended with status {process.exitcode}"
            else:
                return answer
        process.kill()
        process.join()
        self.measured[mode]["error"] = error
        del self._processes[mode]
        return None


def run_mode(connection: Connection, mode: str, args: argparse.Namespace) -> None:
    """The process of one mode: start its engine, then do what is asked."""
    variables = engine_probes.environment(mode)
    os.environ.clear()
    os.environ.update(variables)
    engine = engine_probes.Engine(args.model, args.layers, mode, args.kv_gib)
    from gpu_timing import environment

    does: dict[str, Callable[[engine_probes.Engine, Any], dict[str, Any]]] = {
        "measure": engine_probes.measure,
        "profile": engine_probes.profile,
    }
    connection.send({"environment": environment(args.commit), "startup_s": engine.startup_s})
    while True:
        what, argument = connection.recv()
        connection.send(does[what](engine, argument))


def device_bytes_used() -> int:
    """Bytes of the first visible device that are taken, by whomever."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "-i", device, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


def summarize(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of each mode. Against the default: the ratio of medians, the range of the rounds' ratios, and
    the floor, which is the default's lowest round by its highest."""
    default = measured.get("default", {})
    summary: dict[str, Any] = {}
    for mode, result in measured.items():
        for name, values in result.get("values", {}).items():
            row = summary.setdefault(name, {})
            row[mode] = statistics.median(values)
            row[f"{mode} range"] = [min(values), max(values)]
            baseline = default.get("values", {}).get(name)
            if baseline and mode != "default":
                ratios = [value / base for value, base in zip(values, baseline, strict=False)]
                row[f"{mode} / default"] = row[mode] / statistics.median(baseline)
                row[f"{mode} / default range"] = [min(ratios), max(ratios)]
                # One round says nothing about how far rounds lie apart.
                row["floor"] = min(baseline) / max(baseline) if len(baseline) > 1 else None
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
