"""The command ``vllm-deterministic report``."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from vllm_deterministic.report import json
from vllm_deterministic.report.write import write_reports
from vllm_deterministic.verify.settings import OutputSpec


def report_command(
    record: Annotated[
        Path, typer.Argument(help="A run record, as verify writes it with --output kind=json,path=FILE.")
    ],
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="kind=KIND,path=FILE",
            help="Reports to write, as for verify. Repeatable.",
            show_default="kind=console",
        ),
    ] = None,
) -> None:
    """Make reports from a run record."""
    try:
        run = json.load(record.read_text(encoding="utf-8"))
    except OSError as error:
        _fail(f"cannot read {record}: {error.strerror}")
    except (ValidationError, UnicodeDecodeError):
        _fail(f"{record} is no run record of schema version 1; make one with verify --output kind=json,path=FILE")
    try:
        write_reports(run, [OutputSpec.parse(text) for text in output or ["kind=console"]])
    except ValueError as error:
        _fail(f"--output: {error}")
    except OSError as error:
        _fail(f"--output: cannot write {error.filename}: {error.strerror}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
