"""Activations, gated and plain."""

import torch
import triton
import triton.language as tl

from .rows import as_rows, begin, check_floats, fullest, launch_options, row_offset

_ELEMENTS = 2048
_WARPS = 4
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def _activate(x, FORMULA: tl.constexpr):
    """One activation of an fp32 tile, in fp32."""
    if FORMULA == "silu":
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    elif FORMULA == "quick_gelu":
        return tl.div_rn(x, 1.0 + tl.exp(-1.702 * x))
    elif FORMULA == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which does not cancel where tanh(u) is near -1.
        u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        return tl.div_rn(x, 1.0 + tl.exp(-2.0 * u))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit(do_not_specialize=["x_stride", "num_rows"])
def _activation_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    num_rows,
    width: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    parts: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (column < width)
    x_ptrs = x_ptr + row_offset(row, x_stride, width) + column
    # Past the end 1, not 0: the division of zero takes a slow road, and all threads of a warp take it together.
    result = _activate(tl.load(x_ptrs, mask=inside, other=1.0).to(tl.float32), FORMULA)
    if GATED:
        up = tl.load(x_ptrs + width, mask=inside, other=0.0).to(tl.float32)
        result = result.to(x_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(out_ptr + row_offset(row, width, width) + column, result.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :d]) * x[..., d:]`` with ``silu(g) = g / (1 + exp(-g))``.

    SiLU is fp32 with an IEEE division; it is rounded to ``x.dtype`` before the product, as eager does.

    Invariant: every element is computed by the same instructions, wherever it lies.

    Args:
        x: ``[..., 2 * d]``, bf16, fp16 or fp32; rows may be strided.

    Returns:
        ``[..., d]`` in ``x.dtype``.

    Raises:
        ValueError: the device, dtype or shape of ``x`` is none of the above.
    """
    return _launch(x, "silu", gated=True)


def gelu_and_mul(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``gelu(x[..., :d], approximate) * x[..., d:]``; the rest as for ``silu_and_mul``."""
    return _launch(x, _gelu_formula(approximate), gated=True)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``x * (1 + erf(x / sqrt(2))) / 2`` in fp32, rounded once to ``x.dtype`` (https://arxiv.org/abs/1606.08415).

    Args:
        x: ``[..., d]``, bf16, fp16 or fp32; rows may be strided.
        approximate: "none", or "tanh" for ``x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2``.

    Returns:
        ``[..., d]`` in ``x.dtype``.

    Raises:
        ValueError: an argument is none of the above.
    """
    return _launch(x, _gelu_formula(approximate), gated=False)


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """``gelu(x, "tanh")``, as vLLM names it; vLLM's own rounds on the way."""
    return gelu(x, "tanh")


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    """``gelu(x, "tanh")``, as vLLM names it where the cube is factored out; vLLM's own rounds on the way."""
    return gelu(x, "tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x / (1 + exp(-1.702 * x))`` in fp32, rounded once; the rest as for ``gelu``."""
    return _launch(x, "quick_gelu", gated=False)


def _gelu_formula(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; 'none' or 'tanh' is needed")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _launch(x: torch.Tensor, formula: str, gated: bool) -> torch.Tensor:
    check_floats("x", x)
    if gated and x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; gate and up need an even number of columns")
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = as_rows(x, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return out
    columns = fullest(width, _ELEMENTS, _ELEMENTS // 2, _ELEMENTS // 4)
    columns = min(columns, triton.next_power_of_2(width))
    _activation_kernel[(triton.cdiv(num_rows, _ELEMENTS // columns) * triton.cdiv(width, columns),)](
        rows,
        out,
        rows.stride(0),
        num_rows,
        width,
        formula,
        gated,
        _ELEMENTS // columns,
        columns,
        **launch_options(x, _WARPS),
    )
    return out
