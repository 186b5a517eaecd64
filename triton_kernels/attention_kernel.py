"""The kernels of attention over a paged KV cache; ``attention.py`` launches them and states their invariant."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_fold import (
    CLASSES,
    LOG2E,
    column_sums,
    empty,
    finish,
    finite,
    in_classes,
    merge,
    raised,
    row_sums,
    split_range,
)
from .rows import begin


@triton.jit
def _scores(
    s, head, q_position, key, parameters,
    HEADS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    """Scores as the model defines them, where they are more than the scaled products."""
    _, scale, softcap, _, slopes_ptr, data_ptr = parameters
    s *= scale
    if SOFTCAP:
        # The form of tanh that saturates for either sign.
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / softcap)) + 1.0))
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=head < HEADS, other=0.0).to(tl.float32)
        s += slope[:, None] * (key[None, :] - q_position[:, None]).to(tl.float32)
    if SCORE_MOD is not None:
        s = SCORE_MOD(s, head[:, None], q_position[:, None], key[None, :], data_ptr)
    return s


@triton.jit
def _load_tile(
    cache, n, block, inside, D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, DP]`` of one head from position ``n`` on; zeros for D to DP and, if MASKED, for keys not inside.

    A slot that holds no key may hold NaN, which a weight of zero would not hide.
    """
    pointer, descriptor, stride_block, stride_slot, rows_block, row, column = cache
    if DESCRIPTORS:
        tile = descriptor.load([block * rows_block + row + n % BLOCK_SIZE, column])
    else:
        d, slot = tl.arange(0, DP), (n + tl.arange(0, BLOCK_N)) % BLOCK_SIZE
        pointers = pointer + (block.to(tl.int64) * stride_block + slot * stride_slot)[:, None] + d[None, :]
        if MASKED and D != DP:
            tile = tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        elif MASKED:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
        elif D != DP:
            tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _key_tile(
    m, total, acc, n, query, keys, k, v, parameters,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SCORE_MOD: tl.constexpr, MASK_MOD: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The state after ``BLOCK_N`` more keys from position ``n`` on."""
    q, head, q_position = query
    first, stop, table_ptr = keys
    factor, _, _, window, _, data_ptr = parameters
    key = n + tl.arange(0, BLOCK_N)
    inside = (key >= first) & (key < stop)
    if DESCRIPTORS or BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table_ptr + n // BLOCK_SIZE)
    elif MASKED:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=inside, other=0)
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE)
    k_tile = _load_tile(k, n, block, inside, D, DP, BLOCK_SIZE, BLOCK_N, MASKED, DESCRIPTORS)
    s = tl.dot(q, k_tile.T, input_precision="ieee")
    if SOFTCAP or ALIBI or SCORE_MOD is not None:
        s = _scores(s, head, q_position, key, parameters, HEADS, SOFTCAP, ALIBI, SCORE_MOD)
    if MASKED:
        visible = key[None, :] <= q_position[:, None]
        if WINDOW:
            visible &= key[None, :] > q_position[:, None] - window
        if MASK_MOD is not None:
            visible &= MASK_MOD(head[:, None], q_position[:, None], key[None, :], data_ptr)
        s = tl.where(visible, s, float("-inf"))
    m_next = raised(m, tl.max(s, axis=1) * factor)
    shift = finite(m_next)
    weights = tl.exp2(tl.fma(s, factor, -shift[:, None]))
    a = tl.exp2(m - shift)[:, None]
    total = tl.fma(total, in_classes(a, weights), column_sums(weights))
    v_tile = _load_tile(v, n, block, inside, D, DP, BLOCK_SIZE, BLOCK_N, MASKED, DESCRIPTORS)
    return m_next, total, tl.dot(weights.to(q.dtype), v_tile, acc * a, input_precision="ieee")


@triton.jit
def _store_state(partial, split, m, total, acc, D: tl.constexpr):
    """Keep the state of a split for the folding kernel."""
    partial_ptr, partial_m_ptr, partial_total_ptr, first_split, short_rows, row, d, valid, mask = partial
    offset = (split - first_split) * short_rows + row
    tl.store(partial_m_ptr + offset, m, mask=valid)
    tl.store(partial_total_ptr + offset, tl.max(row_sums(total), axis=1), mask=valid)
    tl.store(partial_ptr + offset[:, None] * D + d[None, :], acc, mask=mask)


@triton.jit
def _walk(
    start, full_start, full_stop, stop, query, keys, k, v, parameters, partial,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr, WINDOW: tl.constexpr, ALL_MASKED: tl.constexpr, PARTIALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The folded state over key tiles from ``start`` to before ``stop``, in ascending order.

    A split begins from a fresh state and is merged where it ends or, with PARTIALS, stored. Masks are left out between
    ``full_start`` and ``full_stop``, where every row sees every key, unless ALL_MASKED.
    """
    m, total, acc = empty(BLOCK_M, min(BLOCK_N // 2, CLASSES), DP)
    if not PARTIALS:
        m_fold, total_fold, acc_fold = empty(BLOCK_M, 1, DP)
    for part in tl.static_range(2 if ALL_MASKED else 0, 3):
        # Masked tiles at the lower end, full ones, masked ones at the upper end.
        if part == 0:
            begin_part, end_part = start, tl.minimum(full_start, stop)
        elif part == 1:
            begin_part, end_part = full_start, full_stop
        else:
            begin_part, end_part = start if ALL_MASKED else tl.maximum(full_start, full_stop), stop
        if part > 0 or WINDOW:
            for n in tl.range(begin_part, end_part, BLOCK_N, num_stages=STAGES if ALL_MASKED or part == 1 else 1):
                m, total, acc = _key_tile(
                    m, total, acc, n, query, keys, k, v, parameters, HEADS, D, DP, BLOCK_SIZE, BLOCK_N, SOFTCAP, ALIBI,
                    SCORE_MOD, MASK_MOD, WINDOW, part != 1, DESCRIPTORS and part == 1,
                )  # fmt: skip
                if (n + BLOCK_N) % SPLIT == 0:
                    if PARTIALS:
                        _store_state(partial, n // SPLIT, m, total, acc, D)
                    else:
                        m_fold, total_fold, acc_fold = merge(m_fold, total_fold, acc_fold, m, row_sums(total), acc)
                    # The next tile scales what is left by exp2(-inf), and so begins from zeros.
                    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if PARTIALS:
        if tl.cdiv(stop, BLOCK_N) * BLOCK_N % SPLIT != 0:
            _store_state(partial, stop // SPLIT, m, total, acc, D)
    else:
        m, total, acc = merge(m_fold, total_fold, acc_fold, m, row_sums(total), acc)
    return m, total, acc


@triton.jit
def splits_of_a_part(count, tiles, parts, least, at_once):
    """How many of a row's ``count`` splits a part takes; all of them where no other part has any.

    Fewer than ``least`` where ``tiles`` tiles of as many splits would leave some of ``at_once`` programs without work.
    """
    least = tl.minimum(least, tl.cdiv(count * tiles, at_once))
    return tl.minimum(tl.maximum(tl.cdiv(count, parts), least), count)


@triton.jit
def request_of(tile, query_start_ptr, requests, G: tl.constexpr, BLOCK_M: tl.constexpr, decodes=0):
    """The request that a tile belongs to, and the tile's number in it.

    Request r has the tiles from ``query_start[r] * G // BLOCK_M + r`` on: as many as it needs, and at most one more.
    Those of the first ``decodes`` requests, of one token each, are left out.
    """
    tile += decodes * G // BLOCK_M + decodes
    low, high = decodes, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) * G // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(query_start_ptr + low) * G // BLOCK_M + low)


@triton.jit
def _forget_what_is_cached():
    """In place of a wait: what a multiprocessor's own cache holds may be older than what another kernel waited for."""
    tl.inline_asm_elementwise("fence.acq_rel.gpu; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


# What follows the batch: a kernel compiled anew for it would be a spike of latency.
_OF_THE_BATCH = (
    "requests", "decodes", "beside_long", "tiles", "parts", "least", "at_once", "slots", "short_rows", "max_seq_len",
    "table_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=[*_OF_THE_BATCH, "window"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, table_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, slopes_ptr, data_ptr,
    out_ptr, partial_ptr, partial_m_ptr, partial_total_ptr,
    requests, decodes, beside_long, tiles, parts, least, at_once, slots, short_rows, max_seq_len,
    factor, scale, softcap, window,
    q_stride_token, q_stride_head, out_stride_token, out_stride_head, table_stride,
    k_stride_block, k_stride_slot, k_stride_head, v_stride_block, v_stride_slot, v_stride_head,
    k_rows_block, k_rows_head, k_columns_head, v_rows_block, v_rows_head, v_columns_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SCORE_MOD: tl.constexpr, MASK_MOD: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of a request's rows (token by token, the query heads of one KV head together) over the keys it sees.

    SHORT: requests of at most ``short_rows`` rows, ``tiles`` tiles each. A tile's splits are dealt to up to
    ``parts`` programs, at least ``least`` to each: one that takes all of them folds them here, others write a state
    for each split. Not SHORT: requests of more rows, the last of all ``tiles`` tiles first: they see the most keys.

    beside_long: the kernel ahead takes the long requests of the same batch. It is not waited for: it waited itself, in
    each program, before it let this one begin, and what it writes is not read here. One program more than have work
    ends when that kernel has, so that what follows this one follows both.
    """
    if PDL:
        if beside_long == 0:
            gdc_wait()
        else:
            _forget_what_is_cached()
        gdc_launch_dependents()
        if (beside_long != 0) & (tl.program_id(0) == tl.num_programs(0) - 1):
            gdc_wait()
            return
    HEADS: tl.constexpr = KV_HEADS * G
    kv_head, number = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    if SHORT:
        # First parts first: programs that find no work must not stand between those that do.
        tile = number % tiles
        request = number // tiles % requests
        part = number // tiles // requests
    else:
        part = 0
        request, tile = request_of(tiles - 1 - number, query_start_ptr, requests, G, BLOCK_M, decodes)
    query_start = tl.load(query_start_ptr + request)
    query_len = tl.load(query_start_ptr + request + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + request)
    rows = query_len * G
    if (rows > short_rows if SHORT else rows <= short_rows) or tile * BLOCK_M >= rows:
        return
    row, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DP)
    token, valid = row // G, row < rows
    # A row past the request's last is head HEADS at position -1, which sees nothing.
    head = tl.where(valid, kv_head * G + row % G, HEADS)
    context = tl.minimum(seq_len, max_seq_len) - query_len
    q_position = tl.where(valid, context + token, -1)
    first_position = context + tile * BLOCK_M // G
    last_position = context + (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // G
    q_row = (query_start + token).to(tl.int64)
    mask = valid[:, None] & (d < D)[None, :]
    q_offset = (q_row * q_stride_token + head * q_stride_head)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=mask, other=0.0)
    first, first_split, last_split = split_range(first_position, last_position, window, SPLIT, WINDOW)
    stop = last_position + 1
    k = (k_ptr + kv_head.to(tl.int64) * k_stride_head, k_desc, k_stride_block, k_stride_slot,
         k_rows_block, kv_head * k_rows_head, kv_head * k_columns_head)  # fmt: skip
    v = (v_ptr + kv_head.to(tl.int64) * v_stride_head, v_desc, v_stride_block, v_stride_slot,
         v_rows_block, kv_head * v_rows_head, kv_head * v_columns_head)  # fmt: skip
    query, keys = (q, head, q_position), (first, stop, table_ptr + tl.cast(request, tl.int64) * table_stride)
    parameters = (factor, scale, softcap, window, slopes_ptr, data_ptr)
    start = first // BLOCK_N * BLOCK_N
    if SHORT:
        # Splits in a row, so that loads run ahead from one to the next.
        count = last_split - first_split
        each = splits_of_a_part(count, requests * KV_HEADS * tiles, parts, least, at_once)
        start = tl.maximum(start, (first_split + part * each) * SPLIT)
        stop = tl.minimum(stop, (first_split + (part + 1) * each) * SPLIT)
        if start >= stop:
            return
        if each < count:
            held = (request * KV_HEADS + kv_head).to(tl.int64) * slots * short_rows
            partial = (partial_ptr + held * D, partial_m_ptr + held, partial_total_ptr + held,
                       first_split, short_rows, row, d, valid, mask)  # fmt: skip
            _walk(
                start, 0, 0, stop, query, keys, k, v, parameters, partial, HEADS, D, DP, BLOCK_SIZE, BLOCK_M, BLOCK_N,
                SPLIT, SOFTCAP, ALIBI, SCORE_MOD, MASK_MOD, WINDOW, True, True, DESCRIPTORS, STAGES,
            )  # fmt: skip
            return
    if WINDOW:
        full_start = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
    else:
        full_start = 0
    m, total, acc = _walk(
        start, full_start, (first_position + 1) // BLOCK_N * BLOCK_N, stop, query, keys, k, v, parameters, (),
        HEADS, D, DP, BLOCK_SIZE, BLOCK_M, BLOCK_N, SPLIT, SOFTCAP, ALIBI, SCORE_MOD, MASK_MOD, WINDOW,
        SHORT or MASK_MOD is not None, False, DESCRIPTORS, STAGES,
    )  # fmt: skip
    out = finish(m, total, acc, sinks_ptr, head, HEADS, SINKS)
    # Longer than was promised: the table need not hold it.
    out = tl.where(seq_len > max_seq_len, float("nan"), out)
    out_offset = (q_row * out_stride_token + head * out_stride_head)[:, None] + d[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_OF_THE_BATCH, "block_m", "rows_each", "window"])
def fold_kernel(
    partial_ptr, partial_m_ptr, partial_total_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, out_ptr,
    requests, parts, least, at_once, slots, short_rows, block_m, rows_each, max_seq_len, window,
    out_stride_token, out_stride_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr, SPLIT: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the states of splits in ascending order: ``rows_each`` rows one by one, COLUMNS columns of D.

    ``AT_ONCE`` states are read at a time. Lengths are read while the kernel ahead writes its states: it waited for what
    came before, in each program, before it let this one begin.
    """
    if PDL:
        _forget_what_is_cached()
    PARTS_OF_D: tl.constexpr = DP // COLUMNS
    d = tl.program_id(0) % PARTS_OF_D * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.program_id(0) // PARTS_OF_D
    kv_head, number = number % KV_HEADS, number // KV_HEADS
    programs = tl.cdiv(short_rows, rows_each)
    request, first_row = number // programs, number % programs * rows_each
    query_start = tl.load(query_start_ptr + request)
    query_len = tl.load(query_start_ptr + request + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + request)
    begin(PDL)
    rows = query_len * G
    if rows > short_rows:
        return
    context = tl.minimum(seq_len, max_seq_len) - query_len
    one = tl.arange(0, 1)
    for row in range(first_row, tl.minimum(first_row + rows_each, rows)):
        # The splits that the row's tile wrote.
        tile_row = row // block_m * block_m
        first_position = context + tile_row // G
        last_position = context + (tl.minimum(tile_row + block_m, rows) - 1) // G
        _, first_split, last_split = split_range(first_position, last_position, window, SPLIT, WINDOW)
        count = last_split - first_split
        tiles = requests * KV_HEADS * tl.cdiv(short_rows, block_m)
        # Else they were folded by the program that took them.
        if splits_of_a_part(count, tiles, parts, least, at_once) < count:
            m, total, acc = empty(1, 1, COLUMNS)
            offset = (request * KV_HEADS + kv_head).to(tl.int64) * slots * short_rows + row + one
            for slot in range(0, count, AT_ONCE):
                # All are asked for before one is used: else the compiler keeps few loads under way.
                states = ()
                for ahead in tl.static_range(AT_ONCE):
                    present = slot + ahead + one < count
                    at = offset + (slot + ahead) * short_rows
                    m_next = tl.load(partial_m_ptr + at, mask=present, other=float("-inf"))
                    total_next = tl.load(partial_total_ptr + at, mask=present, other=0.0)[:, None]
                    mask = present[:, None] & (d < D)[None, :]
                    acc_next = tl.load(partial_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)
                    states += ((m_next, total_next, acc_next),)
                for ahead in tl.static_range(AT_ONCE):
                    m, total, acc = merge(m, total, acc, states[ahead][0], states[ahead][1], states[ahead][2])
            head = kv_head * G + row % G + one
            out = finish(m, total, acc, sinks_ptr, head, KV_HEADS * G, SINKS)
            out = tl.where(seq_len > max_seq_len, float("nan"), out)
            out_row = (query_start + row // G).to(tl.int64) * out_stride_token + head * out_stride_head
            tl.store(out_ptr + out_row[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(d < D)[None, :])
