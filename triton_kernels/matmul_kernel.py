"""The kernels of the matrix product; ``matmul.py`` launches them."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
def matmul_kernel(
    x, w, w_side, bias_ptr, out_ptr, out_desc, w_ptr,
    M, N, K, segment_k,
    x_stride_m, w_stride_n, w_stride_k, out_stride_m,
    x_stride_batch, w_stride_batch, out_stride_batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIDE_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SEGMENTS: tl.constexpr, SWAPPED: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr,
    SPLIT: tl.constexpr, BATCHED: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr, K_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, PREFETCH_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N + SIDE_N
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH)
    tiles_mn = tiles_m * tiles_n
    if PDL:
        if PREFETCH_K > 0:
            # With few rows there is one row of tiles, so that the first tile's weights are known at once.
            ahead_n = tl.program_id(0) // tiles_m % tiles_n * WIDTH + tl.arange(0, BLOCK_N)
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
    WALKED: tl.constexpr = 1 if SPLIT else SEGMENTS
    last = tiles_mn * SEGMENTS if SPLIT else tiles_mn
    step = tl.num_programs(0) if PERSISTENT else last
    own = tl.cdiv(last - tl.program_id(0), step)
    if WALKED > 1:
        total = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
        if SIDE_N > 0:
            side_total = _zeros(BLOCK_M, SIDE_N, SWAPPED)
    # Flattened, this loop and the one over K become one, in which loads run ahead from segment to segment and from tile
    # to tile. The compiler does so only where the inner bounds are the same each time: past K all loads are zeros.
    for part in tl.range(0, own * WALKED, flatten=FLATTEN):
        number = tl.program_id(0) + part // WALKED * step
        segment = number // tiles_mn if SPLIT else part % WALKED
        in_segment = number % tiles_mn
        # Programs that run together share rows of x and of w: groups of GROUP_M tiles of M go through all of N.
        group = in_segment // (GROUP_M * tiles_n)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + (in_segment % (GROUP_M * tiles_n)) % group_m) * BLOCK_M
        n = ((in_segment % (GROUP_M * tiles_n)) // group_m) * WIDTH
        accumulator = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
        if SIDE_N > 0:
            side = _zeros(BLOCK_M, SIDE_N, SWAPPED)
        for in_part in range(0, tl.minimum(segment_k, K), BLOCK_K):
            k = segment * segment_k + in_part
            x_tile = _load_x(x, m, k, M, K, x_stride_m, BLOCK_M, BLOCK_K, TMA)
            w_tile = _load_w(w, n, k, N, K, w_stride_n, w_stride_k, BLOCK_N, BLOCK_K, TMA, K_MAJOR)
            accumulator = _dot(x_tile, w_tile, accumulator, SWAPPED)
            if SIDE_N > 0:
                w_tile = _load_w(w_side, n + BLOCK_N, k, N, K, w_stride_n, w_stride_k, SIDE_N, BLOCK_K, TMA, K_MAJOR)
                side = _dot(x_tile, w_tile, side, SWAPPED)
        if WALKED > 1:
            total = tl.where(segment == 0, 0.0, total) + accumulator
            accumulator = total
            if SIDE_N > 0:
                side_total = tl.where(segment == 0, 0.0, side_total) + side
                side = side_total
        if WALKED == 1 or segment == WALKED - 1:
            if SPLIT:
                result_ptr = out_ptr + segment.to(tl.int64) * M * N
            else:
                result_ptr = out_ptr
            _store(accumulator, result_ptr, out_desc, bias_ptr, m, n, M, N, out_stride_m,
                   BLOCK_M, BLOCK_N, SWAPPED, HAS_BIAS, TMA_STORE)  # fmt: skip
            if SIDE_N > 0:
                _store(side, result_ptr, None, bias_ptr, m, n + BLOCK_N, M, N, out_stride_m,
                       BLOCK_M, SIDE_N, SWAPPED, HAS_BIAS, False)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def fold_kernel(
    partial_ptr, bias_ptr, out_ptr, M, N, out_stride_m,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the segments' partial results in ascending order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < M) & (columns < N)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        total += tl.load(partial_ptr + (segment * M.to(tl.int64) + rows) * N + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * out_stride_m + columns, total.to(out_ptr.dtype.element_ty), mask=mask)
