"""The command ``vllm-deterministic coverage``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

# The child's standard output is the table alone.
_QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CONFIGURE_LOGGING": "1"}
# What it does not know is for vLLM's own parser.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def coverage_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or name of a model; its weights are not read.")],
) -> None:
    """Show what covers each part of a model under `vllm serve MODEL --enable-deterministic`, without a server.

    Takes the options of `vllm serve` after MODEL; `--deterministic-coverage-file FILE` writes JSON. Exit status: 0
    every part is covered, 1 some are not, 2 could not be found out.
    """
    if importlib.util.find_spec("vllm") is None:
        typer.echo("Error: coverage needs vllm: pip install 'vllm-deterministic[cpu]' (or [cuda])", err=True)
        raise typer.Exit(2)
    if model.startswith(("/", ".")) and not Path(model).is_dir():
        typer.echo(f"Error: {model} is no folder", err=True)
        raise typer.Exit(2)
    # A process of its own: this half of the package does not import vllm.
    module = [sys.executable, "-m", "vllm_deterministic.engine.show_coverage", "--model", model, *context.args]
    raise typer.Exit(subprocess.run(module, env={**os.environ, **_QUIET}, check=False).returncode)
