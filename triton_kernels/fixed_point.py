"""Sums of exponentials as integers, which are exact: no order of additions, no layout and no dtype enters them."""

import triton
import triton.language as tl

# A mass is counted in units of this part of the largest. 2**23 masses of one fit into int64.
UNIT = tl.constexpr(2.0**-40)
_ONE = tl.constexpr(2.0**40)


@triton.jit
def mass(x, maximum):
    """``exp(x - maximum)`` in units of 2**-40, rounded down, as int64; 0 for NaN.

    ``maximum`` is no less than any ``x``. Where it is infinite, what equals it has the mass of one.
    """
    weight = tl.where(x == maximum, 1.0, tl.exp(x - maximum))
    return tl.where(weight != weight, 0.0, weight * _ONE).to(tl.int64)


@triton.jit
def fold_masses(maximum, maxima, masses):
    """The mass of a row from its parts', each relative to the maximum of its part.

    A part is rounded down once more, so parts must follow the row's length alone.
    """
    scale = tl.where(maxima == maximum, 1.0, tl.exp(maxima - maximum)).to(tl.float64)
    return tl.sum((masses.to(tl.float64) * scale).to(tl.int64), axis=0)
