"""The command ``vllm-deterministic certify``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_deterministic.verify.settings import OutputSpec

from .shapes import Shape, model_dtype, model_shapes, parse_shape

if TYPE_CHECKING:
    from .verdict import PlanVerdict

_DTYPES = ("bfloat16", "float16", "float32")


def certify_command(
    model: Annotated[
        Path | None, typer.Option(help="Directory with a model's config.json: all shapes of its linear layers.")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(metavar="N,K...", help="Shapes of weights [N, K].", show_default=False)
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that the model is cut into; with --model.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32.", show_default="the model's, or bfloat16")
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="kind=KIND,path=FILE",
            help="Reports to write: kind=console or kind=json,path=FILE; standard output without a path. Repeatable.",
            show_default="kind=console",
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep verdicts.")] = False,
) -> None:
    """Prove on this GPU that all tiles of the matrix product give the same bytes.

    Runs every tile that may be chosen for the given shapes on inputs made to cancel, at many numbers of rows, and
    compares the results byte for byte. Exit status: 0 all tiles are in their class, 1 some are not, 2 could not run.
    """
    try:
        names = model_shapes(model, tensor_parallel) if model else {}
        names |= {shape: names.get(shape, "") for shape in map(parse_shape, shapes or [])}
        dtype = dtype or (model_dtype(model) if model else "bfloat16")
        outputs = [OutputSpec.parse(text) for text in output or ["kind=console"]]
    except ValueError as error:
        _fail(str(error))
    if not names:
        _fail("give --model DIR, or --shapes N,K")
    if dtype not in _DTYPES:
        _fail(f"--dtype {dtype}: choose one of {', '.join(_DTYPES)}")
    if any(spec.kind not in ("console", "json") for spec in outputs):
        _fail("--output: kind=console and kind=json are all that certify writes")
    identity, verdicts = _certify(names, dtype, use_cache=not no_cache)
    _write(outputs, identity, verdicts, names)
    raise typer.Exit(0 if all(verdict.in_class for verdict in verdicts) else 1)


def _certify(names: dict[Shape, str], dtype: str, *, use_cache: bool) -> tuple[dict[str, str], "list[PlanVerdict]"]:
    try:
        # Imported here: torch and triton are no part of the base install.
        import torch

        from . import cache, machine, plans
    except ModuleNotFoundError as error:
        _fail(f"certify needs {error.name}, which is not installed: pip install 'vllm-deterministic[cuda]'")
    try:
        device = machine.cuda_device()
        identity = machine.identity(device)
        kept = cache.VerdictCache(identity) if use_cache else None
        with _bar() as bar:
            task = bar.add_task("certifying", total=None)

            def progress(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=what)

            certified = plans.certify(names, getattr(torch, dtype), device, every_m=True, cache=kept, progress=progress)
    except (ValueError, torch.OutOfMemoryError) as error:
        _fail(str(error))
    return identity, [verdict for _, verdict in certified]


def _bar() -> Progress:
    columns: list[Any] = [TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, console=Console(file=sys.stderr))


def _write(
    outputs: list[OutputSpec], identity: dict[str, str], verdicts: "list[PlanVerdict]", names: dict[Shape, str]
) -> None:
    from .report import render_console, render_json

    for spec in outputs:
        is_json = spec.kind == "json"
        text = render_json(identity, verdicts) if is_json else render_console(identity, verdicts, names)
        if spec.path is None:
            sys.stdout.write(text)
            continue
        try:
            spec.path.write_text(text, encoding="utf-8")
        except OSError as error:
            _fail(f"--output: cannot write {spec.path}: {error.strerror}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
