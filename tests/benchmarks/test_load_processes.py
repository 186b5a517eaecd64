"""Processes that send load tell what they cost, and their end."""

import os
import time
from typing import Any

import pytest

pytest.importorskip("psutil", reason="comes with vLLM")

from load_processes import Control, Load, ServerShares, cpu_shares


def work(control: Control, seconds: float) -> dict[str, Any]:
    end = time.process_time() + seconds
    while time.process_time() < end and not control.stopped:
        pass
    control.add(3)
    return {"done": True}


def idle(control: Control) -> dict[str, Any]:
    while not control.stopped:
        time.sleep(0.01)
    return {}


def spin(control: Control) -> dict[str, Any]:
    while not control.stopped:
        pass
    return {}


def die(control: Control) -> dict[str, Any]:
    os._exit(7)


def test_cpu_time_and_answers_are_told() -> None:
    with Load("load", [(work, (0.5,)), (idle, ())], 6, 60) as load:
        while not load.control.answered:
            time.sleep(0.05)
        assert load.running
        load.control.stop()
        results = load.results()
    assert results[0]["done"]
    assert results[0]["cpu_s"] == pytest.approx(0.5, abs=0.2)
    assert results[1]["cpu_s"] < 0.3
    shares = cpu_shares(results)
    assert shares["processes"] == 2
    assert shares["busiest"] == results[0]["cpu_s"] / results[0]["seconds"]
    assert load.progress().startswith("load: 3 of 6, ")
    assert not load.running


def test_a_process_that_ends_is_told_and_the_others_go_on() -> None:
    with Load("load", [(die, ()), (work, (0.1,))], 3, 60) as load:
        results = load.results()
    assert results[0] == {"error": "a process that sent load ended with status 7"}
    assert results[1]["done"]


def test_a_limit_stops() -> None:
    with Load("load", [(idle, ())], 0, 0.0) as load:
        assert "error" not in load.results()[0]


def test_shares_of_a_server_are_those_of_its_processes() -> None:
    with Load("load", [(spin, ()), (idle, ())], 0, 60):
        shares = ServerShares(os.getpid())
        time.sleep(2.0)
        busy = shares.shares()
    assert 0.05 < max(busy.values()) <= 1.1
