"""The command ``vllm-deterministic service``."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer


def service_command(
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="URL | NAME=URL", help="Server to verify. Repeatable; several are taken for replicas."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings, named as the options are, with underscores.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8090")] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Bearer token of this service. The environment hides it better than the command line."),
    ] = None,
    allow_no_token: Annotated[
        bool | None, typer.Option("--allow-no-token", help="Listen on a non-loopback address without a token.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the targets.")] = None,
    database: Annotated[
        Path | None, typer.Option(help="SQLite file of the history.", show_default="verifications.db")
    ] = None,
    every: Annotated[
        str | None, typer.Option(help="Verify all targets this often: 30s, 10m, 1h.", show_default="never")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Share of a target's capacity that scheduled verifications may take.", show_default="0.1"),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(help="Requests that a target serves at a time (its --max-num-seqs).", show_default="256"),
    ] = None,
    keep_runs: Annotated[int | None, typer.Option(help="Verifications to keep.", show_default="1000")] = None,
    keep_days: Annotated[int | None, typer.Option(help="Days to keep them.", show_default="30")] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Most requests to a target in one verification.", show_default="5000")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a compared answer.", show_default="256")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Most requests at a time on a target.", show_default="256")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Most verifications that wait.", show_default="8")] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Longest body of a request to this service.", show_default="65536")
    ] = None,
    max_duration: Annotated[
        str | None, typer.Option(help="Longest that a verification may run.", show_default="1h")
    ] = None,
) -> None:
    """Serve verifications over HTTP: on request and by the clock, with a history, metrics and a page to look at.

    Every option is also a variable, VLLM_DETERMINISTIC_TOKEN for --token, and a line of --config. Options come before
    variables, variables before the file.
    """
    given = {name: value for name, value in locals().items() if name != "config" and value is not None}
    try:
        from vllm_deterministic.service.serve import serve
        from vllm_deterministic.service.settings import ServiceSettings
    except ModuleNotFoundError as error:
        _fail(f"service needs {error.name}, which is not installed: pip install 'vllm-deterministic[service]'")
    try:
        serve(ServiceSettings.load(given, config))
    except ValueError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
