"""The commands ``vllm-deterministic receipt`` and ``vllm-deterministic replay``."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from vllm_deterministic.certify.whole_file import write_whole
from vllm_deterministic.receipts.lines import Line, read_lines
from vllm_deterministic.receipts.receipt import Receipt, parse, to_line
from vllm_deterministic.receipts.replay import Replay, replay_receipts
from vllm_deterministic.receipts.request import read_request
from vllm_deterministic.receipts.take import take_receipts
from vllm_deterministic.receipts.verdict import Verdict
from vllm_deterministic.verify.client import CannotRun
from vllm_deterministic.verify.progress import Progress, SilentProgress, choose_progress
from vllm_deterministic.verify.settings import Settings, explain
from vllm_deterministic.verify.signals import stop_on_signals

_DEFAULT = Settings(base_url="http://127.0.0.1:8000")

BaseUrl = Annotated[
    str,
    typer.Option(help="Where the server listens, for example http://127.0.0.1:8000.", envvar="VLLM_DETERMINISTIC_URL"),
]
Model = Annotated[
    str | None, typer.Option(help="Model to ask.", show_default="the request's, or the first the server lists")
]
ApiKey = Annotated[
    str | None, typer.Option(help="Key of the server.", envvar=["VLLM_DETERMINISTIC_API_KEY", "OPENAI_API_KEY"])
]
MaxConcurrency = Annotated[int, typer.Option(help="Most requests at a time.")]
Timeout = Annotated[float, typer.Option(help="Seconds that one answer may take.")]
ReadyCheck = Annotated[float, typer.Option(help="Seconds to wait for the server to come up; 0 tries once.")]


def receipt_command(
    base_url: BaseUrl,
    request: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(
            help="Body of a request to /v1/completions or /v1/chat/completions; - is standard input.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(help="The same, many of them: one a line.", metavar="FILE", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write; a file that is there is left alone.", metavar="FILE", show_default="standard output"
        ),
    ] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Keep the token ids as well.")] = False,
    model: Model = None,
    api_key: ApiKey = None,
    max_concurrency: MaxConcurrency = _DEFAULT.max_concurrency,
    timeout: Timeout = _DEFAULT.timeout,
    ready_check_timeout_sec: ReadyCheck = _DEFAULT.ready_check_timeout_sec,
) -> None:
    """Send requests to a deterministic server and write a receipt of each answer, one JSON document a line.

    A receipt holds the request, the server's fingerprint, and hashes of token ids and logprobs. Exit status: 0 written,
    2 could not; then nothing was written.
    """
    settings = _settings(base_url, model, api_key, max_concurrency, timeout, ready_check_timeout_sec)
    if output is not None:
        _check_output(output)
    if request is not None and requests is None:
        lines = [Line(request.name, request.read())]
    elif requests is not None and request is None:
        lines = read_lines(requests)
    else:
        _fail("give either --request or --requests")
    if not lines:
        _fail("--requests: there is no request in it")
    bodies = {}
    for line in lines:
        try:
            bodies[line.name] = read_request(line.content)
        except ValueError as error:
            _fail(f"{line.name}: {error}")
    try:
        receipts = asyncio.run(_take(settings, bodies, token_ids, _progress(len(bodies))))
    except CannotRun as error:
        _fail(str(error))
    text = "".join(map(to_line, receipts))
    if output is None:
        _print(text)
        return
    try:
        write_whole(output, text, 0o644, replace=False)
    except OSError as error:
        _fail(f"--output: cannot write {output}: {error.strerror}")


def replay_command(
    receipts: Annotated[
        typer.FileBinaryRead, typer.Argument(help="Receipts, one a line; - is standard input.", metavar="FILE")
    ],
    base_url: BaseUrl,
    json: Annotated[bool, typer.Option("--json", help="Tell the verdicts as JSON, one document a line.")] = False,
    model: Model = None,
    api_key: ApiKey = None,
    max_concurrency: MaxConcurrency = _DEFAULT.max_concurrency,
    timeout: Timeout = _DEFAULT.timeout,
    ready_check_timeout_sec: ReadyCheck = _DEFAULT.ready_check_timeout_sec,
) -> None:
    """Send the requests of receipts again, to any replica under any load, and compare the answers byte for byte.

    Exit status, the worst of all: 0 identical, 1 diverged, 2 not comparable (the fingerprint differs, the receipt is
    damaged or of another model, the server failed).
    """
    settings = _settings(base_url, model, api_key, max_concurrency, timeout, ready_check_timeout_sec)
    lines = read_lines(receipts)
    if not lines:
        _fail(f"{receipts.name}: there is no receipt in it")
    intact: dict[str, Receipt] = {}
    damaged: dict[str, Verdict] = {}
    for line in lines:
        try:
            intact[line.name] = parse(line.content)
        except ValueError as error:
            damaged[line.name] = Verdict(receipt=line.name, status="not_replayed", message=f"not replayed: {error}")
    replay = Replay((), None)
    if intact:
        replay = asyncio.run(_replay(settings, intact, _progress(len(intact))))
    known = damaged | {verdict.receipt: verdict for verdict in replay.verdicts}
    verdicts = [known[line.name] for line in lines if line.name in known]
    told = [verdict.model_dump_json() if json else f"{verdict.receipt}: {verdict.message}" for verdict in verdicts]
    if len(verdicts) > 1 and not json:
        counts = Counter(verdict.status.replace("_", " ") for verdict in verdicts)
        told.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    _print("".join(f"{line}\n" for line in told))
    if replay.error is not None:
        _fail(replay.error)
    raise typer.Exit(max([replay.exit_code, *(verdict.exit_code for verdict in damaged.values())]))


async def _take(
    settings: Settings, bodies: Mapping[str, dict[str, Any]], token_ids: bool, progress: Progress
) -> list[Receipt]:
    return await take_receipts(settings, bodies, token_ids=token_ids, progress=progress, stop=stop_on_signals())


async def _replay(settings: Settings, receipts: Mapping[str, Receipt], progress: Progress) -> Replay:
    return await replay_receipts(settings, receipts, progress=progress, stop=stop_on_signals())


def _settings(
    base_url: str,
    model: str | None,
    api_key: str | None,
    max_concurrency: int,
    timeout: float,
    ready_check_timeout_sec: float,
) -> Settings:
    try:
        return Settings.model_validate(locals())
    except ValidationError as error:
        _fail(explain(error))


def _progress(count: int) -> Progress:
    return choose_progress() if count > 1 else SilentProgress()


def _check_output(path: Path) -> None:
    if os.path.lexists(path):
        _fail(f"--output: {path} is there already; nothing is written over")
    if not path.parent.is_dir():
        _fail(f"--output: the directory {path.parent} does not exist")


def _print(text: str) -> None:
    try:
        typer.echo(text, nl=False)
    except OSError as error:
        # What the buffer still holds would fail again at exit, with a status that means something else.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"cannot write to standard output: {error.strerror}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
