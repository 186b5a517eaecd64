"""The run record, or two of them, as Markdown for a pull request (GitHub's and GitLab's flavour)."""

import re
from collections.abc import Iterable, Sequence

from vllm_deterministic.report.numbers import number
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.report.partings import describe, different
from vllm_deterministic.report.view import RunView
from vllm_deterministic.verify.record import ArmRecord, RunRecord

_SHOWN = 5  # variants an arm spells out; a comment has room for 65,536 characters
_LONGEST = 500  # characters of one of them
_MARKS = {"identical": "✅", "diverged": "❌", "error": "⚠️", "interrupted": "⚠️", "incomplete": "⚠️"}


def render(record: RunRecord) -> str:
    """Verdict, a table of the arms, what differed and where, and how to repeat it."""
    run = RunView(record)
    lines = [_heading("Determinism", record), "", _text(record.message), ""]
    if run.arms:
        headings = ("arm", "result", "compared", "neighbours", "unique outputs", "unique logprobs", "tokens/s", "p99 s")
        lines += _table(
            headings,
            (
                (
                    arm.record.name,
                    f"{_MARKS[arm.record.status]} {arm.result}",
                    number(arm.record.compared),
                    number(arm.record.answered - arm.record.compared),
                    _judged(arm.record.unique_outputs),
                    _judged(arm.record.unique_logprobs),
                    number(arm.tokens_per_s),
                    number(arm.record.latency.p99 if arm.record.latency else None),
                )
                for arm in run.arms
            ),
        )
    for arm in record.arms:
        lines += _findings(arm)
    lines += [f"> {_text(note)}\n" for note in record.notes]
    facts = [f"- {_text(name)}: {_code(value)}" for name, value in run.environment]
    return "\n".join([*lines, *_details("Environment, and how to repeat it", [*facts, *_shell(record.command)])])


def render_pair(pair: Pair) -> str:
    """Both verdicts, then every measure of both runs side by side."""
    lines = []
    for name, run in zip(pair.names, (pair.left, pair.right), strict=True):
        lines += [_heading(name, run), "", _text(run.message), ""]
    rows = [
        (_text(f"{name}: {row.measure}"), _text(row.left), _text(row.right), row.ratio)
        for name in pair.arm_names
        for row in pair.rows(name)
    ]
    lines += _table(("", *map(_text, pair.names), "ratio"), rows) if rows else []
    lines += [_text(pair.agreement.sentence), ""]
    apart = [f"- {_text(name)}: {_code(left)}, {_code(right)}" for name, left, right in pair.set_apart]
    commands = [line for run in (pair.left, pair.right) for line in _shell(run.command)]
    return "\n".join([*lines, *_details("What is set up differently, and how to repeat it", [*apart, *commands])])


def _heading(name: str, record: RunRecord) -> str:
    return f"### {_MARKS[record.status]} {_text(name)}: {record.status}"


def _findings(arm: ArmRecord) -> list[str]:
    if not arm.failures:
        return []
    lines = [f"**{arm.name}**: {_text(failure.message)}." for failure in arm.failures]
    variants = different(arm)
    found = [f"- {_code(describe(group, variant)[:_LONGEST])}" for group, variant in variants[:_SHOWN]]
    found += [f"- and {len(variants) - _SHOWN} more variants"] if len(variants) > _SHOWN else []
    return [*lines, "", *(_details("Where they part", found) if found else [])]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def _details(summary: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def _shell(command: str) -> list[str]:
    fence = _fence(command, 3)
    return ["", f"{fence}console", command, fence]


def _judged(unique: int) -> str:
    return f"**{unique}**" if unique > 1 else str(unique)


def _text(text: str) -> str:
    """Literal: no character of it is markup, a mention, an issue or a new line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+|~$&])", r"\\\1", " ".join(text.split())).replace("@", "@\u200b")


def _code(text: str) -> str:
    """A span that holds any text, on one line."""
    line = " ".join(text.split())
    fence = _fence(line, 1)
    return f"{fence} {line} {fence}"  # the spaces are no part of it, and keep its own backticks from the fence


def _fence(text: str, least: int) -> str:
    """Longer than any run of backticks in the text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
