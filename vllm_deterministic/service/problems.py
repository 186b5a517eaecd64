"""Errors as RFC 9457 has them: ``application/problem+json``, naming the field that is wrong."""

import sqlite3
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm_deterministic.service.limits import BeyondLimits
from vllm_deterministic.service.runs import QueueFull
from vllm_deterministic.service.schema import FieldError, Problem

MEDIA_TYPE = "application/problem+json"
_MEANINGS = {
    400: "The request cannot be read.",
    401: "The bearer token is missing or wrong.",
    404: "There is no such verification, or it has none of this.",
    409: "The verification has ended already.",
    413: "The body is too large.",
    422: "A field is wrong; `errors` names it.",
    429: "As many verifications wait as may; `Retry-After` says when to come back.",
    503: "The history cannot be written.",
}


def problem(
    status: int, detail: str, errors: list[FieldError] | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer for an error."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or [])
    return Response(body.model_dump_json(), status, dict(headers or {}), MEDIA_TYPE)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its OpenAPI description."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def handle_problems(app: FastAPI) -> None:
    """Answer every error of the application with a problem body."""

    @app.exception_handler(RequestValidationError)
    async def _wrong_field(request: Request, error: RequestValidationError) -> Response:
        errors = [FieldError(field=_field(one["loc"]), message=_message(one)) for one in error.errors()]
        return problem(422, "; ".join(f"{one.field}: {one.message}" for one in errors[:3]), errors)

    @app.exception_handler(BeyondLimits)
    async def _beyond_limits(request: Request, error: BeyondLimits) -> Response:
        return problem(422, f"{error.field}: {error}", [FieldError(field=error.field, message=str(error))])

    @app.exception_handler(QueueFull)
    async def _queue_full(request: Request, error: QueueFull) -> Response:
        return problem(429, f"Not now: {error}.", headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(sqlite3.Error)
    async def _no_history(request: Request, error: sqlite3.Error) -> Response:
        return problem(503, f"The history cannot be used: {error}.", headers={"Retry-After": "10"})

    @app.exception_handler(HTTPException)
    async def _refused(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> Response:
        return problem(500, "The service failed; its log says how.")


def _field(place: tuple[int | str, ...]) -> str:
    """``("body", "arms", 0)`` is ``arms.0``; of the body as a whole, ``body``."""
    inner = [str(part) for part in place[1:]]
    return ".".join(inner) if inner and not inner[0].isdigit() else str(place[0])


def _message(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    reason = (error.get("ctx") or {}).get("error") if error["type"] == "json_invalid" else None
    return f"{message}: {reason}" if reason else message
