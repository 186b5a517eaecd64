"""Try every tile of a weight on inputs made to cancel and compare bytes with the class reference."""

from collections.abc import Callable, Iterable, Sequence

import torch

from vllm_deterministic.triton_kernels import matmul as kernel
from vllm_deterministic.triton_kernels.bit_class import first_difference
from vllm_deterministic.triton_kernels.cancelling_inputs import FAMILIES
from vllm_deterministic.triton_kernels.cublaslt import Algorithm
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan, class_reference

from .verdict import PlanVerdict, TileVerdict

# Around every width of a tile, plus what serving brings: one request, a full batch, chunks of prefill.
ROWS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 1000, 4096, 8192)

# Relative Frobenius error against float64: the rounding of the result, and for fp32 that of long sums. TF32 is above.
ERROR_LIMIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-16}

# Rows past the largest M, so that it too is tried at two positions, and an odd one: rows change their place in a tile.
_SPARE_ROWS = 5
_ORACLE_ROWS, _ORACLE_COLUMNS = 64, 512

Matmul = Callable[..., torch.Tensor]


def tried_columns(n: int) -> int:
    """The columns that stand for a weight of N rows.

    K alone decides the order of additions. N enters by the last tile and by alignment, which are those of the remainder
    of 2048, a multiple of every BLOCK_N; by ``segments``, which is handed in from the real shape; and by the number of
    tiles, of which more are more of the same.
    """
    return n if n < 4096 else 2048 + n % 2048


def tried_rows(plan: TilePlan, tile: Tile | Algorithm, rows: Sequence[int] = ROWS) -> tuple[int, ...]:
    """The numbers of rows at which the table may choose ``tile``: those listed, the edges, and their neighbours."""
    tried = set[int]()
    for before, last in plan.rows(tile):
        tried.update(m for m in rows if before < m <= last)
        tried.update((before, before + 1, last, last + 1))
    if isinstance(tile, Algorithm) or tile.persistent:
        tried.add(max(rows))  # enough tiles for a program to walk more than one
    return tuple(sorted(m for m in tried if 1 <= m <= max(rows))) or (max(rows),)


def certify_plan(
    plan: TilePlan,
    dtype: torch.dtype,
    device: torch.device,
    *,
    every_m: bool = True,
    rows: Sequence[int] = ROWS,
    matmul: Matmul | None = None,
    advance: Callable[[], None] = lambda: None,
) -> PlanVerdict:
    """Compare each tile of a plan with the class reference, byte for byte.

    The reference multiplies all rows once; a tile multiplies some of them, standing elsewhere, and must give the
    reference's bytes. So a row's position, the number of rows and the tile vary at once.

    Args:
        plan: the tiles of one weight.
        dtype: bf16, fp16 or fp32.
        device: where the kernels run.
        every_m: run every tile at every M of ``rows``, or only where the table may choose it.
        rows: numbers of rows M.
        matmul: the kernel, or another to be tried.
        advance: called after each family of inputs.

    Raises:
        torch.OutOfMemoryError: the device has too little memory left to try, which says nothing about the tiles.
    """
    matmul = matmul or kernel.matmul
    reference = class_reference(dtype)
    columns, total = tried_columns(plan.n), max(rows) + _SPARE_ROWS
    verdicts = {tile: TileVerdict(tile, "in class") for tile in plan.tiles}
    error, refusal = 0.0, ""
    generator = torch.Generator(device).manual_seed(0)
    for family, make in FAMILIES.items():
        x, w = make(total, columns, plan.k, dtype, generator)
        try:
            expected = matmul(x, w, tile=reference, segments=plan.segments)
            if family == "normal":
                exact = _oracle(x, w)
                error = _error(_beside(exact, expected), exact)
                if not error <= ERROR_LIMIT[dtype]:
                    refusal = f"the class reference is off by {error:.1e}, more than {ERROR_LIMIT[dtype]:.1e}"
            elif family == "non-finite":
                exact = _oracle(x, w)
                if not _passes_through(_beside(exact, expected), exact, ERROR_LIMIT[dtype]):
                    refusal = "the class reference does not pass infinities and NaN through as float64 does"
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            refusal = f"the class reference did not run: {_line(failure)}"
        if refusal:
            break
        for tile, verdict in verdicts.items():
            if verdict.status != "in class":
                continue
            tried = rows if every_m else tried_rows(plan, tile, rows)
            try:
                detail = _outside(matmul, plan, tile, x, w, expected, tried)
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:
                verdicts[tile] = TileVerdict(tile, "failed", _line(failure))
            else:
                if detail:
                    verdicts[tile] = TileVerdict(tile, "outside", f"{family}, {detail}")
        advance()
    return PlanVerdict(
        n=plan.n,
        k=plan.k,
        dtype=str(dtype).removeprefix("torch."),
        segments=plan.segments,
        every_m=every_m,
        error=error,
        refusal=refusal,
        tiles=tuple(verdicts.values()),
    )


def _outside(
    matmul: Matmul,
    plan: TilePlan,
    tile: Tile | Algorithm,
    x: torch.Tensor,
    w: torch.Tensor,
    expected: torch.Tensor,
    rows: Iterable[int],
) -> str:
    """Where the tile's bytes first differ; empty if nowhere."""
    for m in rows:
        for start in (0, len(x) - m):
            out = matmul(x[start : start + m], w, tile=tile, segments=plan.segments)
            wanted = expected[start : start + m]
            place = first_difference(out, wanted)
            if place is not None:
                return f"M={m}, element {place}: {out[place].item()!r}, not {wanted[place].item()!r}"
    return ""


def _oracle(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The first rows and last columns in float64, on the CPU: the library's kernels would stay in a GPU's memory."""
    return x[:_ORACLE_ROWS].cpu().double() @ w[-_ORACLE_COLUMNS:].cpu().double().T


def _beside(exact: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out[: len(exact), -exact.shape[1] :].cpu().double()


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def _passes_through(out: torch.Tensor, exact: torch.Tensor, limit: float) -> bool:
    """Whether infinities and NaN stand where float64 has them, and what is finite there is right here."""
    finite = exact.isfinite()
    special = torch.where(finite, 0.0, exact)
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(kind(out), kind(special)) for kind in kinds) and (
        _error(torch.where(finite, out, 0.0), torch.where(finite, exact, 0.0)) <= limit
    )


def _line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
