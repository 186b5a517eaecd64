"""The entry point ``vllm.endpoint_plugins``: what covers the running engine, over HTTP."""

import argparse
from typing import Any, ClassVar

from fastapi import FastAPI, HTTPException, Request

PATH = "/plugins/deterministic/coverage"


class CoverageEndpoint:
    """Adds ``GET /plugins/deterministic/coverage``; vLLM loads it where ``VLLM_PLUGINS`` names it."""

    name: ClassVar[str] = "deterministic"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.get(PATH)(coverage)

    async def init_state(self, engine_client: Any, state: Any, args: argparse.Namespace) -> None:
        """Nothing to do: the coverage is in the state already, put there before the fingerprint was set."""


def coverage(request: Request) -> dict[str, Any]:
    """The coverage of the engine, as ``docs/coverage.md`` describes it; 404 where it is not deterministic."""
    found: dict[str, Any] | None = getattr(request.app.state, "deterministic_coverage", None)
    if found is None:
        raise HTTPException(404, "this server was started without --enable-deterministic")
    return found
