"""Write a run record, or two side by side, as every report that was asked for."""

import sys
from collections.abc import Callable, Sequence

from vllm_deterministic.report import console, html, json, junit, markdown
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.settings import OutputKind, OutputSpec

_RENDER: dict[OutputKind, Callable[[RunRecord], str]] = {
    "console": console.render,
    "json": json.render,
    "html": html.render,
    "junit": junit.render,
    "markdown": markdown.render,
}
_RENDER_PAIR: dict[OutputKind, Callable[[Pair], str]] = {
    "console": console.render_pair,
    "html": html.render_pair,
    "markdown": markdown.render_pair,
}
PAIR_KINDS = tuple(_RENDER_PAIR)


def write_reports(record: RunRecord, outputs: Sequence[OutputSpec]) -> None:
    """Write each output; what has no path goes to standard output. Raises OSError where a file cannot be written."""
    for output in outputs:
        if _to_terminal(output):
            sys.stdout.write(console.render(record, color=True))
        else:
            _write(_RENDER[output.kind](record), output)


def write_pair(pair: Pair, outputs: Sequence[OutputSpec]) -> None:
    """The same for two runs. Each kind must be one of `PAIR_KINDS`."""
    for output in outputs:
        if _to_terminal(output):
            sys.stdout.write(console.render_pair(pair, color=True))
        else:
            _write(_RENDER_PAIR[output.kind](pair), output)


def _to_terminal(output: OutputSpec) -> bool:
    return output.kind == "console" and output.path is None and sys.stdout.isatty()


def _write(text: str, output: OutputSpec) -> None:
    if output.path is None:
        sys.stdout.write(text)
    else:
        output.path.write_text(text, encoding="utf-8")
