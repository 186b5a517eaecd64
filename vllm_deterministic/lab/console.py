"""A study for a reader at a terminal."""

import io

from rich import box
from rich.console import Console
from rich.table import Table

from .view import Record, verdict, view

_WIDTH = 124


def render(record: Record) -> str:
    """A table of the strategies, then how to read it, then each claim beside what was measured. No colours."""
    study = view(record)
    page = io.StringIO()
    console = Console(file=page, width=_WIDTH, highlight=False, markup=False)
    console.print(study.title)
    console.print(study.subject)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, heading in enumerate(study.headings):
        # Headings of two words take two lines; no column may shrink.
        words = heading if heading.startswith("ms") else heading.replace(" ", "\n", 1)
        table.add_column(words, justify="right" if number else "left", no_wrap=True)
    for row in study.rows:
        table.add_row(*row)
    console.print(table)
    for note in study.notes:
        console.print(note)
    console.print("\nClaims, and what was measured here:")
    for finding in study.findings:
        console.print(f"  {verdict(finding)}: {finding.claim}. {finding.measured}.")
    console.print(f"\n{study.environment}", soft_wrap=True)
    return page.getvalue()
