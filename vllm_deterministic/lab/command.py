"""The command ``vllm-deterministic lab``."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from vllm_deterministic.verify.settings import OutputSpec

from . import floats
from .outputs import KINDS, write_outputs
from .record import ReductionStudy

if TYPE_CHECKING:
    import torch

    from .record import Progress
    from .view import Record

_STUDIES = (*get_args(ReductionStudy), "float")
_DEVICES = ("auto", "cpu", "cuda", "mps")
_HEAD = 64


def lab_command(
    study: Annotated[str, typer.Argument(help=f"What to study: {', '.join(_STUDIES)}.")],
    device: Annotated[str, typer.Option(help=f"Of {', '.join(_DEVICES)}; auto is a GPU where there is one.")] = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Batches that the row is put into.")] = "1,2,4,8,16,32",
    hidden: Annotated[
        str, typer.Option(help="Widths: of the row, of the sum in a matrix product, of all heads. Multiples of 64.")
    ] = "512,1024,4096",
    repeats: Annotated[int, typer.Option(help="Timed runs at the largest batch size.")] = 100,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="kind=KIND,path=FILE",
            help="Reports to write: kind=console, kind=json, kind=html,path=FILE or kind=png,path=FILE; console and "
            "json go to standard output without a path. Repeatable.",
            show_default="kind=console",
        ),
    ] = None,
) -> None:
    """See why a row's bytes follow its batch, and what each cure costs on this machine.

    Every strategy adds up the same numbers in another order. One row is put into batches of all sizes, then repeated;
    its results are compared byte for byte. The study float has no device and no sizes.
    """
    if study not in _STUDIES:
        _fail(f"{study!r} is not a study; choose one of {', '.join(_STUDIES)}")
    if device not in _DEVICES:
        _fail(f"--device {device}: choose one of {', '.join(_DEVICES)}")
    try:
        outputs = [OutputSpec.parse(text, KINDS) for text in output or ["kind=console"]]
    except ValueError as error:
        _fail(f"--output: {error}")
    sizes, widths = _numbers("--batch-sizes", batch_sizes), _numbers("--hidden", hidden)
    if any(width % _HEAD for width in widths):
        _fail(f"--hidden {hidden}: multiples of {_HEAD} are needed")
    if repeats < 1:
        _fail(f"--repeats {repeats}: at least 1 is needed")
    try:
        if any(spec.kind == "png" for spec in outputs):
            from . import picture  # noqa: F401 (so that a missing matplotlib is told before the study, not after)
        run = _prepare(study, device, sizes, widths, repeats)
    except ModuleNotFoundError as error:
        _fail(f"lab needs {error.name}, which is not installed: pip install 'vllm-deterministic[lab]'")
    try:
        with _bar() as bar:
            task = bar.add_task(study, total=None)
            record = run(lambda done, total, what: bar.update(task, completed=done, total=total, description=what))
    except RuntimeError as error:
        if "memory" not in str(error):  # how torch says that there is too little of it, on each kind of device
            raise
        _fail(f"{study} needs more memory than there is: smaller --batch-sizes or --hidden")
    try:
        write_outputs(record, outputs)
    except OSError as error:
        _fail(f"--output: cannot write {error.filename}: {error.strerror}")


def _prepare(
    study: str, device: str, batch_sizes: tuple[int, ...], hidden: tuple[int, ...], repeats: int
) -> "Callable[[Progress], Record]":
    """The study, ready to run. torch comes with the extra "lab" alone, and the study float needs none."""
    if study == "float":
        return floats.run_floats
    from .study import Plan, run_study

    plan = Plan(_device(device), batch_sizes, hidden, repeats)
    return lambda progress: run_study(cast(ReductionStudy, study), plan, progress)


def _device(name: str) -> "torch.device":
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, here in present.items() if here)
    if not present[name]:
        _fail(f"--device {name}: this machine has none that torch can use")
    return torch.device(name)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read ``1,2,4``."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        _fail(f"{option} {text!r}: numbers from 1 up, separated by commas, are needed")
    return tuple(sorted({int(word) for word in words}))


def _bar() -> Bar:
    columns: list[Any] = [TextColumn("{task.description:>36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Bar(*columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty())


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
