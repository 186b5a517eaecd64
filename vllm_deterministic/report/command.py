"""The command ``vllm-deterministic report``."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from vllm_deterministic.report import json
from vllm_deterministic.report.pair import Pair, names_of
from vllm_deterministic.report.write import PAIR_KINDS, write_pair, write_reports
from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.settings import OUTPUT_KINDS, OutputSpec


def report_command(
    record: Annotated[
        Path, typer.Argument(help="A run record, as verify writes it with --output kind=json,path=FILE.")
    ],
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"A second run record, to be shown beside the first: {', '.join(PAIR_KINDS)}. "
            "Ratios are of the second to the first.",
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="kind=KIND,path=FILE",
            help="Reports to write, as for verify. Repeatable.",
            show_default="kind=console",
        ),
    ] = None,
) -> None:
    """Make reports from a run record, or from two of them side by side."""
    kinds = OUTPUT_KINDS if compare is None else PAIR_KINDS
    try:
        outputs = [OutputSpec.parse(text, kinds) for text in output or ["kind=console"]]
    except ValueError as error:
        _fail(f"--output: {error}")
    run = _load(record)
    try:
        if compare is None:
            write_reports(run, outputs)
        else:
            write_pair(Pair(run, _load(compare), names_of(record, compare)), outputs)
    except OSError as error:
        _fail(f"--output: cannot write {error.filename}: {error.strerror}")


def _load(path: Path) -> RunRecord:
    try:
        return json.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        _fail(f"cannot read {path}: {error.strerror}")
    except (ValidationError, UnicodeDecodeError):
        _fail(f"{path} is no run record of schema version 1; make one with verify --output kind=json,path=FILE")


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
