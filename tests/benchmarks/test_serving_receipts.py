"""The benchmark's receipts go through the command line, and what comes of them is told."""

from typing import Any

import pytest

pytest.importorskip("psutil", reason="comes with vLLM")

import serving_receipts
from serving_many import Plan

from .batching_server import BatchingServer

PLAN = Plan(completions=2000, targets=80, batch=4, cold=0.0, vocab_size=5000)


def measure(server: BatchingServer) -> Any:
    with server.listen() as url:
        load = {"processes": 1, "in_flight": 16, "limit_s": 60}
        return serving_receipts.measure_receipts(url, "fake", PLAN, receipts=50, tokens=8, load=load)


def promising(**faults: Any) -> BatchingServer:
    return BatchingServer(fingerprints=("det-" + "0" * 32,), **faults)


def test_receipts_are_replayed_beside_completions() -> None:
    found = measure(promising())
    assert (found["receipts"], found["verdicts"], found["exit_status"]) == (50, {"identical": 50}, 0)
    assert found["completions_meanwhile"] > 0
    assert found["of_these_differing"] == 0


def test_an_answer_that_differs_is_told() -> None:
    server = promising()
    # From the first of the completions on, which come after the receipts.
    server.swap_token_of = lambda _: server.batches > 0
    found = measure(server)
    assert found["exit_status"] == 1
    assert found["verdicts"] == {"diverged": 50}
    assert found["of_these_differing"] == 0
    assert "diverged at token 4" in found["messages"][0]


def test_a_server_that_promises_nothing_is_told() -> None:
    found = measure(BatchingServer(fingerprints=("vllm-0",)))
    assert found["receipts"] == 0
    assert "not one of --enable-deterministic" in found["error"]
