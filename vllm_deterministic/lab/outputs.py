"""Where the reports of a study go."""

import sys
from collections.abc import Sequence

from vllm_deterministic.verify.settings import OutputKind, OutputSpec

from . import console, html
from .view import Record

KINDS: tuple[OutputKind, ...] = ("console", "json", "html", "png")


def write_outputs(record: Record, outputs: Sequence[OutputSpec]) -> None:
    """Write each output. Raises OSError where a file cannot be written."""
    for output in outputs:
        if output.kind == "png" and output.path is not None:
            from .picture import draw  # matplotlib comes with the extra "lab"

            draw(record, output.path)
            continue
        if output.kind == "json":
            text = record.model_dump_json(indent=1) + "\n"
        else:
            text = html.render(record) if output.kind == "html" else console.render(record)
        if output.path is None:
            sys.stdout.write(text)
        else:
            output.path.write_text(text, encoding="utf-8")
