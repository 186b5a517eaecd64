"""Many requests: what is kept does not grow with equal answers, and no connection or task is left behind.

benchmarks/bench_verify_client.py measures the same with ten thousand.
"""

import asyncio
import os
from pathlib import Path

from vllm_deterministic.verify.completion import Completion, parse_completion
from vllm_deterministic.verify.journal import ArmJournal
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Ask, Planned

from .fake_server import FakeServer


def _answer(text: str) -> Completion:
    logprobs = '{"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}'
    body = f'{{"choices": [{{"text": "{text}", "logprobs": {logprobs}}}], "prompt_token_ids": [1, 2, 3]}}'
    return parse_completion(body.encode())


def test_equal_answers_are_kept_once_and_a_neighbours_not_at_all() -> None:
    arm = ArmJournal("mixed", 30, 0.0, 0.0)
    for number in range(30):
        planned = Planned(f"{number}", Ask("p", 1, 1), compared=number % 3 > 0)
        arm.add(planned, "key", "phase", 0.0, 1.0, _answer("a" if number % 3 == 1 else "b"))
    kept = [exchange.whole().choices for exchange in arm.exchanges]
    assert len({id(choices) for choices in kept if choices}) == 2
    assert [choices == () for choices in kept] == [number % 3 == 0 for number in range(30)]
    assert {exchange.output_tokens for exchange in arm.exchanges} == {1}
    assert {exchange.completion.prompt_token_ids for exchange in arm.exchanges} == {None}


def _sockets() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except FileNotFoundError:  # the descriptor that listed them
            continue
    return count


def test_a_long_run_leaves_no_connection_and_no_task() -> None:
    server = FakeServer(latency_s=0.0)
    with server.listen() as url:
        settings = Settings(base_url=url, arms=("identical", "mixed"), num_prompts=2000, max_concurrency=32)

        async def run() -> None:
            sockets, tasks = _sockets(), len(asyncio.all_tasks())
            record = await verify(settings)
            assert record.status == "identical"
            assert server.most_in_flight <= 32
            for _ in range(100):  # the server's ends close a moment later
                if _sockets() <= sockets:
                    break
                await asyncio.sleep(0.02)
            assert (_sockets(), len(asyncio.all_tasks())) == (sockets, tasks)

        asyncio.run(run())
