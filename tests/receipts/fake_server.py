"""The verifier's fake server as a deterministic one: with a fingerprint, its parts, and edits of what it answers."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_deterministic.receipts.receipt import Receipt
from vllm_deterministic.receipts.replay import Replay, replay_receipts
from vllm_deterministic.receipts.take import take_receipts
from vllm_deterministic.receipts.verdict import Verdict
from vllm_deterministic.verify.settings import Settings

from ..verify.fake_server import FakeServer, Incoming, Reply

PARTS = {"attention": {"kv_split": 256}, "versions": {"vllm": "0.32.0"}, "dtype": "float32"}
COMPLETION = {"prompt": "the river", "max_tokens": 9, "temperature": 0.0}
CHAT = {"messages": [{"role": "user", "content": "the river"}], "max_tokens": 9, "temperature": 0.0}
SETTINGS = Settings(base_url="http://fake", max_concurrency=8)

Edit = Callable[[dict[str, Any]], None]


@dataclass
class ReceiptServer(FakeServer):
    """``edit`` changes each choice before it is sent; ``template`` stands before every chat prompt."""

    fingerprints: tuple[str, ...] = ("det-one",)
    parts: dict[str, Any] | None = None
    edit: Edit = lambda choice: None
    template: tuple[int, ...] = field(default=(7,))

    async def handle(self, method: str, path: str, headers: dict[str, str], content: bytes) -> Reply:
        if path == "/plugins/deterministic/coverage" and self.parts is not None:
            return 200, {"fingerprint": {"value": self.fingerprints[0], "parts": self.parts}}
        return await super().handle(method, path, headers, content)

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        tokens = super()._tokenize(body)
        return [*self.template, *tokens] if "messages" in body else tokens

    def _choice(self, incoming: Incoming, prompt: list[int], index: int, chat: bool) -> dict[str, Any]:
        choice = super()._choice(incoming, prompt, index, chat)
        self.edit(choice)
        return choice


def swap(position: int, choice: int = 0) -> Edit:
    """Another token, and from there on other logprobs."""

    def edit(answered: dict[str, Any]) -> None:
        if answered["index"] == choice:
            answered["token_ids"][position] += 1
            answered["logprobs"]["tokens"][position] += "1"

    return edit


def nudge(position: int) -> Edit:
    """The last bit of a logprob."""

    def edit(answered: dict[str, Any]) -> None:
        logprobs = answered["logprobs"]["token_logprobs"]
        logprobs[position] = logprobs[position] * (1 - 2**-52)

    return edit


def take(server: ReceiptServer, request: dict[str, Any] = COMPLETION, *, token_ids: bool = False) -> Receipt:
    """The receipt of one request."""
    taking = take_receipts(SETTINGS, {"request.json": request}, token_ids=token_ids, transport=server.transport())
    return asyncio.run(taking)[0]


def replay_all(server: ReceiptServer, receipts: dict[str, Receipt], **given: Any) -> Replay:
    """Replay receipts with other settings than the usual."""
    settings = Settings.model_validate({"base_url": "http://fake", **given})
    return asyncio.run(replay_receipts(settings, receipts, transport=server.transport()))


def replay(server: ReceiptServer, receipt: Receipt, **given: Any) -> Verdict:
    """Replay one receipt."""
    replayed = replay_all(server, {"receipt.json": receipt}, **given)
    assert replayed.error is None
    (verdict,) = replayed.verdicts
    assert replayed.exit_code == verdict.exit_code
    return verdict
