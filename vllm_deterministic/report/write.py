"""Write a run record as every report that was asked for."""

import sys
from collections.abc import Callable, Sequence

from vllm_deterministic.report import console, html, json
from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.settings import OutputKind, OutputSpec

_RENDER: dict[OutputKind, Callable[[RunRecord], str]] = {
    "console": console.render,
    "json": json.render,
    "html": html.render,
}


def write_reports(record: RunRecord, outputs: Sequence[OutputSpec]) -> None:
    """Write each output; what has no path goes to standard output. Raises OSError where a file cannot be written."""
    for output in outputs:
        text = _RENDER[output.kind](record)
        if output.path is None:
            sys.stdout.write(text)
        else:
            output.path.write_text(text, encoding="utf-8")
