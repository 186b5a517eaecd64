"""The run record, or two of them, for a reader at a terminal."""

import io
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_deterministic.report.numbers import number
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.report.partings import describe, different
from vllm_deterministic.report.view import RunView
from vllm_deterministic.verify.record import ArmRecord, RunRecord

_WIDTH = 110
_SHOWN = 3  # variants spelled out; the JSON record holds all
_STYLES = {
    "identical": "green",
    "diverged": "bold red",
    "error": "yellow",
    "interrupted": "yellow",
    "incomplete": "yellow",
}


def render(record: RunRecord, *, color: bool = False) -> str:
    """A table of the arms, then what differed and where, then notes and the verdict; in color for a terminal."""
    return _page(lambda console: _print_run(console, record), color)


def render_pair(pair: Pair, *, color: bool = False) -> str:
    """Both verdicts, then every measure of both runs side by side."""
    return _page(lambda console: _print_pair(console, pair), color)


def _page(write: Callable[[Console], None], color: bool) -> str:
    page = io.StringIO()
    console = Console(
        file=page,
        width=None if color else _WIDTH,  # a terminal has a width of its own
        highlight=False,
        markup=False,
        color_system="auto" if color else None,
        force_terminal=color,
    )
    write(console)
    return page.getvalue()


def _print_run(console: Console, record: RunRecord) -> None:
    server = record.server
    version = f", version {server.version}" if server.version else ""
    console.print(f"{server.model or 'no model'} at {server.base_url}{version}", soft_wrap=True)
    if record.arms:
        console.print(_table(RunView(record)))
    for arm in record.arms:
        _print_findings(console, arm)
    for note in record.notes:
        console.print(f"Note: {note}")
    console.print(_verdict("Verdict", record), soft_wrap=True)
    console.print(f"Repeat with: {record.command}", soft_wrap=True)


def _print_pair(console: Console, pair: Pair) -> None:
    for name, run in zip(pair.names, (pair.left, pair.right), strict=True):
        console.print(_verdict(name, run), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", *pair.names, "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in pair.arm_names:
        table.add_row(name, style="bold")
        for row in pair.rows(name):
            table.add_row(f"  {row.measure}", row.left, row.right, row.ratio)
    if pair.arm_names:
        console.print(table)
    for name, left, right in pair.set_apart:
        console.print(f"{name}: {left}, {right}", soft_wrap=True)
    console.print(pair.agreement.sentence, soft_wrap=True)


def _verdict(name: str, record: RunRecord) -> Text:
    return Text.assemble(f"{name}: ", (record.status, _STYLES[record.status]), f". {record.message}")


def _table(run: RunView) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm")
    for heading in ("compared", "neighbours", "unique outputs", "unique logprobs", "requests/s", "p50 s", "p99 s"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for arm in run.arms:
        record = arm.record
        table.add_row(
            record.name,
            str(record.compared),
            str(record.answered - record.compared),
            _judged(record.unique_outputs),
            _judged(record.unique_logprobs),
            number(arm.requests_per_s),
            number(record.latency.p50 if record.latency else None),
            number(record.latency.p99 if record.latency else None),
            Text(arm.result, _STYLES[record.status]),
        )
    return table


def _judged(unique: int) -> Text:
    return Text(str(unique), _STYLES["diverged"] if unique > 1 else "")


def _print_findings(console: Console, arm: ArmRecord) -> None:
    hits = [(phase.name, phase.prefix_cache_hits) for phase in arm.phases if phase.prefix_cache_hits]
    if arm.name == "prefix" and hits:
        console.print("prefix: cached tokens found: " + ", ".join(f"{name} {tokens}" for name, tokens in hits))
    for failure in arm.failures:
        console.print(f"{arm.name}: {failure.message}.")
    variants = different(arm)
    for group, variant in variants[:_SHOWN]:
        console.print("  " + describe(group, variant), soft_wrap=True)
    if len(variants) > _SHOWN:
        console.print(f"  and {len(variants) - _SHOWN} more variants; --output kind=json,path=FILE holds all")
