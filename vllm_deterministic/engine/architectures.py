"""Which architectures serve on a GPU, and what of each is still open: the table ``gpu_architectures.csv``.

A cell is proven once ``tests/gpu/test_models.py`` has compared the bytes on a GPU.
"""

import csv
import functools
from importlib import resources


@functools.cache
def open_cells() -> dict[str, tuple[str, ...]]:
    """By architecture the properties that are not proven.

    Raises:
        ValueError: a cell is neither proven nor open.
    """
    table = resources.files(__package__).joinpath("gpu_architectures.csv").read_text()
    cells: dict[str, tuple[str, ...]] = {}
    for row in csv.DictReader(table.splitlines(), strict=True):
        architecture = row.pop("architecture")
        if wrong := {name: cell for name, cell in row.items() if cell not in ("proven", "open")}:
            raise ValueError(f"gpu_architectures.csv: {architecture} has {wrong}; a cell is 'proven' or 'open'")
        cells[architecture] = tuple(name for name, cell in row.items() if cell == "open")
    return cells
