"""The command ``vllm-deterministic demo``: the same load on vLLM with and without ``--enable-deterministic``."""

import asyncio
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vllm_deterministic.local_server import LocalServer, ServerError
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.report.write import write_pair, write_reports
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
_ARGS = (
    "--served-model-name=tiny",
    # Compiling would add more than a minute to each start and shows nothing more.
    "--enforce-eager",
    # Large enough for no prompt to be cut: a seeded request that is cut kills vLLM's default engine on a CPU.
    "--max-num-batched-tokens=16384",
)
_REPORTS: tuple[OutputKind, ...] = ("json", "html")


def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where model, logs and records go.")] = Path(".demo"),
    num_prompts: Annotated[int, typer.Option(min=2, help="Identical requests to the deterministic server.")] = 1000,
    default_prompts: Annotated[int, typer.Option(min=2, help="Identical requests to the default server.")] = 300,
    mixed_prompts: Annotated[int, typer.Option(min=2, help="Requests among strangers, to each server.")] = 28,
    dtype: Annotated[
        str | None, typer.Option(help="Of the model.", show_default="bfloat16 where the CPU has it, else float32")
    ] = None,
) -> None:
    """Serve the embedded model with and without --enable-deterministic, send both the same load, compare the answers.

    The last line of standard output is a JSON object of what was measured; all else goes to standard error.
    Exit status: 0 the deterministic server kept its promise, 1 it did not, 2 something could not run.
    """
    console = Console(stderr=True)
    try:
        config = ModelConfig(dtype=dtype or _fastest_dtype())
    except ValueError as error:
        _fail(f"--dtype: {error}")
    model = directory / "model"
    console.print(f"Writing the model to {model}, {config.dtype}", markup=False)
    write_or_exit(model, config)
    records = {}
    try:
        for side, prompts in zip(SIDES, (num_prompts, default_prompts), strict=True):
            args = [*_ARGS, f"--dtype={config.dtype}", *side.args]
            records[side.key] = _measure(side.title, model, args, directory / side.key, (prompts, mixed_prompts))
    except ServerError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("Interrupted; the server is stopped.", err=True)
        raise typer.Exit(130) from None
    console.print(_table(records))
    default, deterministic = (records[key] for key in ("default", "deterministic"))
    pair = Pair(default, deterministic, ("default", "deterministic"))
    write_pair(pair, [OutputSpec(kind="html", path=directory / "compared.html")])
    pages = ", ".join(str(directory / f"{name}.html") for name in ("deterministic", "default", "compared"))
    console.print(f"Details: {pages}", markup=False)
    typer.echo(json.dumps({side.key: _summary(records[side.key]) for side in SIDES}))
    raise typer.Exit(deterministic.exit_code)


def _fastest_dtype() -> str:
    """Without instructions for it, a CPU computes in bfloat16 three times more slowly than in float32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "float32"
    return "bfloat16" if words & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _measure(title: str, model: Path, args: list[str], stem: Path, prompts: tuple[int, int]) -> RunRecord:
    """Start a server, send it so many requests of the arms identical and mixed, stop it.

    Log and reports are named after `stem`.

    Raises:
        ServerError: it did not start, or did not answer all requests.
    """
    console = Console(stderr=True)
    log = stem.with_suffix(".log")
    console.print(f"\n{title}: starting vllm serve, about a minute; log in {log}", markup=False)
    with ExitStack() as stack:
        with console.status("Starting") as status:
            server = LocalServer(
                model, args, log=log, on_wait=lambda waited_s: status.update(f"Starting: {waited_s:.0f} s")
            )
            stack.enter_context(server)
        settings = Settings(
            base_url=server.base_url, arms=("identical", "mixed"), num_prompts=prompts[0], mixed_prompts=prompts[1]
        )
        record = asyncio.run(verify(settings, choose_progress()))
        if record.status in ("error", "interrupted"):
            raise ServerError(f"{title}: {record.message} The end of {log}:\n{server.log_tail()}")
    write_reports(record, [OutputSpec(kind=kind, path=stem.with_suffix(f".{kind}")) for kind in _REPORTS])
    return record


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)


def _table(records: dict[str, RunRecord]) -> Table:
    """What was measured, side by side."""
    table = Table(title="What came back", title_justify="left")
    table.add_column()
    for side in SIDES:
        table.add_column(side.title, justify="right")
    for arm, title in (("identical", "one request, many times"), ("mixed", "the same request among strangers")):
        arms = [records[side.key].arm(arm) for side in SIDES]
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", *[f"{a.compared} requests" for a in arms])
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
