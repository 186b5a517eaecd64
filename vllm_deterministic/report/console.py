"""The run record for a reader at a terminal."""

import io

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_deterministic.verify.record import ArmRecord, RequestGroup, RunRecord, VariantRecord

_WIDTH = 110
_SHOWN = 3  # variants and neighbours spelled out; the JSON record holds all


def render(record: RunRecord) -> str:
    """A table of the arms, then what differed and where, then notes and the verdict. Plain text, no colours."""
    page = io.StringIO()
    console = Console(file=page, width=_WIDTH, highlight=False, markup=False)
    server = record.server
    version = f", version {server.version}" if server.version else ""
    console.print(f"{server.model or 'no model'} at {server.base_url}{version}", soft_wrap=True)
    if record.arms:
        console.print(_table(record.arms))
    for arm in record.arms:
        _print_findings(console, arm)
    for note in record.notes:
        console.print(f"Note: {note}")
    console.print(f"Verdict: {record.status}. {record.message}", soft_wrap=True)
    console.print(f"Repeat with: {record.command}", soft_wrap=True)
    return page.getvalue()


def _table(arms: list[ArmRecord]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm")
    for heading in ("compared", "neighbours", "unique outputs", "unique logprobs", "requests/s", "p50 s", "p99 s"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for arm in arms:
        latency = arm.latency
        table.add_row(
            arm.name,
            str(arm.compared),
            str(arm.answered - arm.compared),
            str(arm.unique_outputs),
            str(arm.unique_logprobs),
            f"{arm.answered / arm.duration_s:.1f}" if arm.duration_s else "-",
            f"{latency.p50:.3f}" if latency else "-",
            f"{latency.p99:.3f}" if latency else "-",
            arm.status if arm.status != "incomplete" else f"incomplete, {arm.answered} of {arm.planned}",
        )
    return table


def _print_findings(console: Console, arm: ArmRecord) -> None:
    hits = [(phase.name, phase.prefix_cache_hits) for phase in arm.phases if phase.prefix_cache_hits]
    if arm.name == "prefix" and hits:
        console.print("prefix: cached tokens found: " + ", ".join(f"{name} {tokens}" for name, tokens in hits))
    for failure in arm.failures:
        console.print(f"{arm.name}: {failure.message}.")
    different = [(group, variant) for group in arm.groups for variant in group.variants if variant.requests]
    for group, variant in different[:_SHOWN]:
        console.print("  " + describe(group, variant), soft_wrap=True)
    if len(different) > _SHOWN:
        console.print(f"  and {len(different) - _SHOWN} more variants; --output kind=json,path=FILE holds all")


def describe(group: RequestGroup, variant: VariantRecord) -> str:
    """One sentence on where a variant parts from the reference, and beside what."""
    difference = variant.difference
    if difference is None:
        return "the reference"
    if difference.position is not None:
        where = f"token {difference.position}: {difference.reference_token!r} became {difference.token!r}"
        where += f", logprob gap {difference.gap:.3g}" if difference.gap is not None else ""
    elif difference.logprob_position is not None:
        where = f"logprobs of token {difference.logprob_position}"
        where += f" by {difference.logprob_delta:.3g}" if difference.logprob_delta is not None else ""
    else:
        where = "the text or the finish reason"
    first = variant.requests[0]
    beside = ", ".join(first.beside[:_SHOWN]) or "nothing"
    more = f" and {len(first.beside) - _SHOWN} more" if len(first.beside) > _SHOWN else ""
    times = "1 answer" if variant.count == 1 else f"{variant.count} answers"
    return f"{times} of {group.count} part at {where} (first {first.id}, beside {beside}{more})"
