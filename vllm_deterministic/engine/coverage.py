"""What covers each thing that the bytes of an answer pass through: one record, as refusal, table and JSON.

``covered_settings`` finds the gaps in an engine's settings, ``covered_modules`` walks what was built from them.
"""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_deterministic import __version__
from vllm_deterministic.certify.whole_file import write_whole

from .config import RefusalError
from .fingerprint import Fingerprint

SCHEMA_VERSION = 1
_ALLOW = "--deterministic-allow-uncovered"


@dataclass(frozen=True)
class Entry:
    """One thing that an answer depends on.

    Attributes:
        part: settings, model, modules, attention, sampler, collectives or compilation.
        name: what it is: a class, or a setting with its value.
        covered_by: the deterministic implementation; None where there is none.
        modules: names of the model's modules that are meant.
        why: of what is not covered: what is missing.
        option: of what is not covered: what avoids it.
        can_start: of what is not covered: whether the server can do without the promise. Where the replaced parts would
            compute something else it cannot.
    """

    part: str
    name: str
    covered_by: str | None = None
    modules: tuple[str, ...] = ()
    why: str = ""
    option: str = ""
    can_start: bool = True

    @property
    def refusal(self) -> str:
        """What, why, and the way out, in one line."""
        where = f" (module {self.modules[0]}, {len(self.modules)} in all)" if self.modules else ""
        start = f" Or start without the promise: {_ALLOW}." if self.can_start else ""
        return f"{self.name}{where} is not covered: {self.why}. To avoid it: {self.option}.{start}"


@dataclass(frozen=True)
class Coverage:
    """The coverage of one engine.

    Attributes:
        model: name or folder of the model.
        device: cpu or cuda.
        entries: what was found.
        allow_uncovered: whether gaps were accepted by the user.
        fingerprint: None before the weights are read.
    """

    model: str
    device: str
    entries: tuple[Entry, ...]
    allow_uncovered: bool = False
    fingerprint: Fingerprint | None = None

    @property
    def uncovered(self) -> tuple[Entry, ...]:
        """The gaps."""
        return tuple(entry for entry in self.entries if entry.covered_by is None)

    @property
    def headline(self) -> str:
        """The state in one line."""
        gaps = ", ".join(entry.name for entry in self.uncovered)
        return f"NOT DETERMINISTIC, not covered: {gaps}" if gaps else "every part is covered"

    def refuse(self) -> None:
        """Refuse the first gap that the user has not accepted, or that cannot be.

        Raises:
            RefusalError: see above.
        """
        for entry in self.uncovered:
            if not (entry.can_start and self.allow_uncovered):
                raise RefusalError(entry.refusal)

    def to_json(self) -> dict[str, Any]:
        """The record in plain types; ``docs/coverage.md`` describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "plugin_version": __version__,
            "model": self.model,
            "device": self.device,
            "deterministic": not self.uncovered,
            "allow_uncovered": self.allow_uncovered,
            "fingerprint": self.fingerprint.to_json() if self.fingerprint else None,
            "entries": [_entry_json(entry) for entry in self.entries],
        }

    def write(self, path: str | Path) -> None:
        """Write the record to a file, whole or not at all.

        Raises:
            RefusalError: the file cannot be written.
        """
        path = Path(path)
        try:
            # For whoever may read what the server writes.
            write_whole(path, json.dumps(self.to_json(), indent=2) + "\n", mode=0o644)
        except OSError as error:
            raise RefusalError(f"--deterministic-coverage-file: cannot write {path}: {error.strerror}") from None

    def table(self) -> str:
        """The record for a reader."""
        table = Table("part", "what", "modules", "covered by", title_justify="left", box=None, pad_edge=False)
        for entry in self.entries:
            modules = str(len(entry.modules)) if entry.modules else ""
            table.add_row(entry.part, entry.name, modules, entry.covered_by or f"NOT COVERED: {entry.why}")
        text = io.StringIO()
        Console(file=text, width=160).print(table, markup=False)
        lines = [f"coverage of {self.model} on {self.device}: {self.headline}", *text.getvalue().splitlines()]
        if self.fingerprint:
            lines.append(f"fingerprint: {self.fingerprint.value}")
        return "\n".join(line.rstrip() for line in lines)


def _entry_json(entry: Entry) -> dict[str, Any]:
    fields = asdict(entry)
    for name in ("why", "option", "can_start"):
        if entry.covered_by is not None:
            del fields[name]
    return {**fields, "modules": list(entry.modules)}
