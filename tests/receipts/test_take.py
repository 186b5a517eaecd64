"""Taking receipts, and the servers and requests that none can be taken of."""

import asyncio
from typing import Any

import pytest

from vllm_deterministic.receipts.take import take_receipts
from vllm_deterministic.verify.client import CannotRun
from vllm_deterministic.verify.settings import Settings

from .fake_server import CHAT, COMPLETION, PARTS, SETTINGS, ReceiptServer, take


@pytest.mark.parametrize("request_", [COMPLETION, CHAT])
def test_a_receipt_holds_what_was_sent_and_who_answered(request_: dict[str, Any]) -> None:
    server = ReceiptServer(parts=PARTS)
    receipt = take(server, request_)
    assert receipt.request == server.seen[0].body
    assert receipt.endpoint == server.seen[0].path
    assert receipt.request["model"] == "fake"
    assert (receipt.fingerprint.value, receipt.fingerprint.parts) == ("det-one", PARTS)
    assert receipt.prompt.tokens == (3 if request_ is COMPLETION else 4)
    assert receipt.answer.tokens == 9


def test_a_server_without_the_endpoint_tells_no_parts() -> None:
    assert take(ReceiptServer()).fingerprint.parts is None


def test_parts_of_another_fingerprint_are_not_taken() -> None:
    """Behind a load balancer, the replica that tells its parts need not be the one that answers."""
    server = ReceiptServer(fingerprints=("det-one", "det-two"), parts=PARTS)
    take(server)
    assert take(server).fingerprint.model_dump() == {"value": "det-two", "parts": None}


async def test_receipts_are_in_the_order_of_the_requests() -> None:
    server = ReceiptServer()
    requests = {f"requests.jsonl:{n}": {**COMPLETION, "seed": n} for n in range(40)}
    receipts = await take_receipts(SETTINGS, requests, transport=server.transport())
    assert [receipt.request["seed"] for receipt in receipts] == list(range(40))
    assert 2 <= server.most_in_flight <= SETTINGS.max_concurrency


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (ReceiptServer(fingerprints=("vllm-0.32.0-ab12",)), "'vllm-0.32.0-ab12', not one of --enable-deterministic"),
        (ReceiptServer(fingerprints=("not-deterministic-1",)), "--deterministic-allow-uncovered and has gaps"),
        (ReceiptServer(fingerprints=(None,)), "tells no system_fingerprint"),
        (ReceiptServer(token_ids=False), "a: the server told no token ids"),
        (ReceiptServer(logprobs=False), "a: the server told no logprobs"),
        (ReceiptServer(extensions=False), "a: http://fake/v1/completions answered 400: Unrecognized request argument."),
        (ReceiptServer(key="k"), "answered 401: Incorrect API key. Give the server's key with --api-key"),
        (ReceiptServer(status_after=(0, 500)), "answered 500: planted."),
        (ReceiptServer(answers_before_death=0), "broke the connection"),
    ],
)
async def test_a_server_that_no_receipt_can_be_taken_of(server: ReceiptServer, message: str) -> None:
    with pytest.raises(CannotRun) as raised:
        await take_receipts(SETTINGS, {"a": COMPLETION}, transport=server.transport())
    assert message in str(raised.value)
    assert not {"--extra-body", "--logprobs", "--endpoint"} & set(str(raised.value).split())


async def test_a_model_that_is_not_there_is_told_before_anything_is_sent() -> None:
    server = ReceiptServer()
    requests = {"a:1": COMPLETION, "a:2": {**COMPLETION, "model": "nope"}}
    with pytest.raises(CannotRun, match=r"a:2: http://fake serves no model 'nope'; .* one of: fake, other"):
        await take_receipts(SETTINGS, requests, transport=server.transport())
    assert server.seen == []


async def test_the_option_takes_the_place_of_the_requests_model() -> None:
    settings = Settings(base_url="http://fake", model="other")
    server = ReceiptServer()
    (receipt,) = await take_receipts(settings, {"a": {**COMPLETION, "model": "nope"}}, transport=server.transport())
    assert receipt.request["model"] == "other"


async def test_it_stops_when_told_to() -> None:
    stop = asyncio.Event()
    server = ReceiptServer(hang_after=3)
    requests = {str(n): {**COMPLETION, "seed": n} for n in range(9)}
    asyncio.get_running_loop().call_later(0.3, stop.set)
    with pytest.raises(CannotRun, match="Stopped after 3 of 9 answers; no receipt was written"):
        await take_receipts(SETTINGS, requests, stop=stop, transport=server.transport())


async def test_it_waits_for_a_server_that_starts() -> None:
    settings = Settings(base_url="http://fake", ready_check_timeout_sec=5)
    receipts = await take_receipts(settings, {"a": COMPLETION}, transport=ReceiptServer(starting_for=2).transport())
    assert len(receipts) == 1


async def test_a_chat_answer_without_a_limit_may_be_long() -> None:
    """An answer of 4096 tokens, which nothing in the request foretells, takes more than 8 MiB with 20 candidates."""
    chat = {"messages": [{"role": "user", "content": "go"}], "logprobs": True, "top_logprobs": 20}

    def lengthen(choice: dict[str, Any]) -> None:
        choice["token_ids"] *= 256
        entry = choice["logprobs"]["content"][0]
        tops = [{"token": f"token_id:{n}", "logprob": -n / 7, "bytes": list(range(100, 120))} for n in range(20)]
        choice["logprobs"]["content"] = [{**entry, "top_logprobs": tops}] * 4096

    (receipt,) = await take_receipts(SETTINGS, {"a": chat}, transport=ReceiptServer(edit=lengthen).transport())
    assert receipt.answer.tokens == 4096
