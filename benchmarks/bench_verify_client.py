"""Claim: 10,000 requests through the verifying client take bounded memory and leave no connection open.

Runs the arm identical against a server in a process of its own, once where all answers are equal and once where each
differs from every other, the worst that a server can do. Reports the growth of resident memory, connections, speed:

    python benchmarks/bench_verify_client.py --output benchmarks/results/verify_client.json
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from vllm_deterministic import __version__
from vllm_deterministic.report import html
from vllm_deterministic.report import json as run_json
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

TOKENS, LOGPROBS = 16, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    # A process of its own for each: the peak of resident memory never falls.
    context = multiprocessing.get_context("spawn")
    result: dict[str, Any] = {"environment": environment()}
    for answers in ("equal", "different"):
        with ProcessPoolExecutor(1, context) as pool:
            result[answers] = pool.submit(measure, answers, args.requests, args.concurrency).result()
        print(answers, json.dumps(result[answers]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(answers: str, requests: int, concurrency: int) -> dict[str, Any]:
    """One run of so many requests; bytes are growth of this process over what it held when all was imported."""
    with serving(answers) as (url, accepted):
        before = peak_bytes()
        settings = Settings(
            base_url=url, arms=("identical",), num_prompts=requests, max_concurrency=concurrency, logprobs=LOGPROBS
        )
        start = time.monotonic()
        record = asyncio.run(verify(settings))
        run_s, run_bytes = time.monotonic() - start, peak_bytes() - before
        left_open = len(psutil.Process().net_connections())
        document, page = run_json.render(record), html.render(record)
        arm = record.arm("identical")
        return {
            "requests": arm.answered,
            "unique_outputs": arm.unique_outputs,
            "requests_per_s": round(arm.answered / run_s),
            "run_bytes": run_bytes,
            "run_and_reports_bytes": peak_bytes() - before,
            "json_bytes": len(document.encode()),
            "html_bytes": len(page.encode()),
            "connections_made": accepted.value,
            "connections_left_open": left_open,
        }


@contextmanager
def serving(answers: str) -> Iterator[tuple[str, Any]]:
    """A server in another process: its URL, and a counter of the connections that it accepted."""
    accepted, port = multiprocessing.Value("i", 0), multiprocessing.Value("i", 0)
    server = multiprocessing.get_context("fork").Process(target=serve, args=(answers, accepted, port))
    server.start()
    try:
        while not port.value:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port.value}", accepted
    finally:
        server.terminate()
        server.join()


def serve(answers: str, accepted: Any, port: Any) -> None:
    """Answer completions with `TOKENS` tokens and `LOGPROBS` logprobs each."""
    numbers = count(1)

    def completion() -> dict[str, Any]:
        shift = 0 if answers == "equal" else next(numbers)
        names = [f"token_id:{place * 1_000_000 + shift}" for place in range(TOKENS)]
        tops = [{f"{name}{'0' * rank}": -1.0 - rank - shift / 7e6 for rank in range(LOGPROBS)} for name in names]
        logprobs = {
            "tokens": names,
            "token_logprobs": [-1.0 - shift / 7e6] * TOKENS,
            "top_logprobs": tops,
        }
        ids = [place * 1_000_000 + shift for place in range(TOKENS)]
        choice = {"index": 0, "text": " word" * TOKENS, "finish_reason": "length", "token_ids": ids}
        return {"choices": [choice | {"logprobs": logprobs, "prompt_token_ids": list(range(64))}]}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.value += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                await reader.readexactly(int(length or 0))
                models = {"data": [{"id": "bench", "max_model_len": 4096}]}
                body = json.dumps(completion() if head.startswith("post") else models).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(listen())


def peak_bytes() -> int:
    """The most that this process ever held resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "vllm_deterministic": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "argv": " ".join(sys.argv),
    }


if __name__ == "__main__":
    main()
