"""The command ``vllm-deterministic demo``: the same load on vLLM with and without ``--enable-deterministic``."""

import asyncio
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_deterministic.local_server import LocalServer, ServerError
from vllm_deterministic.report.write import write_reports
from vllm_deterministic.tiny_model.command import write_or_exit
from vllm_deterministic.tiny_model.config import ModelConfig
from vllm_deterministic.verify.progress import choose_progress
from vllm_deterministic.verify.record import ArmRecord, RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import OutputKind, OutputSpec, Settings


@dataclass(frozen=True)
class Side:
    """One of the two servers that are compared."""

    key: str
    title: str
    args: tuple[str, ...]


SIDES = (
    Side("deterministic", "--enable-deterministic", ("--enable-deterministic",)),
    Side("default", "vLLM's default", ()),
)
# Compiling would add more than a minute to each start and shows nothing more.
_ARGS = ("--enforce-eager", "--served-model-name", "tiny")
_REPORTS: tuple[OutputKind, ...] = ("json", "html")


def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where model, logs and records go.")] = Path(".demo"),
    num_prompts: Annotated[int, typer.Option(min=2, help="Requests of the arm identical, on each server.")] = 1000,
    mixed_prompts: Annotated[int, typer.Option(min=2, help="Compared requests of the arm mixed, on each.")] = 100,
) -> None:
    """Serve the embedded model with and without --enable-deterministic, send both the same load, compare the answers.

    The last line of standard output is a JSON object of what was measured; all else goes to standard error.
    Exit status: 0 the deterministic server kept its promise, 1 it did not, 2 something could not run.
    """
    console = Console(stderr=True)
    model = directory / "model"
    console.print(f"Writing the model to {model}", markup=False)
    write_or_exit(model, ModelConfig())
    try:
        records = {side.key: _measure(side, model, num_prompts, mixed_prompts, console) for side in SIDES}
    except ServerError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted; the server is stopped.", err=True)
        raise typer.Exit(130) from None
    console.print(_table(records))
    for side in SIDES:
        console.print(f"{side.title}: {records[side.key].message}", markup=False)
    typer.echo(json.dumps({side.key: _summary(records[side.key]) for side in SIDES}))
    raise typer.Exit(records["deterministic"].exit_code)


def _measure(side: Side, model: Path, num_prompts: int, mixed_prompts: int, console: Console) -> RunRecord:
    """Start the server of one side, send it the load, stop it.

    Raises:
        ServerError: it did not start, or did not answer all requests.
    """
    log = model.with_name(f"{side.key}.log")
    console.print(f"\n{side.title}: starting vllm serve, log in {log}", markup=False)
    with ExitStack() as stack:
        with console.status("Starting") as status:
            server = LocalServer(
                model, [*_ARGS, *side.args], log=log, on_wait=lambda waited: status.update(f"Starting: {waited:.0f} s")
            )
            stack.enter_context(server)
        settings = Settings(
            base_url=server.base_url, arms=("identical", "mixed"), num_prompts=num_prompts, mixed_prompts=mixed_prompts
        )
        record = asyncio.run(verify(settings, choose_progress()))
        if record.status in ("error", "interrupted"):
            raise ServerError(f"{side.title}: {record.message} The end of {log}:\n{server.log_tail()}")
    write_reports(record, [OutputSpec(kind=kind, path=model.with_name(f"{side.key}.{kind}")) for kind in _REPORTS])
    return record


def _table(records: dict[str, RunRecord]) -> Table:
    """What was measured, side by side."""
    table = Table(title="The same load on the same machine", title_justify="left")
    table.add_column()
    for side in SIDES:
        table.add_column(side.title, justify="right")
    for arm, title in (("identical", "one request, many times"), ("mixed", "the same request among strangers")):
        arms = [records[side.key].arm(arm) for side in SIDES]
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", *[f"{a.compared}" for a in arms])
        table.add_row("  unique outputs", *[_judged(a.unique_outputs) for a in arms])
        table.add_row("  unique logprob records", *[_judged(a.unique_logprobs) for a in arms])
        table.add_row("  answers that differ", *[f"{a.divergent}" for a in arms])
        table.add_row("  output tokens per second", *[f"{a.output_tokens / a.duration_s:.0f}" for a in arms])
    return table


def _judged(unique: int) -> str:
    return f"[{'green' if unique == 1 else 'red'}]{unique}[/]"


def _summary(record: RunRecord) -> dict[str, Any]:
    identical, mixed = record.arm("identical"), record.arm("mixed")
    return {**_counts(identical), "mixed": _counts(mixed) | {"neighbours": mixed.answered - mixed.compared}}


def _counts(arm: ArmRecord) -> dict[str, Any]:
    return {
        "requests": arm.compared,
        "unique_outputs": arm.unique_outputs,
        "unique_logprobs": arm.unique_logprobs,
        "divergent": arm.divergent,
        "duration_s": round(arm.duration_s, 1),
    }
