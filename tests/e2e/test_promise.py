"""The promise on the real server: load, cache, chunks, preemption, replica, restart, compilation change no byte."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_deterministic.local_server import LocalServer
from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from .conftest import Catalogue, Serve, differing, metric


def run_verify(server: LocalServer, **changes: Any) -> RunRecord:
    counts = {"num_prompts": 64, "max_concurrency": 32, "mixed_prompts": 40, "sampled_prompts": 12, "max_tokens": 8}
    return asyncio.run(verify(Settings(base_url=server.base_url, **{**counts, **changes})))


def test_load(server: LocalServer, expected: dict[str, str], catalogue: Catalogue) -> None:
    for seed in range(2):
        assert differing(expected, catalogue.crowded(server, seed=seed)) == []


def test_no_two_requests_have_the_same_answer(expected: dict[str, str]) -> None:
    assert len(set(expected.values())) == len(expected), "the catalogue proves less than it seems to"


def test_verify_finds_all_arms_identical(server: LocalServer) -> None:
    record = run_verify(server, chunk_budget=512)
    assert record.exit_code == 0, record.message
    assert [arm.name for arm in record.arms] == ["identical", "mixed", "prefix", "sampled"]
    hits = sum(phase.prefix_cache_hits or 0 for phase in record.arm("prefix").phases)
    assert hits > 0, "no prefix was found in the cache: the arm proves nothing"


def test_replica_and_restart(expected: dict[str, str], catalogue: Catalogue, server: LocalServer, serve: Serve) -> None:
    """A second process with the same settings, on another core beside the first."""
    replica = serve("--max-num-batched-tokens", "4096", core=1)
    assert differing(expected, catalogue.crowded(replica)) == []
    assert differing(expected, catalogue.alone(server)) == []


def test_chunks_of_64_in_small_blocks(expected: dict[str, str], catalogue: Catalogue, serve: Serve) -> None:
    server = serve("--max-num-batched-tokens", "64", "--max-num-seqs", "32", "--block-size", "32", core=1)
    assert differing(expected, catalogue.crowded(server)) == []
    assert differing(expected, catalogue.alone(server)) == []


def test_chunks_of_16_without_prefix_cache(expected: dict[str, str], catalogue: Catalogue, serve: Serve) -> None:
    server = serve("--max-num-batched-tokens", "16", "--max-num-seqs", "16", "--no-enable-prefix-caching", core=1)
    assert differing(expected, catalogue.crowded(server)) == []


def test_preemption(expected: dict[str, str], catalogue: Catalogue, serve: Serve) -> None:
    # 66 blocks of 16 hold one request of the greatest length, 1024 tokens, and little else.
    server = serve("--block-size", "16", "--num-gpu-blocks-override", "66", core=1)
    assert differing(expected, catalogue.crowded(server, times=3)) == []
    assert metric(server, "vllm:num_preemptions_total") > 0, "no request was preempted: the test proves nothing"


def test_compiled(expected: dict[str, str], catalogue: Catalogue, serve: Serve) -> None:
    server = serve("--max-num-batched-tokens", "512", core=1, compiled=True)
    assert differing(expected, catalogue.crowded(server)) == []
    assert differing(expected, catalogue.alone(server)) == []


def test_planted_fault_is_seen_over_http(catalogue: Catalogue, serve: Serve, expected: dict[str, str]) -> None:
    plant = {"PYTHONPATH": str(Path(__file__).parent / "plant")}
    server = serve("--worker-extension-cls", "planted_fault.Extension", core=1, env=plant)
    assert differing(expected, catalogue.crowded(server)) != []
    record = run_verify(server, arms=("mixed",))
    assert record.exit_code == 1
    assert record.arm("mixed").unique_logprobs > 1


@pytest.mark.parametrize("name", ["no seed", "four choices"])
def test_choices_of_one_request_differ(name: str, expected: dict[str, str]) -> None:
    choices = json.loads(expected[name])
    assert len({tuple(choice["token_ids"]) for choice in choices}) == len(choices)
