"""How a tensor is cut into rows, and rows into programs: by the length of a row alone, never by how many there are.

Triton lays the elements of a row over threads by what it knows of their alignment, and a reduction follows that
layout. So alignment follows from the row's length too: rows of a multiple of 8 elements begin at multiples of 8
elements and of 16 bytes, and are copied where they do not; of other rows nothing is known.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import check_device, programmatic_launch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# The longest row that one program holds in registers.
WIDEST = 32768


@dataclass(frozen=True)
class RowTile:
    """What one program takes: ``rows`` rows, on ``warps`` warps, in chunks of ``columns`` elements of each row.

    A row's sum adds the chunks element by element in ascending order, then the ``columns`` sums in one fixed order.
    """

    rows: int
    columns: int
    warps: int


def row_tile(width: int) -> RowTile:
    """The tile for rows of ``width`` elements.

    Rows of up to 1024 elements are two chunks, and as many share a program as make 16 elements a thread. Longer ones
    are taken alone, in chunks of 8 or 4 elements a thread, whichever fit better: 5120 is five times 1024.
    """
    if width <= 1024:
        columns = triton.next_power_of_2(width)
        return RowTile(2048 // columns, max(1, columns // 2), 4)
    warps = max(2, min(1 << (width // 512).bit_length() - 1, 16 if width <= 16384 else 32))
    return RowTile(1, fullest(width, 256 * warps, 128 * warps), warps)


def fullest(width: int, *blocks: int) -> int:
    """The block of which the fewest elements lie past the end of a row; of equals the first."""
    return min(blocks, key=lambda block: -width % block)


def launch_options(x: torch.Tensor, warps: int) -> dict[str, bool | int]:
    """How every row kernel is launched: each operation rounded by itself, overlapping the kernel ahead of it."""
    pdl = programmatic_launch(x)
    return {"PDL": pdl, "num_warps": warps, "enable_fp_fusion": False, "launch_pdl": pdl}


def check_floats(name: str, x: torch.Tensor, width: int | None = None) -> None:
    """Refuse a tensor that is no batch of rows.

    Raises:
        ValueError: ``x`` is on no usable device, is not bf16, fp16 or fp32, has no dimension, or its last one is not
            ``width`` (None: at least 1).
    """
    check_device(name, x)
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}; bf16, fp16 or fp32 is needed")
    if x.dim() == 0 or (x.shape[-1] < 1 if width is None else x.shape[-1] != width):
        wanted = "at least 1 column" if width is None else f"{width} columns"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {wanted} in the last dimension are needed")


def check_vector(name: str, w: torch.Tensor, x: torch.Tensor, width: int) -> torch.Tensor:
    """A weight or bias for the rows of ``x``, as the kernels read it.

    Raises:
        ValueError: ``w`` is not ``[width]``, is no float or lies on another device than ``x``.
    """
    check_floats(name, w, width)
    if w.dim() != 1 or w.device != x.device:
        raise ValueError(f"{name} has shape {tuple(w.shape)} on {w.device}; [{width}] on {x.device} is needed")
    return _aligned(w.contiguous(), 8)


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """``x`` as ``[R, columns]`` with unit stride in a row and rows as aligned as ``width`` promises.

    Args:
        x: ``[..., columns]``; copied only where it cannot be viewed so.
        width: elements of a row as the kernel sees it; divides ``columns``.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    return _aligned(x.reshape(x.numel() // x.shape[-1], x.shape[-1]), width)


def _aligned(x: torch.Tensor, width: int) -> torch.Tensor:
    if width % 8:
        return x
    if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:-1]):
        return x.clone(memory_format=torch.contiguous_format)
    return x


@triton.jit
def row_offset(row, stride, width: tl.constexpr):
    """Elements before ``row``, with the alignment that rows of ``width`` elements have.

    The stride must not be specialized on: a kernel would learn more of one batch than of another.
    """
    if width % 8 == 0:
        stride = stride // 8 * 8
    return row.to(tl.int64) * stride


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the kernel ahead in the stream end before anything is read; the next one may be set up meanwhile."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def divide_by_width(total, width: tl.constexpr):
    """``total / width``, correctly rounded."""
    if width & (width - 1) == 0:
        # Exact either way for a power of two; the division's subroutine takes a third of a small kernel's registers.
        return total * (1.0 / width)
    else:
        return tl.div_rn(total, width * 1.0)


@triton.jit
def part_of_row(width, PART: tl.constexpr):
    """The row, the number of the part and its columns, where rows are cut into parts and each has a program."""
    parts = tl.cdiv(width, PART)
    part = tl.program_id(0) % parts
    return tl.program_id(0) // parts, part, part * PART + tl.arange(0, PART)
