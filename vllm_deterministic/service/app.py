"""The FastAPI application around a `State`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from vllm_deterministic import __version__
from vllm_deterministic.service.problems import handle_problems
from vllm_deterministic.service.routes import router
from vllm_deterministic.service.schema import Problem
from vllm_deterministic.service.security import PUBLIC, Guard
from vllm_deterministic.service.state import State


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Add what FastAPI cannot know: the guard's token and the problem body."""
        if self.openapi_schema is None:
            described = super().openapi()
            parts = described["components"]
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            parts["schemas"] |= problem.pop("$defs") | {"Problem": problem}
            parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, methods in described["paths"].items():
                for operation in methods.values():
                    operation["security"] = [] if path in PUBLIC else [{"token": []}]
        return super().openapi()


def make_app(state: State) -> FastAPI:
    """The application. Its lifespan is that of the state."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with state.running():
            yield

    app = _Application(
        title="vllm-deterministic verification service",
        summary="Checks that model servers give the same bytes for the same request, under load.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its pages would come from another host
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = state
    app.include_router(router)
    app.add_middleware(Guard, settings=state.settings)
    handle_problems(app)
    return app
