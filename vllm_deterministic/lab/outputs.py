"""Where the reports of a study go."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from vllm_deterministic.verify.settings import OUTPUT_KINDS, OutputSpec

from . import console, html
from .view import Record

KINDS = (*OUTPUT_KINDS, "png")


@dataclass(frozen=True)
class LabOutput:
    """One report: its kind and a path, standard output without one."""

    kind: Literal["console", "json", "html", "png"]
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``kind=png,path=lab.png``, or what verify takes. Raises ValueError that says what is wrong."""
        kind, _, rest = text.partition(",")
        if kind == "kind=png":
            if not rest:
                raise ValueError("kind=png needs a path, for example kind=png,path=lab.png")
            return cls("png", OutputSpec.parse(f"kind=html,{rest}").path)
        if kind.startswith("kind=") and kind.removeprefix("kind=") not in KINDS:
            raise ValueError(
                f"{kind.removeprefix('kind=')!r} is not a kind of output; choose one of {', '.join(KINDS)}"
            )
        spec = OutputSpec.parse(text)
        return cls(spec.kind, spec.path)


def write_outputs(record: Record, outputs: Sequence[LabOutput]) -> None:
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
