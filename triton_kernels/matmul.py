"""Matrix product whose order of additions follows (N, K) alone, at the fastest tile for each M."""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .launch import capability, check_device, programmatic_launch
from .tiles import Tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What a grid takes along its second axis.
_MOST_BATCHES = 65535


@triton.jit
def _prefetch(address):
    """Ask for the cache line at ``address`` without reading it: whoever writes it meanwhile is still seen."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_x(x, row, column, M, K, stride_m, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        tile = x.load([row, column])
    else:
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_K)
        mask = (rows[:, None] < M) & (columns[None, :] < K)
        tile = tl.load(x + rows[:, None].to(tl.int64) * stride_m + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _load_w(
    w, row, column, N, K, stride_n, stride_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, K_MAJOR: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, BLOCK_K]`` of the weight, whichever of its dimensions is contiguous."""
    if TMA:
        if K_MAJOR:
            tile = w.load([row, column])
        else:
            tile = w.load([column, row]).T
    else:
        rows, columns = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_K)
        mask = (rows[:, None] < N) & (columns[None, :] < K)
        offsets = rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_k
        tile = tl.load(w + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def _dot(x, w, accumulator, SWAPPED: tl.constexpr):
    if SWAPPED:
        accumulator = tl.dot(w, x.T, accumulator, input_precision="ieee")
    else:
        accumulator = tl.dot(x, w.T, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr):
    if SWAPPED:
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return zeros


@triton.jit
def _store(
    result, out_ptr, out_desc, bias_ptr, m, n, M, N, out_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    TMA_STORE: tl.constexpr,
):  # fmt: skip
    if SWAPPED:
        result = result.T
    columns = n + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if TMA_STORE:
        out_desc.store([m, n], result.to(out_desc.dtype))
    else:
        rows = m + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        offsets = rows[:, None].to(tl.int64) * out_stride_m + columns[None, :]
        tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x, w, w_side, bias_ptr, out_ptr, out_desc, w_ptr,
    M, N, K, segment_k,
    x_stride_m, w_stride_n, w_stride_k, out_stride_m,
    x_stride_batch, w_stride_batch, out_stride_batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIDE_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SEGMENTS: tl.constexpr, SWAPPED: tl.constexpr, PERSISTENT: tl.constexpr, SPLIT: tl.constexpr,
    BATCHED: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr, K_MAJOR: tl.constexpr, HAS_BIAS: tl.constexpr,
    PREFETCH_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N + SIDE_N
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH)
    tiles_mn = tiles_m * tiles_n
    if PDL:
        if PREFETCH_K > 0:
            # With few rows there is one row of tiles, so that the first tile's weights are known at once.
            ahead_n = tl.program_id(0) // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            ahead_k = tl.arange(0, PREFETCH_K // 64) * 64
            address = w_ptr + tl.minimum(ahead_n, N - 1)[:, None].to(tl.int64) * w_stride_n + ahead_k[None, :]
            _prefetch(address.to(tl.int64))
        gdc_wait()
        gdc_launch_dependents()
    if BATCHED:
        batch = tl.program_id(1).to(tl.int64)
        x += batch * x_stride_batch
        w += batch * w_stride_batch
        out_ptr += batch * out_stride_batch
    last = tiles_mn * SEGMENTS if SPLIT else tiles_mn
    step = tl.num_programs(0) if PERSISTENT else last
    for number in tl.range(tl.program_id(0), last, step, flatten=PERSISTENT and (SPLIT or SEGMENTS == 1)):
        segment = number // tiles_mn
        in_segment = number % tiles_mn
        # Programs that run together share rows of x and of w: groups of GROUP_M tiles of M go through all of N.
        group = in_segment // (GROUP_M * tiles_n)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + (in_segment % (GROUP_M * tiles_n)) % group_m) * BLOCK_M
        n = ((in_segment % (GROUP_M * tiles_n)) // group_m) * WIDTH
        total = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
        if SIDE_N > 0:
            side_total = _zeros(BLOCK_M, SIDE_N, SWAPPED)
        for walked in tl.static_range(1 if SPLIT else SEGMENTS):
            start = (segment + walked) * segment_k
            accumulator = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
            if SIDE_N > 0:
                side = _zeros(BLOCK_M, SIDE_N, SWAPPED)
            for k in range(start, tl.minimum(start + segment_k, K), BLOCK_K):
                x_tile = _load_x(x, m, k, M, K, x_stride_m, BLOCK_M, BLOCK_K, TMA)
                w_tile = _load_w(w, n, k, N, K, w_stride_n, w_stride_k, BLOCK_N, BLOCK_K, TMA, K_MAJOR)
                accumulator = _dot(x_tile, w_tile, accumulator, SWAPPED)
                if SIDE_N > 0:
                    w_tile = _load_w(
                        w_side, n + BLOCK_N, k, N, K, w_stride_n, w_stride_k, SIDE_N, BLOCK_K, TMA, K_MAJOR
                    )
                    side = _dot(x_tile, w_tile, side, SWAPPED)
            if SPLIT or SEGMENTS == 1:
                total = accumulator
            else:
                total += accumulator
            if SIDE_N > 0:
                if SPLIT or SEGMENTS == 1:
                    side_total = side
                else:
                    side_total += side
        if SPLIT:
            result_ptr = out_ptr + segment.to(tl.int64) * M * N
        else:
            result_ptr = out_ptr
        _store(total, result_ptr, out_desc, bias_ptr, m, n, M, N, out_stride_m,
               BLOCK_M, BLOCK_N, SWAPPED, HAS_BIAS, TMA_STORE)  # fmt: skip
        if SIDE_N > 0:
            _store(side_total, result_ptr, None, bias_ptr, m, n + BLOCK_N, M, N, out_stride_m,
                   BLOCK_M, SIDE_N, SWAPPED, HAS_BIAS, False)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _fold_kernel(
    partial_ptr, bias_ptr, out_ptr, M, N, out_stride_m,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the segments' partial results in ascending order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        total += tl.load(partial_ptr + (segment * M.to(tl.int64) + row) * N + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride_m + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
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
        tile: None takes it from the table by (N, K) and the number of rows.
        segments: None takes ``tiles.segments(N, K)``. Another number is another bit class.
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
    segments = tiles.segments(n, k) if segments is None else segments
    if segments < 1:
        raise ValueError(f"segments is {segments}; K is cut into at least 1 part")
    if out.numel():
        tile = _plan(x.dtype, capability(x.device), n, k).tile(m) if tile is None else tile
        _launch(rows[None], w[None], bias, out[None], tile, segments)
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
        tile = _plan(a.dtype, capability(a.device), n, k).tile(m) if tile is None else tile
        for part in (slice(start, start + _MOST_BATCHES) for start in range(0, batch, _MOST_BATCHES)):
            _launch(a[part], b[part].transpose(1, 2), None, out[part], tile, tiles.segments(n, k))
    return out


@functools.cache
def _plan(dtype: torch.dtype, capability: tuple[int, int], n: int, k: int) -> tiles.TilePlan:
    return tiles.tile_plan(dtype, capability, n, k)


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
    split = tile.split and segments > 1
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
    _matmul_kernel[(min(programs, _multiprocessors(x.device)) if tile.persistent else programs, batch)](
        x_operand, w_operand, w_side, None if split else bias, out if partial is None else partial,
        TensorDescriptor.from_tensor(out[0], [tile.block_m, tile.block_n]) if tma_store else None, w,
        m, n, k, segment_k,
        x.stride(1) if m > 1 else k, w.stride(1), w.stride(2), n if split else out.stride(1),
        *((x.stride(0), w.stride(0), out.stride(0)) if batch > 1 else (0, 0, 0)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SIDE_N=tile.side_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        SEGMENTS=segments, SWAPPED=tile.swapped, PERSISTENT=tile.persistent, SPLIT=split,
        BATCHED=batch > 1, TMA=tma, TMA_STORE=tma_store, K_MAJOR=k_major,
        HAS_BIAS=bias is not None and not split,
        PREFETCH_K=tile.prefetch_k if k_major and tile.prefetch_k <= k else 0, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
    )  # fmt: skip
    if partial is not None:
        block = 1024
        _fold_kernel[(m, triton.cdiv(n, block))](
            partial, bias, out, m, n, out.stride(1),
            SEGMENTS=segments, BLOCK=block, HAS_BIAS=bias is not None, PDL=pdl, launch_pdl=pdl,
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
    return max(1, triton.cdiv(triton.cdiv(k, segments), tiles.SEGMENT_MULTIPLE)) * tiles.SEGMENT_MULTIPLE


def _allows_tma(x: torch.Tensor) -> bool:
    """Whether a matrix may be read by tensor descriptor: its base and rows are aligned to 16 bytes, none overlap."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1]
    return aligned and x.stride(1) == 1 and x.numel() > 0 and capability(x.device)[0] in (0, 9, 10, 12)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
