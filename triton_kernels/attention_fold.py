"""The state of a softmax over some keys, and how states are folded: what every road of attention shares.

A state is ``m`` ``[R]``, the reference that scores in units of log 2 are weighed against, ``total`` ``[R, C]``, the
weights' sum, and ``acc`` ``[R, D]``, the weighted sum of values. That of no keys is (-inf, 0, 0). Within a split the
sum is kept in C classes of columns (``column_sums``); a state that is merged or stored has one (``row_sums``).

Products and sums are written out (``fma`` where one rounding is meant) and compiled without fusion of its own, so that
two kernels compiled apart agree. Where a sum runs over columns it is one of two terms at a time: a sum of two has one
order, whatever layout and warps hold them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A tile's maximum this far above the reference takes its place, so that no weight is above 2 to this power.
MOST_ABOVE = tl.constexpr(8.0)
# Of columns; what is left of a tile when columns of twice as many apart and neighbours are added.
CLASSES = tl.constexpr(16)


@triton.jit
def finite(m):
    # Rows that see no key have the maximum -inf, and -inf minus -inf is NaN.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def raised(m, largest):
    """The reference after a tile of which ``largest`` is the maximum.

    Most tiles leave it, and the weights of all before, as they are. From -inf it is always set.
    """
    return tl.where(largest > m + MOST_ABOVE, largest, m)


@triton.jit
def _halved(x, COLUMNS: tl.constexpr):
    """The higher half of the columns of ``x`` added to the lower, until at most ``COLUMNS`` are left."""
    if x.shape[1] > COLUMNS:
        x = _halved(tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), axis=1), COLUMNS)
    return x


@triton.jit
def column_sums(weights):
    """``[R, C]``, a tile's sum in up to ``CLASSES``: columns 32 apart, and of what is left neighbours.

    A thread holds them all wherever a matrix unit leaves a tile of up to 4 warps across.
    """
    x = _halved(weights, 2 * CLASSES)
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)


@triton.jit
def in_classes(a, weights):
    """``a`` ``[R, 1]``, once for each class, in the layout of ``column_sums(weights)``: else that would be moved."""
    C: tl.constexpr = min(weights.shape[1] // 2, CLASSES)
    x = tl.reshape(tl.broadcast_to(a, weights.shape), (weights.shape[0], weights.shape[1] // (2 * C), C, 2))
    return tl.max(tl.max(x, axis=3), axis=1)


@triton.jit
def row_sums(total):
    """``[R, 1]``: the sum of all classes."""
    return _halved(total, 1)


@triton.jit
def merge(m, total, acc, m_next, total_next, acc_next):
    """The state over both sets of keys, the first of lower positions; exact where either is empty."""
    m_both = tl.maximum(m, m_next)
    shift = finite(m_both)
    a, b = tl.exp2(m - shift)[:, None], tl.exp2(m_next - shift)[:, None]
    return m_both, tl.fma(total, a, total_next * b), tl.fma(acc, a, acc_next * b)


@triton.jit
def empty(ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    return m, tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def finish(m, total, acc, sinks_ptr, head, HEADS: tl.constexpr, SINKS: tl.constexpr):
    """The attention of a folded state; zeros for a row that sees nothing."""
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=head < HEADS, other=float("-inf")).to(tl.float32) * LOG2E
        one, nothing = tl.full(total.shape, 1.0, tl.float32), tl.zeros(acc.shape, tl.float32)
        m, total, acc = merge(m, total, acc, sink, one, nothing)
    # Zero is added so that a sum has one zero, whatever masked values it passed.
    return tl.where(total == 0.0, 0.0, (acc + 0.0) / total)


@triton.jit
def split_range(first_position, last_position, window, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """What rows at these positions see: the first key, and the splits from one to before another."""
    first = tl.maximum(first_position - window + 1, 0) if WINDOW else 0
    return first, first // SPLIT, tl.cdiv(tl.maximum(last_position + 1, first), SPLIT)
