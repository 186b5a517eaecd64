"""Verdicts on what a server answers to the request of a receipt."""

import asyncio
from typing import Any

import pytest

from vllm_deterministic.receipts.fingerprint import differing_parts
from vllm_deterministic.receipts.replay import replay_receipts
from vllm_deterministic.verify.settings import Settings

from .fake_server import CHAT, COMPLETION, PARTS, SETTINGS, ReceiptServer, nudge, replay, replay_all, swap, take


@pytest.mark.parametrize("request_", [COMPLETION, CHAT, {**COMPLETION, "temperature": 1.0, "seed": 4, "n": 3}])
def test_a_pure_server_is_identical(request_: dict[str, Any]) -> None:
    verdict = replay(ReceiptServer(), take(ReceiptServer(), request_))
    assert (verdict.status, verdict.exit_code, verdict.divergence) == ("identical", 0, None)
    tokens = "27 tokens and their logprobs in 3 choices" if "n" in request_ else "9 tokens and their logprobs"
    assert verdict.message == f"identical: {tokens}"


@pytest.mark.parametrize("position", [0, 4, 8])
@pytest.mark.parametrize("token_ids", [False, True])
def test_diverged_at_a_token(position: int, token_ids: bool) -> None:
    receipt = take(ReceiptServer(), token_ids=token_ids)
    verdict = replay(ReceiptServer(edit=swap(position)), receipt)
    assert (verdict.status, verdict.exit_code) == ("diverged", 1)
    assert verdict.message.startswith(f"diverged at token {position}" + (" (id " if token_ids else ""))
    assert verdict.divergence is not None
    assert verdict.divergence.position == verdict.divergence.logprob_position == position
    assert (verdict.divergence.receipt_token is not None) == token_ids


@pytest.mark.parametrize("position", [0, 4, 8])
def test_diverged_in_a_logprob_alone(position: int) -> None:
    verdict = replay(ReceiptServer(edit=nudge(position)), take(ReceiptServer()))
    assert (verdict.status, verdict.exit_code) == ("diverged", 1)
    assert verdict.message == f"diverged in the logprobs of token {position}; the tokens agree"


def test_logprobs_that_part_before_the_tokens_are_told() -> None:
    def edit(choice: dict[str, Any]) -> None:
        nudge(2)(choice)
        swap(6)(choice)

    verdict = replay(ReceiptServer(edit=edit), take(ReceiptServer()))
    assert verdict.message == "diverged at token 6, in logprobs from token 2 on"


def test_the_choice_is_told_where_there_are_several() -> None:
    verdict = replay(ReceiptServer(edit=swap(3, choice=1)), take(ReceiptServer(), {**COMPLETION, "n": 2}))
    assert verdict.message == "diverged at token 3 of choice 1"


def test_the_finish_reason_is_told() -> None:
    def edit(choice: dict[str, Any]) -> None:
        choice["finish_reason"] = "stop"

    verdict = replay(ReceiptServer(edit=edit), take(ReceiptServer()))
    assert verdict.message == "diverged in the finish reason: stop, not length; the tokens agree"


def test_fewer_choices_are_told() -> None:
    receipt = take(ReceiptServer(), {**COMPLETION, "n": 2})
    one = take(ReceiptServer(), COMPLETION)
    verdict = replay(ReceiptServer(), one.model_copy(update={"answer": receipt.answer}))
    assert verdict.message == "diverged in the number of choices: 1, not 2"


def test_a_fingerprint_that_differs_in_known_parts() -> None:
    other = {**PARTS, "attention": {"kv_split": 512}, "versions": {"vllm": "0.33.0", "torch": "x" * 40}}
    server = ReceiptServer(fingerprints=("det-two",), parts=other)
    verdict = replay(server, take(ReceiptServer(parts=PARTS)))
    assert (verdict.status, verdict.exit_code) == ("fingerprint_differs", 2)
    changes = "attention.kv_split (512, not 256), versions.torch, versions.vllm (0.33.0, not 0.32.0)"
    assert verdict.message.startswith(f"fingerprint differs in {changes}; the answer: identical: 9 tokens")
    assert verdict.fingerprint is not None
    assert verdict.fingerprint.parts is not None
    assert verdict.fingerprint.parts["attention.kv_split"] == (256, 512)


@pytest.mark.parametrize(("before", "now"), [(PARTS, None), (None, PARTS), (None, None)])
def test_a_fingerprint_whose_parts_one_side_does_not_know(before: Any, now: Any) -> None:
    server = ReceiptServer(fingerprints=("det-two",), parts=now, edit=swap(5))
    verdict = replay(server, take(ReceiptServer(parts=before)))
    assert (verdict.status, verdict.exit_code) == ("fingerprint_differs", 2)
    assert "fingerprint differs (det-two, not det-one); in which parts is told where" in verdict.message
    assert verdict.message.endswith("; the answer: diverged at token 5")
    assert verdict.fingerprint is not None
    assert verdict.fingerprint.parts is None


def test_the_parts_of_another_replica_are_not_those_of_the_answer() -> None:
    """Behind a load balancer, the replica that tells its parts need not be the one that answers."""
    server = ReceiptServer(fingerprints=("det-two", "det-three"), parts={**PARTS, "dtype": "bfloat16"})
    receipt = take(ReceiptServer(parts=PARTS))
    verdicts = replay_all(server, {"a": receipt, "b": receipt}, max_concurrency=1).verdicts
    told = [verdict.fingerprint.parts for verdict in verdicts if verdict.fingerprint is not None]
    assert told == [{"dtype": ("float32", "bfloat16")}, None]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the server tells no system_fingerprint"),
        ("vllm-0.32.0-ab12", "the server has the fingerprint 'vllm-0.32.0-ab12', not one of --enable-deterministic"),
        ("not-deterministic-1", "it was started with --deterministic-allow-uncovered"),
    ],
)
def test_a_server_without_the_promise(value: str | None, message: str) -> None:
    verdict = replay(ReceiptServer(fingerprints=(value,)), take(ReceiptServer()))
    assert (verdict.status, verdict.exit_code) == ("fingerprint_differs", 2)
    assert verdict.message.startswith("fingerprint differs from det-one: the server ")
    assert message in verdict.message


def test_another_chat_template_is_no_divergence_of_the_engine() -> None:
    verdict = replay(ReceiptServer(template=(7, 8)), take(ReceiptServer(), CHAT))
    assert (verdict.status, verdict.exit_code) == ("prompt_differs", 2)
    assert "the server made other tokens of it (5; the receipt has 4); compare the chat" in verdict.message


def test_a_receipt_of_another_model() -> None:
    receipt = take(ReceiptServer())
    foreign = receipt.model_copy(update={"request": {**receipt.request, "model": "theirs"}})
    verdict = replay(ReceiptServer(), foreign)
    assert (verdict.status, verdict.exit_code) == ("not_replayed", 2)
    assert "http://fake serves no model 'theirs'; --model sends it to one of: fake, other" in verdict.message
    assert replay(ReceiptServer(), foreign, model="other").status == "identical"


def test_a_request_that_the_server_refuses_leaves_the_others() -> None:
    server = ReceiptServer(refuse_neighbours=True)
    refused = take(ReceiptServer(), {**COMPLETION, "presence_penalty": 1.0})
    replayed = replay_all(server, {"a": take(ReceiptServer()), "b": refused, "c": take(ReceiptServer(), CHAT)})
    assert [verdict.status for verdict in replayed.verdicts] == ["identical", "not_replayed", "identical"]
    assert "answered 400: presence_penalty is not supported. Correct the request" in replayed.verdicts[1].message
    assert replayed.exit_code == 2


def test_the_exit_code_is_the_worst() -> None:
    receipts = {str(n): take(ReceiptServer(), {**COMPLETION, "seed": n}) for n in range(12)}
    assert replay_all(ReceiptServer(), receipts).exit_code == 0
    varying = ReceiptServer(swap_token_of=lambda incoming: incoming.body["seed"] == 7)
    replayed = replay_all(varying, receipts)
    assert [n for n, verdict in enumerate(replayed.verdicts) if verdict.status == "diverged"] == [7]
    assert replayed.exit_code == 1


def test_a_server_that_dies_keeps_the_verdicts_until_then() -> None:
    receipts = {str(n): take(ReceiptServer(), {**COMPLETION, "seed": n}) for n in range(12)}
    replayed = replay_all(ReceiptServer(answers_before_death=5), receipts, max_concurrency=1)
    assert replayed.error is not None
    assert "broke the connection" in replayed.error
    assert replayed.error.endswith("5 of 12 receipts were replayed.")
    assert [verdict.status for verdict in replayed.verdicts] == ["identical"] * 5
    assert replayed.exit_code == 2


async def test_it_stops_when_told_to() -> None:
    (receipt,) = [await asyncio.to_thread(take, ReceiptServer())]
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, stop.set)
    transport = ReceiptServer(hang_after=3).transport()
    replayed = await replay_receipts(SETTINGS, dict.fromkeys("abcdef", receipt), stop=stop, transport=transport)
    assert replayed.error == "Stopped before the end. 3 of 6 receipts were replayed."
    assert len(replayed.verdicts) == 3


async def test_it_waits_for_a_server_that_starts() -> None:
    receipt = await asyncio.to_thread(take, ReceiptServer())
    settings = Settings(base_url="http://fake", ready_check_timeout_sec=5)
    server = ReceiptServer(starting_for=2)
    assert (await replay_receipts(settings, {"a": receipt}, transport=server.transport())).exit_code == 0


def test_parts_are_compared_leaf_by_leaf() -> None:
    old = {"a": {"x": 1, "y": {}}, "b": [1, 2], "c": "same"}
    new = {"a": {"x": 1, "y": {"z": 2}}, "b": [2, 1], "c": "same"}
    assert differing_parts(old, new) == {"a.y": ({}, None), "a.y.z": (None, 2), "b": ([1, 2], [2, 1])}
    assert differing_parts(old, old) == {}
