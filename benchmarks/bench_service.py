"""Claim: on two cores the verification service answers 200 clients that poll and post for two minutes without an error
but 429 and 401 where due, its GETs within 50 ms at the 99th percentile, in flat memory; and ten kills with SIGKILL in
the middle of a run leave the database intact and every finished run in it.

Starts the service on a target of its own that answers at once, drives it, kills it. Everything runs on this machine:

    python benchmarks/bench_service.py --output benchmarks/results/service_cpu.json
"""

import argparse
import asyncio
import contextlib
import json
import platform
import random
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import uvicorn

TOKEN = "a-token-of-enough-letters"
WRONG = "a-token-that-is-wrong"
SMALL = {"arms": ["identical"], "num_prompts": 20, "max_concurrency": 8}
LONG = {"arms": ["identical"], "num_prompts": 2000, "max_concurrency": 4}
EXPECTED = {
    ("GET", 200),
    ("GET", 401),  # of the clients whose token is wrong
    ("POST", 202),
    ("POST", 429),
}


async def target(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[dict[str, Any]], Any]) -> None:
    """A model server, as an ASGI application: the same short answer to every request, after 5 ms."""
    if scope["path"] == "/v1/models":
        answer: dict[str, Any] = {"data": [{"id": "constant"}]}
    else:
        await receive()
        await asyncio.sleep(0.005)
        top = {f"token_id:{token}": -1.0 - token for token in range(5)}
        logprobs = {"tokens": ["token_id:0"] * 16, "token_logprobs": [-1.0] * 16, "top_logprobs": [top] * 16}
        choice = {"index": 0, "text": "x" * 16, "token_ids": [0] * 16, "logprobs": logprobs, "finish_reason": "length"}
        answer = {"choices": [choice | {"prompt_token_ids": [1, 2, 3]}], "system_fingerprint": "constant"}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


class Service:
    """The service as a process of its own."""

    def __init__(self, database: Path, target_url: str) -> None:
        command = [Path(sys.executable).with_name("vllm-deterministic"), "service", "--port", "0"]
        command += ["--target", f"one={target_url}", "--token", TOKEN, "--database", database]
        log = database.with_suffix(".log")
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stderr=output)
        while not (listening := re.search(r"listening on (\S+)", log.read_text())):
            if self.process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)
        self.url = listening[1]
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=60
        )
        while True:
            try:
                self.client.get("/health").raise_for_status()
                return
            except httpx.ConnectError:
                time.sleep(0.05)

    def resident_bytes(self) -> int:
        """Memory of the service itself; its workers come and go."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def start(self, asked: dict[str, Any]) -> str:
        """Start a verification; its id."""
        answer = self.client.post("/v1/verifications", json=asked)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def status(self, id: str) -> str:
        """The status of a verification."""
        return str(self.client.get(f"/v1/verifications/{id}").json()["status"])

    def until(self, id: str, *statuses: str) -> None:
        """Wait for one of the statuses."""
        while self.status(id) not in statuses:
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()


class Connection:
    """One kept-alive connection of a client that costs next to nothing, so that the service is what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect."""
        host, _, port = url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def request(
        self, method: str, path: str, token: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, body."""
        content = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, await self._reader.readexactly(int(headers["content-length"]))


async def load(service: Service, clients: int, seconds: float) -> dict[str, Any]:
    """Latencies and statuses of clients that do something about once a second each, and the service's memory."""
    latencies: dict[str, list[float]] = {"GET": [], "POST": []}
    statuses: Counter[str] = Counter()
    memory: list[int] = []
    known: list[str] = [service.start(SMALL)]
    ends = time.monotonic() + seconds

    async def one(number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.random())
        connection = await Connection.open(service.url)
        token = WRONG if number % 20 == 0 else TOKEN
        while time.monotonic() < ends:
            method, path = "GET", f"/v1/verifications/{rng.choice(known[-20:])}"
            if rng.random() < 0.1 and token == TOKEN:
                method, path = "POST", "/v1/verifications"
            elif rng.random() < 0.2:
                path = "/v1/verifications"
            began = time.perf_counter()
            status, headers, body = await connection.request(method, path, token, SMALL if method == "POST" else None)
            latencies[method].append(time.perf_counter() - began)
            statuses[f"{method} {status}"] += 1
            if status == 202:
                known.append(json.loads(body)["id"])
            if status == 429 and int(headers["retry-after"]) < 1:
                raise AssertionError("429 without a Retry-After")
            await asyncio.sleep(rng.uniform(0.5, 1.5))

    async def watch() -> None:
        while time.monotonic() < ends:
            memory.append(service.resident_bytes())
            await asyncio.sleep(seconds / 24)

    await asyncio.gather(watch(), *(one(number) for number in range(clients)))
    half = len(memory) // 2
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "unexpected": {key: n for key, n in statuses.items() if tuple(_parse(key)) not in EXPECTED},
        **{f"{method.lower()}_{name}": value for method, all_of in latencies.items() for name, value in _ms(all_of)},
        "verifications_run": len(known),
        "resident_mib_second_quarter": round(statistics.median(memory[half // 2 : half]) / 2**20, 1),
        "resident_mib_last_quarter": round(statistics.median(memory[half + half // 2 :]) / 2**20, 1),
    }


def _parse(key: str) -> tuple[str, int]:
    method, status = key.split()
    return method, int(status)


def _ms(latencies: list[float]) -> list[tuple[str, float]]:
    cuts = statistics.quantiles(latencies, n=1000, method="inclusive")
    return [(f"p{name}_ms", round(1000 * cuts[at], 2)) for name, at in (("50", 499), ("99", 989), ("99.9", 998))]


def crash(folder: Path, target_url: str, times: int) -> dict[str, Any]:
    """Kill the service in the middle of a run, again and again, on one database."""
    database = folder / "crash.db"
    finished: list[str] = []
    running: list[str] = []
    for _ in range(times):
        with Service(database, target_url) as service:
            finished.append(service.start(SMALL))
            service.until(finished[-1], "identical")
            running.append(service.start(LONG))
            service.until(running[-1], "running")
            time.sleep(random.random())
            service.process.kill()
            service.process.wait()
        with contextlib.closing(sqlite3.connect(database)) as opened:
            (intact,) = opened.execute("PRAGMA integrity_check").fetchone()
            if intact != "ok":
                raise AssertionError(intact)
    with Service(database, target_url) as service:
        kept = sum(service.status(id) == "identical" for id in finished)
        records = sum(service.client.get(f"/v1/verifications/{id}/record").is_success for id in finished)
        marked = sum(service.status(id) == "interrupted" for id in running)
    return {
        "kills": times,
        "intact": times,
        "finished_kept": kept,
        "records_kept": records,
        "unfinished_marked": marked,
    }


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.processor(),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("fastapi", "starlette", "uvicorn", "aiosqlite")},
        "sqlite": sqlite3.sqlite_version,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--target-port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.target_port:
        uvicorn.run(target, port=args.target_port, log_level="error")
        return
    port = 8765
    serving = subprocess.Popen([sys.executable, __file__, "--target-port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            with Service(Path(folder) / "load.db", url) as service:
                loaded = asyncio.run(load(service, args.clients, args.seconds))
            print(json.dumps(loaded, indent=1), flush=True)
            crashed = crash(Path(folder), url, args.kills)
        print(json.dumps(crashed, indent=1))
    finally:
        serving.terminate()
        serving.wait()
    if args.output:
        result = {"environment": environment(), "load": loaded, "crash": crashed}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
