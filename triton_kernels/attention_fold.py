"""The state of a softmax over some keys, and how states are folded: what every road of attention shares.

A state is ``m`` ``[R]``, the largest score in units of log 2, ``total`` ``[R, C]``, the weights' sum in equal columns,
and ``acc`` ``[R, D]``, the weighted sum of values. That of no keys is (-inf, 0, 0). Products and sums are written out
(``fma`` where one rounding is meant) and compiled without fusion of its own, so that two kernels compiled apart agree.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def finite(m):
    # Rows that see no key have the maximum -inf, and -inf minus -inf is NaN.
    return tl.where(m == float("-inf"), 0.0, m)


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
    normalizer = tl.max(total, axis=1)[:, None]
    # Zero is added so that a sum has one zero, whatever masked values it passed.
    return tl.where(normalizer == 0.0, 0.0, (acc + 0.0) / normalizer)


@triton.jit
def split_range(first_position, last_position, window, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """What rows at these positions see: the first key, and the splits from one to before another."""
    first = tl.maximum(first_position - window + 1, 0) if WINDOW else 0
    return first, first // SPLIT, tl.cdiv(tl.maximum(last_position + 1, first), SPLIT)
