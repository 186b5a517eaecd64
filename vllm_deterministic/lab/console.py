"""A study for a reader at a terminal."""

import io

from rich import box
from rich.console import Console
from rich.table import Table

from .view import Record, verdict, view

_WIDTH = 120


def render(record: Record) -> str:
    """A table of the strategies, then how to read it, then each claim beside what was measured. No colours."""
    study = view(record)
    page = io.StringIO()
    console = Console(file=page, width=_WIDTH, highlight=False, markup=False)
    console.print(study.title)
    console.print(study.subject)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(study.headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number or heading.startswith("ms"))
    for row in study.rows:
        table.add_row(*row)
    console.print(table)
    for note in study.notes:
        console.print(note)
    console.print("\nClaims, and what was measured here:")
    for finding in study.findings:
        console.print(f"  {verdict(finding)}: {finding.claim}. {finding.measured}.", soft_wrap=True)
    console.print(f"\n{study.environment}", soft_wrap=True)
    return page.getvalue()
