"""Find out what the server is and which fields it takes, before the first request that counts."""

from dataclasses import dataclass, replace
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from vllm_deterministic.verify.client import CannotRun, Client, Rejected, Unreachable
from vllm_deterministic.verify.completion import Completion, load_json
from vllm_deterministic.verify.metrics import read_block_size, read_counters
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Site, request_body, target


@dataclass(frozen=True, slots=True)
class Server:
    """What a server told of itself. ``extensions`` says whether it takes vLLM's request fields."""

    model: str
    version: str | None
    max_model_len: int | None
    block_size: int | None
    has_metrics: bool
    extensions: bool
    tells_token_ids: bool
    alphabet: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def site(self) -> Site:
        """The part of it that arms build their requests from."""
        return Site(self.max_model_len, self.block_size, self.alphabet, self.extensions)


async def discover(client: Client, settings: Settings) -> Server:
    """Wait for the server as long as ``--ready-check-timeout-sec`` allows, then ask it what it is.

    Raises CannotRun where no verification is possible: nothing answers, the model is unknown, logprobs are missing.
    """
    models = await list_models(client, settings)
    model, max_model_len = _choose_model(models, settings)
    page = await client.get_text("/metrics") or ""
    server = Server(
        model=model,
        version=_version(await client.get_text("/version")),
        max_model_len=max_model_len,
        block_size=read_block_size(page),
        has_metrics=read_counters(page) is not None,
        extensions=True,
        tells_token_ids=True,
        alphabet=(),
        notes=(),
    )
    return await _probe(client, settings, server)


async def list_models(client: Client, settings: Settings) -> list[dict[str, Any]]:
    """The entries of ``/v1/models``, each with an ``id``, once the server answers.

    Raises CannotRun where it does not within ``--ready-check-timeout-sec``, or lists none.
    """
    wait = settings.ready_check_timeout_sec
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(Unreachable),
        stop=stop_after_delay(wait),
        wait=wait_fixed(min(1.0, wait / 4)),
        reraise=True,
    )
    payload: Any = await attempts(client.get_json, "/v1/models")
    models = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(models, list) or not all(isinstance(entry, dict) and "id" in entry for entry in models):
        raise CannotRun(
            f"{client.base_url}/v1/models lists no models. Check that --base-url names an OpenAI-compatible server."
        )
    if not models:
        raise CannotRun(f"{client.base_url}/v1/models lists no model. Load one on the server.")
    return models


def _choose_model(models: list[dict[str, Any]], settings: Settings) -> tuple[str, int | None]:
    names = [str(entry["id"]) for entry in models]
    if settings.model is not None and settings.model not in names:
        raise CannotRun(
            f"{settings.base_url} serves no model {settings.model!r}. Give --model one of: {', '.join(names)}."
        )
    entry = models[names.index(settings.model) if settings.model else 0]
    limit = entry.get("max_model_len")
    return str(entry["id"]), limit if isinstance(limit, int) and limit > 0 else None


def _version(text: str | None) -> str | None:
    try:
        version = load_json((text or "").encode())["version"]
    except (ValueError, TypeError, KeyError):
        return None
    return str(version)


async def _probe(client: Client, settings: Settings, server: Server) -> Server:
    """Send the target once, with vLLM's fields and, should the server refuse them, without."""
    notes = []
    try:
        answer = await _try(client, settings, server.model, extensions=True)
    except Rejected:
        answer = await _try(client, settings, server.model, extensions=False)
        server = replace(server, extensions=False)
        notes.append(
            "The server refuses vLLM's request fields: top-k and min-p were not tested, no cache was forced cold."
        )
    if settings.is_chat and "prefix" in settings.arms:
        await _check_completions(client, settings, server)
    choice = answer.choices[0]
    if settings.logprobs and not choice.logprobs:
        raise CannotRun(
            f"{client.base_url}{settings.endpoint} returned no logprobs for {server.model!r}. "
            "Turn them on at the server, or compare tokens alone with --logprobs 0."
        )
    if not settings.logprobs:
        notes.append("Logprobs were not compared (--logprobs 0).")
    if choice.token_ids is None:
        notes.append("The server tells no token ids: texts were compared in their place.")
    if len(choice.tokens) < min(4, settings.max_tokens):
        notes.append(f"The target's answer ends after {len(choice.tokens)} tokens, a weak test; --ignore-eos goes on.")
    # The first id is left out: it may be the one that marks the beginning of a text.
    alphabet = tuple(sorted(set((answer.prompt_token_ids or ())[1:])))
    usable = choice.token_ids is not None and len(alphabet) >= 2
    if "prefix" in settings.arms:
        if not usable:
            notes.append("prefix: prompts are words, not token ids, so their lengths are only near the boundaries.")
        if not server.has_metrics:
            notes.append("prefix: the server has no vLLM metrics, so cache hits could not be counted there.")
    return replace(
        server,
        tells_token_ids=choice.token_ids is not None,
        alphabet=alphabet if usable else (),
        notes=tuple(notes),
    )


async def _try(client: Client, settings: Settings, model: str, *, extensions: bool) -> Completion:
    body = request_body(target(settings), model, settings, chat=settings.is_chat, extensions=extensions)
    return await client.complete(settings.endpoint, body)


async def _check_completions(client: Client, settings: Settings, server: Server) -> None:
    body = request_body(target(settings), server.model, settings, chat=False, extensions=server.extensions)
    try:
        await client.complete(settings.completions_endpoint, body)
    except CannotRun as error:
        others = ",".join(arm for arm in settings.arms if arm != "prefix")
        hint = f"; leave it out with --arms {others}" if others else ""
        raise CannotRun(f"The arm 'prefix' needs {settings.completions_endpoint}{hint}. {error}") from None
