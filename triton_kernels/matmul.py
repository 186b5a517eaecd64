"""Matrix product whose order of additions follows (N, K) alone, at the fastest tile for each M."""

import functools
import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .cublaslt import Algorithm, allows, cublaslt
from .launch import capability, check_device, programmatic_launch
from .matmul_kernel import fold_kernel, matmul_kernel
from .tile_table import surveyed, tile_plan
from .tiles import SEGMENT_MULTIPLE, Tile, TilePlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What a grid takes along its second axis.
_MOST_BATCHES = 65535


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    plan: TilePlan | None = None,
    tile: Tile | Algorithm | None = None,
    segments: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w.T + bias`` with fp32 accumulation, the bias added in fp32, one rounding at the end.

    Invariant: for every output element K is folded in ascending order, in ``segments`` parts that are then added in
    ascending order; neither follows M, the tile or another row.

    Args:
        x: ``[..., K]``, bf16, fp16 or fp32 (fp32 products are IEEE, not TF32).
        w: ``[N, K]`` as vLLM keeps weights, any strides; contiguous along K or N is fastest. Same dtype as x.
        bias: ``[N]`` or None.
        plan: the tiles of this shape; None takes the table's.
        tile: None takes it from the plan by the number of rows. Given without a plan it takes all rows.
        segments: None takes the plan's. Another number is another bit class.
        out: ``[M, N]`` to write to, contiguous along N; only for x of two dimensions.

    Returns:
        ``[..., N]`` in ``x.dtype``.

    Raises:
        ValueError: names the tensor, its shape and what is allowed.
    """
    _check(x, w, bias)
    n, k = w.shape
    rows = x.reshape(math.prod(x.shape[:-1]), k) if x.dim() != 2 else x
    m = rows.shape[0]
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    elif out.shape != (m, n) or x.dim() != 2 or out.dtype != x.dtype or out.device != x.device or out.stride(1) != 1:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; "
            f"it must be {x.dtype} [{m}, {n}] on {x.device}, contiguous along N"
        )
    if segments is None:
        segments = plan.segments if plan else tiles.segments(n, k)
    if segments < 1:
        raise ValueError(f"segments is {segments}; K is cut into at least 1 part")
    if tile is None:
        plan = plan or _plan(x.dtype, x.device, n, k)
    elif isinstance(tile, Algorithm) and out.numel() and not _allows_library(rows, w, bias, out, segments):
        raise ValueError(
            f"{tile} of cuBLASLt cannot multiply x {tuple(x.shape)} and w {tuple(w.shape)} in {segments} segments: "
            "it takes bf16 and fp16 on CUDA without a bias, rows contiguous and aligned to 16 bytes, segments of "
            "one length; give a Tile"
        )
    _multiply(rows, w, bias, out, plan, tile, segments)
    return out.view(*x.shape[:-1], n)


def batched_matmul(a: torch.Tensor, b: torch.Tensor, *, tile: Tile | None = None) -> torch.Tensor:
    """``a @ b`` for each matrix of a batch; the invariant and the rounding are those of ``matmul``.

    Args:
        a: ``[B, M, K]``, bf16, fp16 or fp32.
        b: ``[B, K, N]``, any strides. Same dtype as a.
        tile: None takes it from the table.

    Returns:
        ``[B, M, N]`` in ``a.dtype``.

    Raises:
        ValueError: names the tensor, its shape and what is allowed.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a and b must be [B, M, K] and [B, K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    _check(a, b.transpose(1, 2)[0] if len(b) else b.new_empty(b.shape[2], b.shape[1]), None, names=("a", "b"))
    batch, m, k = a.shape
    n = b.shape[2]
    out = torch.empty(batch, m, n, dtype=a.dtype, device=a.device)
    if out.numel():
        plan = _plan(a.dtype, a.device, n, k)
        for part in (slice(start, start + _MOST_BATCHES) for start in range(0, batch, _MOST_BATCHES)):
            _launch(a[part], b[part].transpose(1, 2), None, out[part], tile or plan.tile(m), plan.segments)
    return out


@functools.cache
def _plan(dtype: torch.dtype, device: torch.device, n: int, k: int) -> TilePlan:
    """The plan of a product that nobody certified: with the library only where all of it was found in class."""
    library = cublaslt(device)
    if library and not surveyed(capability(device), library):
        library = None
    return tile_plan(dtype, capability(device), n, k, library)


def _check(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, names: tuple[str, str] = ("x", "w")) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{names[0]} is {x.dtype}; bfloat16, float16 and float32 are allowed")
    if x.dim() < 1 or w.dim() != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"{names[0]} {tuple(x.shape)} and {names[1]} {tuple(w.shape)} do not agree on K")
    for name, tensor in ((names[1], w), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but {names[0]} is {x.dtype} on {x.device}: "
                "they must agree"
            )
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{w.shape[0]}]")
    check_device(names[0], x)


def _multiply(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: TilePlan | None,
    tile: Tile | Algorithm | None,
    segments: int,
) -> None:
    """``out = x @ w.T + bias`` at the tile, or else at the plan's."""
    m, n = out.shape
    if not out.numel():
        return
    if tile is None:
        assert plan is not None
        tile = plan.algorithm(m)
        if tile is None or not _allows_library(x, w, bias, out, segments):
            tile = plan.tile(m)
    if isinstance(tile, Algorithm):
        _call_library(x, w, out, tile, segments)
        return
    first = tile.whole_wave_rows(m, n, _multiprocessors(x.device)) if plan else m
    if first == m:
        _launch(x[None], w[None], bias, out[None], tile, segments)
    else:
        _launch(x[None, :first], w[None], bias, out[None, :first], tile, segments)
        _multiply(x[first:], w, bias, out[first:], plan, None, segments)


def _launch(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tile: Tile, segments: int
) -> None:
    """``out[b] = x[b] @ w[b].T + bias`` for ``x`` ``[B, M, K]``, ``w`` ``[B, N, K]``, ``out`` ``[B, M, N]``."""
    batch, m, k = x.shape
    n = w.shape[1]
    if x.stride(2) != 1 and k > 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    segment_k = _segment_k(k, segments)
    segments = max(1, triton.cdiv(k, segment_k))
    split = tile.split and segments > 1 and batch == 1  # partial results have no room for a batch
    partial = x.new_empty(segments, m, n, dtype=torch.float32) if split else None
    k_major = w.stride(2) == 1 or k == 1
    tma = tile.tma and batch == 1 and _allows_tma(x[0]) and _allows_tma(w[0] if k_major else w[0].T)
    if tma:
        x_operand = TensorDescriptor.from_tensor(x[0], [tile.block_m, tile.block_k])
        w_operand, w_side = (
            _weight_descriptor(w[0], rows, tile.block_k, k_major) for rows in (tile.block_n, tile.side_n)
        )
    else:
        x_operand, w_operand, w_side = x, w, w
    tma_store = tma and tile.tma_store and not split and _allows_tma(out[0])
    programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n + tile.side_n) * (segments if split else 1)
    pdl = programmatic_launch(x)
    matmul_kernel[(min(programs, _multiprocessors(x.device)) if tile.persistent else programs, batch)](
        x_operand, w_operand, w_side, None if split else bias, out if partial is None else partial,
        TensorDescriptor.from_tensor(out[0], [tile.block_m, tile.block_n]) if tma_store else None, w,
        m, n, k, segment_k,
        x.stride(1) if m > 1 else k, w.stride(1), w.stride(2), n if split else out.stride(1),
        *((x.stride(0), w.stride(0), out.stride(0)) if batch > 1 else (0, 0, 0)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SIDE_N=tile.side_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        SEGMENTS=segments, SWAPPED=tile.swapped, PERSISTENT=tile.persistent, FLATTEN=tile.flatten, SPLIT=split,
        BATCHED=batch > 1, TMA=tma, TMA_STORE=tma_store, K_MAJOR=k_major,
        HAS_BIAS=bias is not None and not split,
        PREFETCH_K=tile.prefetch_k if k_major and tile.prefetch_k <= k else 0, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
    )  # fmt: skip
    if partial is not None:
        _fold(partial, bias, out[0])


def _call_library(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, algorithm: Algorithm, segments: int) -> None:
    """``out = x @ w.T`` by cuBLASLt."""
    library = cublaslt(x.device)
    assert library is not None
    if segments == 1:
        library.product(x, w, out, algorithm)
    else:
        partial = x.new_empty(segments, *out.shape, dtype=torch.float32)
        library.product(x, w, partial, algorithm)
        _fold(partial, None, out)


def _fold(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    segments, m, n = partial.shape
    rows, columns = 8 if m >= 512 else 4, 256
    pdl = programmatic_launch(partial)
    fold_kernel[(triton.cdiv(m, rows), triton.cdiv(n, columns))](
        partial, bias, out, m, n, out.stride(0),
        SEGMENTS=segments, ROWS=rows, COLUMNS=columns, HAS_BIAS=bias is not None, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip


def _weight_descriptor(w: torch.Tensor, rows: int, columns: int, k_major: bool) -> TensorDescriptor | None:
    if rows == 0:
        return None
    return (
        TensorDescriptor.from_tensor(w, [rows, columns])
        if k_major
        else TensorDescriptor.from_tensor(w.T, [columns, rows])
    )


def _segment_k(k: int, segments: int) -> int:
    """Columns of a segment: a multiple of every tile's BLOCK_K, so that no tile reaches across a boundary."""
    return max(1, triton.cdiv(triton.cdiv(k, segments), SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE


def _allows_library(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, segments: int
) -> bool:
    k = x.shape[1]
    equal_parts = segments == 1 or _segment_k(k, segments) * segments == k
    return bias is None and equal_parts and cublaslt(x.device) is not None and allows(x, w, out)


def _allows_tma(x: torch.Tensor) -> bool:
    """Whether a matrix may be read by tensor descriptor: its base and rows are aligned to 16 bytes, none overlap."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1]
    return aligned and x.stride(1) == 1 and x.numel() > 0 and capability(x.device)[0] in (0, 9, 10, 12)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
