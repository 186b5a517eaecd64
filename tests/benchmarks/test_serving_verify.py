"""Runs of verify that go on at once are told as one."""

from typing import Any

import pytest

pytest.importorskip("psutil", reason="comes with vLLM")

import serving_verify
from load_processes import Control, Load, Task

from ..verify.fake_server import FakeServer


def tasks_for(url: str) -> list[Task]:
    common = serving_verify.common_settings(url, tokens=8, concurrency=32, kv_split=64, chunk_budget=128)
    crowds = serving_verify.crowd_tasks(common, requests=48, runs=2)
    return crowds + serving_verify.sequence_tasks(common, requests=48)


def run(server: FakeServer) -> Any:
    with server.listen() as url:
        tasks = tasks_for(url)
        with Load("verify", tasks, serving_verify.planned(tasks), limit_s=60) as load:
            found = serving_verify.summarize(load.results())
            assert load.control.answered == sum(arm["answered"] for arm in found["arms"].values())
    return found


def test_one_answer_for_each_target() -> None:
    found = run(FakeServer())
    assert {name: arm["answered"] - arm["planned"] for name, arm in found["arms"].items()} == dict.fromkeys(
        ("identical", "sampled", "mixed", "prefix"), 0
    )
    assert (found["arms"]["identical"]["compared"], found["arms"]["mixed"]["compared"]) == (48, 48)
    assert (found["arms"]["identical"]["targets"], found["arms"]["mixed"]["targets"]) == (1, 2)
    assert (found["all"]["unique_outputs"], found["all"]["unique_logprob_records"]) == (1, 1)
    assert (found["all"]["differing"], found["errors"], dict(found["runs"])) == (0, [], {"identical": 7})
    # The target of identical is one of those of mixed.
    assert found["all"]["targets"] == sum(arm["targets"] for arm in found["arms"].values()) - 1


def test_a_server_that_varies_under_load_is_counted() -> None:
    found = run(FakeServer(vary_logprob_beyond=6))
    assert found["all"]["unique_outputs"] == 1
    assert found["all"]["unique_logprob_records"] > 1
    assert found["all"]["differing"] > 0
    assert any(arm["failures"] for arm in found["arms"].values())


def test_what_a_limit_cut_is_told() -> None:
    with FakeServer(latency_s=0.1).listen() as url:
        function, (settings,) = tasks_for(url)[-1]
        found = serving_verify.summarize([function(Control(1.5), settings)])
    assert found["runs"] == {"interrupted": 1}
    assert "Stopped before the end" in found["errors"][0]
    assert 0 < found["arms"]["prefix"]["answered"] < found["arms"]["prefix"]["planned"]


def test_unique_counts_over_runs() -> None:
    first = {"t": {"a": {"output": "x", "count": 5, "position": None}}}
    second = {
        "t": {"b": {"output": "x", "count": 2, "position": None}, "c": {"output": "y", "count": 1, "position": 7}},
        "u": {"d": {"output": "z", "count": 1, "position": None}},
    }
    assert serving_verify.unique([first, second]) == {
        "targets": 2,
        "unique_outputs": 2,
        "unique_logprob_records": 3,
        "targets_differing": 1,
        "differing": 3,
        "first_token": 7,
    }
