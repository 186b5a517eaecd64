"""Verdicts for a reader at a terminal and for a program."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_deterministic.triton_kernels.cublaslt import Algorithm
from vllm_deterministic.triton_kernels.tiles import Tile

from .verdict import PlanVerdict

_WIDTH = 130
_SIZE = ("block_m", "block_n", "block_k", "warps", "stages")


def render_console(
    identity: Mapping[str, str], verdicts: Sequence[PlanVerdict], names: Mapping[tuple[int, int], str]
) -> str:
    """A table with a line for each tile, then what was found. Plain text, no colours."""
    page = io.StringIO()
    console = Console(file=page, width=_WIDTH, highlight=False, markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in identity.items()), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("N", "K", "segments"):
        table.add_column(heading, justify="right")
    for heading in ("layer", "dtype"):
        table.add_column(heading)
    table.add_column("error", justify="right")
    table.add_column("tile")
    table.add_column("verdict")
    for verdict in verdicts:
        shape = [str(verdict.n), str(verdict.k), str(verdict.segments), names.get((verdict.n, verdict.k), "")]
        shape += [verdict.dtype, f"{verdict.error:.1e}"]
        for tile in verdict.tiles:
            status = "not tried" if verdict.refusal else tile.status
            table.add_row(*shape, _describe(tile.tile), status)
            shape = [""] * len(shape)
    console.print(table)
    for verdict in verdicts:
        where = f"N={verdict.n} K={verdict.k}"
        if verdict.refusal:
            console.print(f"{where}: {verdict.refusal}", soft_wrap=True)
        for tile in verdict.tiles:
            if tile.detail:
                console.print(f"{where}, {_describe(tile.tile)}: {tile.status}: {tile.detail}", soft_wrap=True)
    total = sum(len(verdict.tiles) for verdict in verdicts)
    good = 0 if any(verdict.refusal for verdict in verdicts) else total - sum(len(v.dropped) for v in verdicts)
    console.print(f"{good} of {total} tiles are in their class.")
    return page.getvalue()


def render_json(identity: Mapping[str, str], verdicts: Sequence[PlanVerdict]) -> str:
    """The verdicts as one JSON object."""
    content = {"schema_version": 1, "identity": identity, "verdicts": [verdict.to_json() for verdict in verdicts]}
    return json.dumps(content, indent=2) + "\n"


def _describe(tile: Tile | Algorithm) -> str:
    """The tile's size, then what sets it apart from a plain one; of an algorithm the library's numbers but zeros."""
    if isinstance(tile, Algorithm):
        named = [field.name for field in fields(tile)[1:] if getattr(tile, field.name)]
        return " ".join([f"cuBLASLt {tile.algorithm}", *(f"{name} {getattr(tile, name)}" for name in named)])
    extras = [field for field in fields(tile) if field.name not in _SIZE and getattr(tile, field.name) != field.default]
    words = [field.name if field.type is bool else f"{field.name} {getattr(tile, field.name)}" for field in extras]
    return " ".join([f"{tile.block_m}x{tile.block_n}x{tile.block_k}, warps {tile.warps}, stages {tile.stages}", *words])
