"""Replay receipts: send their requests again, to any server, and hold the answers against them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from vllm_deterministic.receipts.answer import answer_of
from vllm_deterministic.receipts.exchange import HINTS, Models, for_each, until_stopped
from vllm_deterministic.receipts.fingerprint import told_parts
from vllm_deterministic.receipts.receipt import Prompt, Receipt
from vllm_deterministic.receipts.request import to_send
from vllm_deterministic.receipts.verdict import Verdict, judge
from vllm_deterministic.verify.client import CannotRun, Client, Rejected
from vllm_deterministic.verify.progress import Progress, SilentProgress
from vllm_deterministic.verify.settings import Settings


@dataclass(frozen=True, slots=True)
class Replay:
    """The verdicts in the order of the receipts; ``error`` says why some are missing, None where none is."""

    verdicts: tuple[Verdict, ...]
    error: str | None

    @property
    def exit_code(self) -> int:
        """The worst of the verdicts', 2 where some are missing."""
        return 2 if self.error else max((verdict.exit_code for verdict in self.verdicts), default=0)


async def replay_receipts(
    settings: Settings,
    receipts: Mapping[str, Receipt],
    *,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Replay:
    """Send the requests of receipts again and compare.

    A server that fails is no exception: the verdicts until then are returned, and so they are when ``stop`` is set.

    Args:
        settings: address, key, time-outs and concurrency; ``model`` takes the place of that of every receipt.
        receipts: by name.
        stop: ends it early once set.
        transport: replaces the network, for tests.
    """
    progress = progress or SilentProgress()
    verdicts: dict[str, Verdict] = {}

    async def work() -> None:
        async with Client(settings, transport, HINTS) as client:
            models = await Models.ask(client, settings)
            parts = await told_parts(client)

            async def replay(name: str) -> None:
                verdicts[name] = await _replay(client, name, receipts[name], models, parts)

            progress.start("replay", len(receipts))
            await for_each(receipts, replay, concurrency=settings.max_concurrency, progress=progress)

    error = None
    try:
        if not await until_stopped(work(), stop):
            error = "Stopped before the end."
    except CannotRun as failure:
        error = str(failure)
    finally:
        progress.finish()
    if error is not None:
        error = f"{error} {len(verdicts)} of {len(receipts)} receipts were replayed."
    return Replay(tuple(verdicts[name] for name in receipts if name in verdicts), error)


async def _replay(
    client: Client, name: str, receipt: Receipt, models: Models, parts: Mapping[str, dict[str, Any]]
) -> Verdict:
    try:
        body = to_send(receipt.request, models.choose(receipt.request.get("model")))
        completion = await client.complete(receipt.endpoint, body)
        answer, prompt = answer_of(completion, token_ids=True), Prompt.of(completion.prompt_token_ids)
    except (Rejected, ValueError) as error:
        return Verdict(receipt=name, status="not_replayed", message=f"not replayed: {error}")
    value = completion.system_fingerprint
    return judge(name, receipt, answer, prompt, value, parts.get(value or ""))
