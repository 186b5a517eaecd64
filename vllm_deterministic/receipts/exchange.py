"""What taking and replaying have in common: find the model, send many requests at once, stop when told to."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

from vllm_deterministic.verify.client import CannotRun, Client
from vllm_deterministic.verify.progress import Progress
from vllm_deterministic.verify.server import list_models
from vllm_deterministic.verify.settings import Settings

T = TypeVar("T")

HINTS = {
    400: "Correct the request, or send it to a server whose limits it fits.",
    404: "Check --base-url and the model.",
    429: "The server limits the load: lower --max-concurrency.",
}


class Models:
    """The names of the models that a server has."""

    def __init__(self, names: list[str], settings: Settings) -> None:
        self._names = names
        self._settings = settings

    @classmethod
    async def ask(cls, client: Client, settings: Settings) -> "Models":
        """Wait for the server as verify does. Raises CannotRun."""
        return cls([str(entry["id"]) for entry in await list_models(client, settings)], settings)

    def choose(self, wanted: Any) -> str:
        """``--model``, or the wanted one, or the first. Raises ValueError where the server does not have it."""
        name = self._settings.model or wanted or self._names[0]
        if name not in self._names:
            others = ", ".join(self._names)
            raise ValueError(
                f"{self._settings.base_url} serves no model {name!r}; --model sends it to one of: {others}"
            )
        return str(name)


async def for_each(
    items: Collection[T], act: Callable[[T], Awaitable[None]], *, concurrency: int, progress: Progress
) -> None:
    """Act on every item, so many at a time. Raises the first CannotRun and acts on no more."""
    queue = iter(items)

    async def work() -> None:
        for item in queue:
            await act(item)
            progress.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(work())
    except ExceptionGroup as errors:
        expected = errors.subgroup(CannotRun)
        if expected is None:
            raise
        raise expected.exceptions[0] from None


async def until_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event | None) -> bool:
    """Do the work, or cancel it once ``stop`` is set. Returns whether it was done; raises what it raises."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
