"""The ``vllm-deterministic`` command: one sub-command a job, each in the module that does it."""

import typer

from vllm_deterministic.certify.command import certify_command
from vllm_deterministic.coverage_command import CONTEXT_SETTINGS, coverage_command
from vllm_deterministic.demo import demo
from vllm_deterministic.lab.command import lab_command
from vllm_deterministic.receipts.command import receipt_command, replay_command
from vllm_deterministic.report.command import report_command
from vllm_deterministic.service.command import service_command
from vllm_deterministic.tiny_model.command import tiny_model
from vllm_deterministic.verify.command import ListCommand, verify_command

app = typer.Typer(
    name="vllm-deterministic",
    help="Verify that a server answers deterministically; tools around `vllm serve --enable-deterministic`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.command("demo")(demo)
app.command("tiny-model")(tiny_model)
app.command("verify", cls=ListCommand)(verify_command)
app.command("certify", cls=ListCommand)(certify_command)
app.command("coverage", context_settings=CONTEXT_SETTINGS)(coverage_command)
app.command("lab", cls=ListCommand)(lab_command)
app.command("receipt")(receipt_command)
app.command("replay")(replay_command)
app.command("report", cls=ListCommand)(report_command)
app.command("service")(service_command)


@app.callback()
def _root() -> None:
    """Keep sub-commands as sub-commands even while there is only one."""


def main() -> None:
    """Run the command line."""
    app()
