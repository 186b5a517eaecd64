"""The kernel of ``attention_hopper.py``, in Gluon: one warp loads key tiles, warpgroups of 64 rows each fold them.

A ring of ``stages`` tiles of keys and of values lies between the loading warp and the consumers. Each stage has three
mbarriers: one for keys and one for values that have landed, and ``empty``, that every consumer has read both. The
consumers share the tiles and are else independent, so that one's products run under another's softmax. The folded state
stays in registers: in shared memory, reading and writing it took bandwidth from the products.

Invariant: the bytes are those of ``attention_kernel``, whose steps ``_softmax``, ``_fold`` and ``_finish`` repeat.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_fold import LOG2E, column_sums, finite, raised, row_sums, split_range
from .attention_kernel import request_of
from .rows import begin

# Rows of a warpgroup, which a consumer is.
WARPGROUP_ROWS = gl.constexpr(64)


@gluon.constexpr_function
def _assembly(count):
    """What scales ``count`` elements of a thread, of two rows in turn by pairs, by those that follow them."""
    products = (f"mul.rn.f32 ${i}, ${i}, ${2 * count + i // 2 % 2 * 2};" for i in range(count))
    return f"""{{
    .reg .pred p, other;
    setp.neu.f32 p, ${2 * count}, 0f3F800000;
    setp.neu.f32 other, ${2 * count + 2}, 0f3F800000;
    or.pred p, p, other;
    vote.sync.any.pred p, p, 0xffffffff;
    @!p bra.uni same;
    {" ".join(products)}
same:
    }}"""


@gluon.constexpr_function
def _operands(count):
    """Their constraints: each product in the register of its element."""
    return ",".join([*["=f"] * count, *map(str, range(count)), *["f"] * count])


@gluon.jit
def _load_tiles(
    keys, values, empty, k_desc, v_desc, table_ptr, block, k_at, v_at, start, stop, BLOCK_SIZE: gl.constexpr
):
    STAGES: gl.constexpr = empty.shape[0]
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    for n in range(start, stop, BLOCK_N):
        number = (n - start) // BLOCK_N
        next_block = gl.load(table_ptr + (n + BLOCK_N) // BLOCK_SIZE, mask=n + BLOCK_N < stop, other=0)
        # The phase before the first one counts as complete: the first round of the ring waits for nobody.
        mbarrier.wait(empty.index(number % STAGES), (number // STAGES + 1) % 2)
        _load_tile(keys, number, k_desc, k_at, block, n % BLOCK_SIZE)
        _load_tile(values, number, v_desc, v_at, block, n % BLOCK_SIZE)
        block = next_block


@gluon.jit
def _load_tile(ring, number, descriptor, at, block, slot):
    tiles, full = ring
    rows_block, row, column = at
    BYTES: gl.constexpr = tiles.shape[1] * tiles.shape[2] * 2
    stage = number % tiles.shape[0]
    mbarrier.expect(full.index(stage), BYTES)
    coordinates = [block * rows_block + row + slot, column]
    tma.async_copy_global_to_shared(descriptor, coordinates, full.index(stage), tiles.index(stage))


@gluon.jit
def _tile_of(ring, number):
    """A tile that has landed, by its number."""
    return ring[0].index(number % ring[0].shape[0])


@gluon.jit
def _wait_for(ring, number):
    """Wait until a tile has landed."""
    tiles, full = ring
    STAGES: gl.constexpr = tiles.shape[0]
    mbarrier.wait(full.index(number % STAGES), number // STAGES % 2)


@gluon.jit
def _release(empty, number):
    # One thread speaks for all warps: each has read the tile, and seen this round of its barriers.
    gl.thread_barrier()
    mbarrier.arrive(empty.index(number % empty.shape[0]), count=1)


@gluon.jit
def _products_of_keys(q, keys, number):
    """The scores of one tile, still under way; it must have landed."""
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    nothing = gl.zeros([WARPGROUP_ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, _tile_of(keys, number).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _products_of_values(weights, acc, values, number):
    """``acc`` with one tile added, still under way; it must have landed."""
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(weights, _tile_of(values, number), acc, is_async=True)


@gluon.jit
def _clear(values, number, n, held):
    """Zeros for values from position ``held`` on: such a slot may hold NaN, which a weight of zero would not hide.

    Every consumer does so before it reads the tile; where two do at once both write the same.
    """
    BLOCK_N: gl.constexpr = values[0].shape[1]
    D: gl.constexpr = values[0].shape[2]
    ROWS: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    if n + BLOCK_N > held:
        tile = _tile_of(values, number)
        for i in gl.static_range(BLOCK_N // ROWS):
            part = tile.slice(i * ROWS, ROWS)
            x = part.load(layout)
            key = n + i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            part.store(gl.where((key < held)[:, None], x, gl.zeros_like(x)))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _softmax(s, m, n, q_position, factor, window, dtype: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """The reference after one tile, the tile's weights and their sums, and what all before it are scaled by."""
    if MASKED:
        key = n + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        visible = key[None, :] <= q_position[:, None]
        if WINDOW:
            visible &= key[None, :] > q_position[:, None] - window
        s = gl.where(visible, s, float("-inf"))
    m_next = raised(m, gl.max(s, axis=1) * factor)
    shift = finite(m_next)
    weights = gl.exp2(gl.fma(s, factor, -shift[:, None]))
    return m_next, weights.to(dtype), column_sums(weights), gl.exp2(m - shift)


@gluon.jit
def _column(x, like):
    """``x``, a number for each row, as a column beside ``like``."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _scaled(x, a):
    """``x * a``. A warp all of whose rows have the factor 1 leaves its part as it is: most of the time."""
    OF_A_THREAD: gl.constexpr = x.shape[1] // 2
    ASSEMBLY: gl.constexpr = _assembly(OF_A_THREAD)
    OPERANDS: gl.constexpr = _operands(OF_A_THREAD)
    return gl.inline_asm_elementwise(ASSEMBLY, OPERANDS, [x, _column(a, x)], gl.float32, True, OF_A_THREAD)


@gluon.jit
def _row_sums(total, like):
    """The sum of each row's classes, a number for each row as ``like`` has them."""
    return gl.convert_layout(gl.max(row_sums(total), axis=1), like.type.layout)


@gluon.jit
def _fold(folded, m, total, acc):
    """Merge a split's state, the later one, into the folded state."""
    m_fold, total_fold, acc_fold = folded
    m_both = gl.maximum(m_fold, m)
    shift = finite(m_both)
    a, b = gl.exp2(m_fold - shift), gl.exp2(m - shift)
    total_both = gl.fma(total_fold, a, _row_sums(total, m) * b)
    return m_both, total_both, gl.fma(acc_fold, _column(a, acc), acc * _column(b, acc))


@gluon.jit
def _tile(
    state, folded, n, start, q, q_position, keys, values, empty, parameters,
    SPLIT: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One more key tile, whose weights are left for the next one: their products run under its softmax."""
    m, total, acc, weights = state
    factor, window = parameters
    number = (n - start) // keys[0].shape[1]
    _wait_for(keys, number)
    s = _products_of_keys(q, keys, number)
    acc = _products_of_values(weights, acc, values, number - 1)
    s, acc = warpgroup_mma_wait(num_outstanding=1, deps=(s, acc))
    begins = n % SPLIT == 0
    m_before = gl.where(begins, float("-inf"), m)
    m_next, weights, sums, a = _softmax(s, m_before, n, q_position, factor, window, q.dtype, WINDOW, MASKED)
    # The next step needs this tile's values. The wait stands here, and the weights are among what it returns, to keep
    # the compiler from moving the exponentials into that step, between its products (6% slower).
    _wait_for(values, number)
    weights, sums, acc = warpgroup_mma_wait(num_outstanding=0, deps=(weights, sums, acc))
    _release(empty, number - 1)
    if begins:
        # The split before ends here; what is left of it is then scaled by exp2(-inf).
        folded = _fold(folded, m, total, acc)
    total = gl.fma(total, _column(a, total), sums)
    return (m_next, total, _scaled(acc, a), weights), folded


@gluon.jit
def _attend(data, CONSUMER: gl.constexpr, WAY: gl.constexpr):
    keys, values, empty, pointers, strides, place, factor, window = data
    q_ptr, sinks_ptr, out_ptr = pointers
    q_stride_token, q_stride_head, out_stride_token, out_stride_head = strides
    tile_row, rows, query_start, context, held, kv_head, start, tile_stop, too_long = place
    G: gl.constexpr = WAY[0]
    SPLIT: gl.constexpr = WAY[1]
    SINKS: gl.constexpr = WAY[2]
    WINDOW: gl.constexpr = WAY[3]
    ROWS: gl.constexpr = WARPGROUP_ROWS
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    D: gl.constexpr = keys[0].shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    # Global memory is read and written 16 bytes a thread.
    memory_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    first_row = tile_row + CONSUMER * ROWS

    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, memory_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, memory_layout))
    q_row = (query_start + row // G).to(gl.int64) * q_stride_token + (kv_head * G + row % G) * q_stride_head
    q = gl.load(q_ptr + q_row[:, None] + column[None, :], mask=(row < rows)[:, None], other=0.0)
    q = gl.convert_layout(q, q_layout)

    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    # A row past the request's last is at position -1, which sees nothing.
    q_position = gl.where(row < rows, context + row // G, -1)
    first_position = context + first_row // G
    last_position = context + (gl.minimum(first_row + ROWS, rows) - 1) // G
    stop, full_start = gl.maximum(last_position, start) + 1, start
    full_stop = (first_position + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        full_start = gl.cdiv(gl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
    if first_row >= rows:
        # No row is this consumer's.
        stop, full_start, full_stop = start + 1, start, start

    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([ROWS, D], gl.float32, acc_layout)
    folded = m, gl.zeros_like(m), acc
    _wait_for(keys, 0)
    s = _products_of_keys(q, keys, 0)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    m, weights, total, _ = _softmax(s, m, start, q_position, factor, window, q.dtype, WINDOW, True)
    _wait_for(values, 0)
    begin = start + BLOCK_N
    state = m, total, acc, weights
    for part in gl.static_range(0 if WINDOW else 1, 3):
        # Masked tiles at the lower end, full ones, masked ones at the upper end.
        if part == 0:
            begin_part, end_part = begin, gl.minimum(full_start, stop)
        elif part == 1:
            begin_part, end_part = gl.maximum(full_start, begin), full_stop
        else:
            begin_part, end_part = gl.maximum(gl.maximum(full_start, full_stop), begin), stop
        for n in range(begin_part, end_part, BLOCK_N):
            state, folded = _tile(
                state, folded, n, start, q, q_position, keys, values, empty, (factor, window), SPLIT, WINDOW, part != 1,
            )  # fmt: skip
    m, total, acc, weights = state
    last = (stop - 1 - start) // BLOCK_N
    _clear(values, last, start + last * BLOCK_N, held)
    acc = _products_of_values(weights, acc, values, last)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    _release(empty, last)
    m, total, acc = _fold(folded, m, total, acc)

    # Tiles that only consumers of later rows see.
    for number in range(gl.cdiv(stop - start, BLOCK_N), gl.cdiv(tile_stop - start, BLOCK_N)):
        _skip(keys, values, empty, number)

    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
    head = kv_head * G + row % G
    m = gl.convert_layout(m, gl.SliceLayout(1, acc_layout))
    total = gl.convert_layout(total, gl.SliceLayout(1, acc_layout))
    out = _finish(m, total, acc, sinks_ptr, head, SINKS)
    # Longer than was promised: the table need not hold it.
    out = gl.where(too_long, float("nan"), out)
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), memory_layout)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, memory_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, memory_layout))
    out_row = (query_start + row // G).to(gl.int64) * out_stride_token + (kv_head * G + row % G) * out_stride_head
    gl.store(out_ptr + out_row[:, None] + column[None, :], out, mask=(row < rows)[:, None])


@gluon.jit
def _skip(keys, values, empty, number):
    _wait_for(keys, number)
    _wait_for(values, number)
    _release(empty, number)


@gluon.jit
def _finish(m, total, acc, sinks_ptr, head, SINKS: gl.constexpr):
    if SINKS:
        sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
        m_both = gl.maximum(m, sink)
        shift = finite(m_both)
        a, b = gl.exp2(m - shift), gl.exp2(sink - shift)
        total, acc = gl.fma(total, a, b), gl.fma(acc, a[:, None], gl.zeros_like(acc) * b[:, None])
    # Zero is added so that a sum has one zero, whatever masked values it passed.
    return gl.where((total == 0.0)[:, None], 0.0, (acc + 0.0) / total[:, None])


@gluon.jit(do_not_specialize=["requests", "decodes", "tiles", "short_rows", "max_seq_len", "table_stride", "window"])
def attention_hopper_kernel(
    q_ptr, k_desc, v_desc, table_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, out_ptr,
    requests, decodes, tiles, short_rows, max_seq_len, factor, window,
    q_stride_token, q_stride_head, out_stride_token, out_stride_head, table_stride,
    k_rows_block, k_rows_head, k_columns_head, v_rows_block, v_rows_head, v_columns_head,
    KV_HEADS: gl.constexpr, G: gl.constexpr, BLOCK_SIZE: gl.constexpr, SPLIT: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, WINDOW: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One tile of a request's rows, as the long road of ``attention_kernel`` has it, dealt to ``CONSUMERS``."""
    begin(PDL)
    BLOCK_M: gl.constexpr = CONSUMERS * WARPGROUP_ROWS
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    kv_head, number = gl.program_id(0) % KV_HEADS, gl.program_id(0) // KV_HEADS
    request, tile = request_of(tiles - 1 - number, query_start_ptr, requests, G, BLOCK_M, decodes)
    query_start = gl.load(query_start_ptr + request)
    query_len = gl.load(query_start_ptr + request + 1) - query_start
    seq_len = gl.load(seq_lens_ptr + request)
    rows = query_len * G
    tile_row = tile * BLOCK_M
    if rows <= short_rows or tile_row >= rows:
        return
    held = gl.minimum(seq_len, max_seq_len)
    context = held - query_len
    first_position = context + tile_row // G
    last_position = context + (gl.minimum(tile_row + BLOCK_M, rows) - 1) // G
    first, _, _ = split_range(first_position, last_position, window, SPLIT, WINDOW)
    start = first // BLOCK_N * BLOCK_N
    # Every consumer takes at least one tile, though a request longer than was promised may leave it none to see.
    stop = gl.maximum(last_position, start) + 1
    table_ptr += request.to(gl.int64) * table_stride
    block = gl.load(table_ptr + start // BLOCK_SIZE)

    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()

    # Without the annotation Gluon would turn the numbers into run-time values.
    WAY: gl.constexpr = (G, SPLIT, SINKS, WINDOW)
    keys, values = (k_ring, k_full), (v_ring, v_full)
    pointers = (q_ptr, sinks_ptr, out_ptr)
    strides = (q_stride_token, q_stride_head, out_stride_token, out_stride_head)
    place = (tile_row, rows, query_start, context, held, kv_head, start, stop, seq_len > max_seq_len)
    data = (keys, values, empty, pointers, strides, place, factor, window)
    k_at = (k_rows_block, kv_head * k_rows_head, kv_head * k_columns_head)
    v_at = (v_rows_block, kv_head * v_rows_head, kv_head * v_columns_head)
    loading = (keys, values, empty, k_desc, v_desc, table_ptr, block, k_at, v_at, start, stop, BLOCK_SIZE)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_attend, (data, 0, WAY)), (_attend, (data, 1, WAY)), (_load_tiles, loading)],
            [4, 1],
            [REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [(_attend, (data, 0, WAY)), (_attend, (data, 1, WAY)), (_attend, (data, 2, WAY)), (_load_tiles, loading)],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOAD_REGISTERS],
        )
