"""The command ``vllm-deterministic verify``."""

import asyncio
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperCommand

from vllm_deterministic.report.write import write_reports
from vllm_deterministic.verify.progress import choose_progress
from vllm_deterministic.verify.record import EXIT_CODES, RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import ARMS, OUTPUT_KINDS, OutputSpec, Settings, explain
from vllm_deterministic.verify.signals import stop_on_signals

_LISTS = ("--arms", "--metadata", "--output", "--shapes")
_DEFAULT = Settings(base_url="http://127.0.0.1:8000")


class ListCommand(TyperCommand):
    """A command whose list options take several values after one name, as those of ``vllm bench serve`` do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every further value of a list option its own name, then parse as usual."""
        spread: list[str] = []
        current, fresh = "", False
        for position, word in enumerate(args):
            if word == "--":
                spread.extend(args[position:])
                break
            if word.startswith("-"):
                current, fresh = word, True
            elif current in _LISTS and not fresh:
                spread.append(current)
            else:
                fresh = False
            spread.append(word)
        return super().parse_args(ctx, spread)


def verify_command(
    base_url: Annotated[
        str,
        typer.Option(
            help="Where the server listens, for example http://127.0.0.1:8000.", envvar="VLLM_DETERMINISTIC_URL"
        ),
    ],
    endpoint: Annotated[
        str, typer.Option(help="/v1/completions or /v1/chat/completions. The arm prefix always uses the former.")
    ] = _DEFAULT.endpoint,
    model: Annotated[str | None, typer.Option(help="Model to ask.", show_default="the first the server lists")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key of the server.", envvar=["VLLM_DETERMINISTIC_API_KEY", "OPENAI_API_KEY"])
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Which arms to run, of {', '.join(ARMS)}; separated by commas or spaces.", show_default="all"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Prompts, neighbours and seeds follow from it.")] = _DEFAULT.seed,
    max_concurrency: Annotated[int, typer.Option(help="Most requests at a time.")] = _DEFAULT.max_concurrency,
    num_prompts: Annotated[int, typer.Option(help="Requests of the arm identical.")] = _DEFAULT.num_prompts,
    mixed_prompts: Annotated[
        int, typer.Option(help="Times the arm mixed sends its target; neighbours come on top, about six for one.")
    ] = _DEFAULT.mixed_prompts,
    prefix_rounds: Annotated[
        int, typer.Option(help="Rounds of the arm prefix, each with other prompts; about 100 requests each.")
    ] = _DEFAULT.prefix_rounds,
    sampled_prompts: Annotated[
        int, typer.Option(help="Requests of the arm sampled, rounded down to whole repeats of its 24.")
    ] = _DEFAULT.sampled_prompts,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second, as a Poisson process; inf sends as fast as answers come.")
    ] = _DEFAULT.request_rate,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each compared answer.")] = _DEFAULT.max_tokens,
    logprobs: Annotated[
        int, typer.Option(help="Top logprobs to compare; 0 compares tokens alone.")
    ] = _DEFAULT.logprobs,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Let no answer end early (a field of vLLM's).")
    ] = False,
    extra_body: Annotated[str, typer.Option(help="JSON object added to the body of every request.")] = "{}",
    metadata: Annotated[
        list[str] | None, typer.Option(help="Notes for the record.", metavar="KEY=VALUE...", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one answer may take.")] = _DEFAULT.timeout,
    ready_check_timeout_sec: Annotated[
        float, typer.Option(help="Seconds to wait for the server to come up; 0 tries once.")
    ] = _DEFAULT.ready_check_timeout_sec,
    block_size: Annotated[
        int | None,
        typer.Option(help="KV block size that prefix prompts are built around.", show_default="the server's, or 16"),
    ] = None,
    kv_split: Annotated[
        int, typer.Option(help="KV split size that prefix prompts are built around.")
    ] = _DEFAULT.kv_split,
    chunk_budget: Annotated[
        int, typer.Option(help="Prefill chunk budget that prefix prompts are built around (--max-num-batched-tokens).")
    ] = _DEFAULT.chunk_budget,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="kind=KIND,path=FILE",
            help=f"Reports to write, each of kind {', '.join(OUTPUT_KINDS)}; html needs a path, the others go to "
            "standard output without one. Repeatable.",
            show_default="kind=console",
        ),
    ] = None,
) -> None:
    """Send the same requests under different circumstances and compare the answers byte for byte.

    Exit status: 0 all answers identical, 1 some diverged, 2 could not run to the end (what there is is reported).
    """
    given = {name: value for name, value in locals().items() if name not in ("arms", "output")}
    if arms:
        given["arms"] = [arm for words in arms for arm in words.split(",") if arm]
    given["metadata"] = metadata or []
    try:
        settings = Settings.model_validate(given)
        outputs = [OutputSpec.parse(text) for text in output or ["kind=console"]]
    except ValidationError as error:
        _fail(explain(error))
    except ValueError as error:
        _fail(f"--output: {error}")
    if settings.ready_check_timeout_sec:
        typer.echo(f"Waiting up to {settings.ready_check_timeout_sec:g} s for {settings.base_url}", err=True)
    record = asyncio.run(_verify_until_signal(settings))
    try:
        write_reports(record, outputs)
    except OSError as error:
        _fail(f"--output: cannot write {error.filename}: {error.strerror}")
    if record.exit_code == EXIT_CODES["error"]:
        typer.echo(f"{record.status.capitalize()}: {record.message}", err=True)
    raise typer.Exit(record.exit_code)


async def _verify_until_signal(settings: Settings) -> RunRecord:
    """Run until done, or until Ctrl-C or SIGTERM; either way there is a record."""
    return await verify(settings, choose_progress(), stop=stop_on_signals())


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(EXIT_CODES["error"])
