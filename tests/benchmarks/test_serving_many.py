"""The benchmark of very many completions counts each answer once, and each that differs."""

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("psutil", reason="comes with vLLM")

import serving_many
from load_processes import Control, Load
from serving_many import Plan

from ..verify.fake_server import Incoming
from .batching_server import BatchingServer

PLAN = Plan(completions=240, targets=60, batch=4, cold=0.3, vocab_size=5000)


def run(server: BatchingServer, processes: int = 1, in_flight: int = 4) -> Any:
    with server.listen() as url:
        tasks = serving_many.many_tasks(url, "fake", PLAN, processes, in_flight)
        with Load("many", tasks, PLAN.completions, limit_s=60) as load:
            return serving_many.summarize(PLAN, load.results())


def run_here(server: BatchingServer, limit_s: float = 60) -> Any:
    """One request after the other, without a process."""
    with server.listen() as url:
        return serving_many.summarize(PLAN, [serving_many.send(Control(limit_s), url, "fake", PLAN, 0, 1, 1)])


def test_every_target_is_sent_equally_often() -> None:
    kinds = serving_many.kinds(PLAN)
    batches = serving_many.batches(PLAN, kinds)
    sent = Counter((batch.kind, prompt) for batch in batches for prompt in batch.prompts)
    assert len(sent) == PLAN.targets
    assert set(sent.values()) == {PLAN.completions // PLAN.targets}
    assert max(len(batch.prompts) for batch in batches) == PLAN.batch
    salts = [batch.salt for batch in batches if batch.salt]
    assert len(set(salts)) == len(salts)
    assert 0 < len(salts) < len(batches)


def test_targets_are_of_all_kinds() -> None:
    kinds = serving_many.kinds(Plan(1000, 500, 8, 0.0, 151936))
    lengths = [len(prompt) for kind in kinds for prompt in kind.prompts]
    assert (min(lengths), max(lengths) > 1500, max(lengths) <= 2000) == (1, True, True)
    assert {kind.body["logprobs"] for kind in kinds} == {None, 1, 5}
    assert {tuple(kind.body) for kind in kinds} == {(*s, "max_tokens", "logprobs") for s in serving_many.SAMPLINGS}
    assert len({kind.body["max_tokens"] for kind in kinds}) > 10


def test_nothing_differs_where_the_server_keeps_its_word() -> None:
    server = BatchingServer()
    found = run(server, processes=2, in_flight=32)
    assert (found["answered"], found["targets"], found["differing"], found["errors"]) == (240, 60, 0, [])
    assert server.most_in_flight > 1
    assert len(server.seen) == 240


@pytest.mark.parametrize("logprob_alone", [False, True])
def test_each_answer_that_differs_is_counted(logprob_alone: bool) -> None:
    class Faulty(BatchingServer):
        def _answer(self, incoming: Incoming, prompt: list[int]) -> Any:
            asked = {name: incoming.body.get(name) for name in ("temperature", "seed", "max_tokens", "logprobs")}
            times[str((prompt, asked))] += 1
            planted = times[str((prompt, asked))] == 3 and incoming.body.get("logprobs") and len(faults) < 3
            if planted:
                faults.append(incoming.number)
            self.swap_token_of = lambda _: bool(planted) and not logprob_alone
            self.vary_logprob_beyond = 0 if planted and logprob_alone else None
            return super()._answer(incoming, prompt)

    times: Counter[str] = Counter()
    faults: list[int] = []
    found = run_here(Faulty())
    assert len(faults) == 3
    assert (found["answered"], found["differing"], found["targets_differing"]) == (240, 3, 3)
    assert [example["answers"] for example in found["examples"]] == [4, 4, 4]


def test_a_server_that_dies_loses_no_answer() -> None:
    found = run_here(BatchingServer(answers_before_death=100))
    assert found["answered"] == 100
    assert found["differing"] == 0
    assert "broke the connection" in found["errors"][0]


def test_a_limit_is_told_as_what_it_left() -> None:
    found = run_here(BatchingServer(latency_s=0.02), limit_s=1.5)
    assert 0 < found["answered"] < found["planned"] == 240
    assert found["errors"] == []


def test_the_first_answer_is_the_first_of_all_processes() -> None:
    late = {"counts": {(0, 0): {"b": (5, 20.0), "a": (1, 21.0)}}}
    early = {"counts": {(0, 0): {"a": (2, 10.0)}}}
    found = serving_many.summarize(PLAN, [late, early])
    assert (found["answered"], found["differing"], found["targets_differing"]) == (8, 5, 1)
