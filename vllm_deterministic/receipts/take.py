"""Take receipts: send requests to a deterministic server and keep the hashes of what it answers."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from vllm_deterministic.receipts.answer import answer_of
from vllm_deterministic.receipts.exchange import HINTS, Models, for_each, until_stopped
from vllm_deterministic.receipts.fingerprint import told_parts, why_no_promise
from vllm_deterministic.receipts.receipt import Fingerprint, Prompt, Receipt
from vllm_deterministic.receipts.request import endpoint_of, to_send
from vllm_deterministic.verify.client import CannotRun, Client, Rejected
from vllm_deterministic.verify.progress import Progress, SilentProgress
from vllm_deterministic.verify.settings import Settings


async def take_receipts(
    settings: Settings,
    requests: Mapping[str, Mapping[str, Any]],
    *,
    token_ids: bool = False,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[Receipt]:
    """Send requests, and return their receipts in the same order.

    Args:
        settings: address, key, time-outs and concurrency; ``model`` takes the place of that of every request.
        requests: bodies that `read_request` accepted, by a name for messages.
        token_ids: whether receipts hold the token ids.
        stop: ends it early once set.
        transport: replaces the network, for tests.

    Raises:
        CannotRun: one of them got no answer that a receipt can be taken of, or ``stop`` was set.
    """
    progress = progress or SilentProgress()
    receipts: dict[str, Receipt] = {}

    async def work() -> None:
        async with Client(settings, transport, HINTS) as client:
            models = await Models.ask(client, settings)
            bodies = {name: _body(name, request, models) for name, request in requests.items()}
            parts = await told_parts(client)

            async def take(name: str) -> None:
                receipts[name] = await _take(client, name, bodies[name], parts, token_ids)

            progress.start("receipts", len(bodies))
            await for_each(bodies, take, concurrency=settings.max_concurrency, progress=progress)

    try:
        done = await until_stopped(work(), stop)
    finally:
        progress.finish()
    if not done:
        raise CannotRun(f"Stopped after {len(receipts)} of {len(requests)} answers; no receipt was written.")
    return [receipts[name] for name in requests]


def _body(name: str, request: Mapping[str, Any], models: Models) -> dict[str, Any]:
    try:
        return to_send(request, models.choose(request.get("model")))
    except ValueError as error:
        raise CannotRun(f"{name}: {error}") from None


async def _take(
    client: Client, name: str, body: dict[str, Any], parts: Mapping[str, dict[str, Any]], token_ids: bool
) -> Receipt:
    try:
        completion = await client.complete(endpoint_of(body), body)
        answer, prompt = answer_of(completion, token_ids=token_ids), Prompt.of(completion.prompt_token_ids)
    except (Rejected, ValueError) as error:
        raise CannotRun(f"{name}: {error}") from None
    value = completion.system_fingerprint
    lacking = why_no_promise(value)
    if value is None or lacking is not None:
        raise CannotRun(f"{client.base_url} {lacking}. There is nothing that a receipt could hold it to.")
    return Receipt(
        endpoint=endpoint_of(body),
        request=body,
        prompt=prompt,
        fingerprint=Fingerprint(value=value, parts=parts.get(value)),
        answer=answer,
    )
