"""Receipts of a real server: taken of requests alone, replayed under load, and refused once they were changed."""

import asyncio
from typing import Any

import pytest

from vllm_deterministic.local_server import LocalServer
from vllm_deterministic.receipts.receipt import Receipt, parse, to_line
from vllm_deterministic.receipts.replay import replay_receipts
from vllm_deterministic.receipts.take import take_receipts
from vllm_deterministic.verify.settings import Settings

from .conftest import Catalogue

# A receipt holds nothing of the prompt.
LEFT_OUT = ("prompt logprobs",)


@pytest.fixture(scope="module")
def receipts(server: LocalServer, catalogue: Catalogue) -> dict[str, Receipt]:
    """Of each request of the catalogue, asked one after the other."""
    requests: dict[str, dict[str, Any]] = {
        name: body for name, (_, body) in catalogue.requests.items() if name not in LEFT_OUT
    }
    settings = Settings(base_url=server.base_url, max_concurrency=1)
    taken = asyncio.run(take_receipts(settings, requests, token_ids=True))
    return dict(zip(requests, taken, strict=True))


def test_replayed_under_load_all_are_identical(
    server: LocalServer, catalogue: Catalogue, receipts: dict[str, Receipt]
) -> None:
    async def run() -> list[str]:
        settings = Settings(base_url=server.base_url, max_concurrency=24)
        thrice = {f"{name}, {n}": receipt for n in range(3) for name, receipt in receipts.items()}
        load = asyncio.to_thread(catalogue.crowded, server)
        replayed, _ = await asyncio.gather(replay_receipts(settings, thrice), load)
        assert replayed.error is None
        assert len(replayed.verdicts) == len(thrice)
        return [f"{verdict.receipt}: {verdict.message}" for verdict in replayed.verdicts if verdict.exit_code]

    assert asyncio.run(run()) == []


def test_a_receipt_holds_the_answer(receipts: dict[str, Receipt]) -> None:
    assert len({receipt.answer.output_digest for receipt in receipts.values()}) == len(receipts)
    for receipt in receipts.values():
        for choice in receipt.answer.choices:
            assert choice.token_ids is not None
            assert len(choice.token_ids) * 4 == len(choice.token_marks) == len(choice.logprob_marks)
        assert receipt.fingerprint.value.startswith("det-")


def test_another_seed_is_another_answer(server: LocalServer, receipts: dict[str, Receipt]) -> None:
    """A receipt whose answer is not that of its request, as by a server that broke its promise."""
    receipt = receipts["seed"]
    changed = receipt.model_copy(update={"request": {**receipt.request, "seed": 12}})
    replayed = asyncio.run(replay_receipts(Settings(base_url=server.base_url), {"changed": changed}))
    (verdict,) = replayed.verdicts
    assert (verdict.status, verdict.exit_code) == ("diverged", 1)
    assert verdict.divergence is not None
    assert verdict.divergence.receipt_token != verdict.divergence.token


def test_an_edited_receipt_is_refused(receipts: dict[str, Receipt]) -> None:
    line = to_line(receipts["seed"])
    assert parse(line.encode()) == receipts["seed"]
    with pytest.raises(ValueError, match="changed or damaged"):
        parse(line.replace('"seed":11', '"seed":12').encode())
