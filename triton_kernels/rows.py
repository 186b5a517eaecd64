"""How a tensor is cut into rows, and rows into programs: by the length of a row alone, never by how many there are.

Triton lays the elements of a row over threads by what it knows of their alignment, and a reduction follows that
layout. So alignment follows from the row's length too: rows of a multiple of 8 elements begin at multiples of 8
elements and of 16 bytes, and are copied where they do not; of other rows nothing is known.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import check_device

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# The longest row that one program holds in registers.
WIDEST = 32768


@dataclass(frozen=True)
class RowTile:
    """What one program takes: ``rows`` rows of up to ``columns`` elements, on ``warps`` warps."""

    rows: int
    columns: int
    warps: int


def row_tile(width: int) -> RowTile:
    """The tile for rows of ``width`` elements: 16 elements a thread, 32 where a row is long."""
    columns = triton.next_power_of_2(width)
    if columns <= 2048:
        return RowTile(2048 // columns, columns, 4)
    return RowTile(1, columns, min(columns // 512, 16 if columns <= 16384 else 32))


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
