"""The endpoints. They read and write, and leave the thinking to what they call."""

import platform
import zlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from jinja2 import Environment, PackageLoader
from starlette.concurrency import run_in_threadpool

from vllm_deterministic import __version__
from vllm_deterministic.report import html, json
from vllm_deterministic.service.problems import described
from vllm_deterministic.service.schema import (
    Health,
    Ready,
    Status,
    TargetPage,
    Verification,
    VerificationPage,
    VerificationRequest,
    Version,
)
from vllm_deterministic.service.state import State

_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; font-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
_DASHBOARD = Environment(loader=PackageLoader("vllm_deterministic.service", package_path=""), autoescape=True)

router = APIRouter()


def _state(request: Request) -> State:
    state: State = request.app.state.service
    return state


async def _verification(request: Request, id: Annotated[str, Path(description="id of a verification")]) -> str:
    """The JSON of the verification in the path."""
    state = _state(request)
    live = state.runs.live(id)
    stored = live.model_dump_json() if live else await state.history.get(id)
    if stored is None:
        raise HTTPException(404, "There is no verification of this id.")
    return stored


async def _record(
    request: Request,
    stored: Annotated[str, Depends(_verification)],
    target: Annotated[str | None, Query(description="name of a target; default: the worst off")] = None,
) -> bytes:
    """The compressed run record of one target of the verification in the path."""
    verification = Verification.model_validate_json(stored)
    ranked = sorted(verification.results, key=lambda result: _RANK[result.status])
    name = target if target is not None else ranked[0].target if ranked else None
    record = await _state(request).history.record(verification.id, name) if name is not None else None
    if record is None:
        raise HTTPException(404, "This verification holds no run record" + (f" of {name!r}." if name else "."))
    return record


_RANK = {"diverged": 0, "error": 1, "interrupted": 2, "identical": 3}
_ThisState = Annotated[State, Depends(_state)]
_Stored = Annotated[str, Depends(_verification)]
_Record = Annotated[bytes, Depends(_record)]


@router.get("/", include_in_schema=False)
async def dashboard() -> HTMLResponse:
    """The page that shows it all."""
    return HTMLResponse(_DASHBOARD.get_template("dashboard.html.j2").render(), headers=_PAGE_HEADERS)


@router.get("/favicon.ico", include_in_schema=False)
async def favicon() -> Response:
    """Nothing: browsers ask for it beside pages whose icon is inside, such as a report."""
    return Response(status_code=204, headers={"Cache-Control": "max-age=86400"})


@router.get("/health", tags=["operation"])
async def health() -> Health:
    """Whether the process lives."""
    return Health()


@router.get(
    "/ready",
    tags=["operation"],
    response_model=Ready,
    responses={503: {"description": "A target does not answer.", "model": Ready}},
)
async def ready(state: _ThisState) -> Response:
    """Whether all targets answered when they were last asked, at most some seconds ago."""
    answer = Ready(
        status="ready" if state.probe.ready else "not ready",
        targets={target.name: target.ready for target in state.probe.states},
    )
    return _json(answer.model_dump_json(), 200 if state.probe.ready else 503)


@router.get(
    "/metrics",
    tags=["operation"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "For Prometheus."}},
)
async def metrics(state: _ThisState) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    return Response(state.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version", tags=["operation"], responses=described(401))
async def version() -> Version:
    """What runs here."""
    return Version(version=__version__, python=platform.python_version())


@router.get("/v1/targets", tags=["targets"], responses=described(401))
async def list_targets(state: _ThisState) -> TargetPage:
    """The targets, what they answer now, and the schedule."""
    return TargetPage(
        items=state.probe.states,
        every_s=state.settings.every.total_seconds() if state.settings.every else None,
        next_scheduled_at=state.schedule.next_at,
        scheduled_concurrency=state.settings.scheduled_concurrency,
    )


@router.post(
    "/v1/verifications",
    tags=["verifications"],
    status_code=202,
    response_model=Verification,
    responses={
        202: {
            "description": "Queued; `Location` is where it is.",
            "headers": {"Location": {"schema": {"type": "string"}}},
        },
        **described(400, 401, 413, 422, 429, 503),
    },
)
async def start_verification(asked: VerificationRequest, state: _ThisState) -> Response:
    """Queue a verification of the named targets, or of all."""
    verification = await state.runs.submit(asked, "request")
    return _json(verification.model_dump_json(), 202, {"Location": f"/v1/verifications/{verification.id}"})


@router.get(
    "/v1/verifications",
    tags=["verifications"],
    response_model=VerificationPage,
    responses=described(401, 422, 503),
)
async def list_verifications(
    state: _ThisState,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
    before: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="`next` of the page before")] = None,
    status: Annotated[Status | None, Query(description="only those of this status")] = None,
) -> Response:
    """Verifications, the newest first."""
    rows, after = await state.history.page(limit, before, status)
    live = {id: state.runs.live(id) for id, _ in rows}
    items = ",".join(found.model_dump_json() if (found := live[id]) else stored for id, stored in rows)
    return _json(f'{{"items":[{items}],"next":{after if after is not None else "null"}}}')


@router.get(
    "/v1/verifications/{id}",
    tags=["verifications"],
    response_model=Verification,
    responses=described(401, 404, 422, 503),
)
async def get_verification(stored: _Stored) -> Response:
    """One verification: its progress while it runs, its result once it has ended."""
    return _json(stored)


@router.delete(
    "/v1/verifications/{id}",
    tags=["verifications"],
    status_code=202,
    response_model=Verification,
    responses=described(401, 404, 409, 422, 503),
)
async def cancel_verification(stored: _Stored, state: _ThisState) -> Response:
    """Ask a verification to end early. What it found so far is kept."""
    live = state.runs.cancel(Verification.model_validate_json(stored).id)
    if live is None:
        raise HTTPException(409, "This verification has ended already.")
    return _json(live.model_dump_json(), 202)


@router.get(
    "/v1/verifications/{id}/events",
    tags=["verifications"],
    response_class=EventSourceResponse,
    responses=described(401, 404, 422, 503),
)
async def watch_verification(stored: _Stored, state: _ThisState) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: ``progress`` after every change, ``result`` at the end; each holds the verification."""
    last = Verification.model_validate_json(stored)
    async for now in state.runs.watch(last.id):
        last = now
        if not now.finished:
            yield ServerSentEvent(event="progress", raw_data=now.model_dump_json())
    if last.finished:
        yield ServerSentEvent(event="result", raw_data=last.model_dump_json())


@router.get(
    "/v1/verifications/{id}/report",
    tags=["verifications"],
    response_class=HTMLResponse,
    responses=described(401, 404, 422, 503),
)
async def get_report(record: _Record) -> HTMLResponse:
    """The run of one target as a page that needs nothing but itself."""
    return HTMLResponse(await run_in_threadpool(_render, record), headers=_PAGE_HEADERS)


@router.get(
    "/v1/verifications/{id}/record",
    tags=["verifications"],
    response_class=Response,
    responses={
        200: {
            "description": "The run record, as docs/run-record.md describes it.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **described(401, 404, 422, 503),
    },
)
async def get_record(record: _Record) -> Response:
    """The run record of one target."""
    return _json(await run_in_threadpool(zlib.decompress, record))


def _render(record: bytes) -> str:
    return html.render(json.load(zlib.decompress(record).decode()))


def _json(content: str | bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")
