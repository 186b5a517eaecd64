"""Matrix products of PyTorch on the batch-invariant kernel. Each element adds up K in one order, whatever M is."""

import math

import torch

from vllm_deterministic.triton_kernels.matmul import batched_matmul
from vllm_deterministic.triton_kernels.matmul import matmul as product

Number = int | float


def mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``[M, K] @ [K, N]``."""
    return product(x, w.t())


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[B, M, K] @ [B, K, N]``."""
    return batched_matmul(a, b)


def mv(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``[M, K] @ [K]``."""
    return product(x, vector.unsqueeze(0)).squeeze(1)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[K] @ [K]``."""
    return product(a.unsqueeze(0), b.unsqueeze(0)).reshape(())


def addmm(bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *, beta: Number = 1, alpha: Number = 1) -> torch.Tensor:
    """``beta * bias + alpha * (x @ w)``; a plain bias ``[N]`` is added before the one rounding, as linear layers do."""
    # Which of the two roads is taken follows ranks and never M, because they round differently.
    if bias.dim() == 1 and beta == alpha == 1:
        return product(x, w.t(), bias.expand(w.shape[1]))
    return _add(bias, product(x, w.t()), beta, alpha)


def addmv(
    bias: torch.Tensor, x: torch.Tensor, vector: torch.Tensor, *, beta: Number = 1, alpha: Number = 1
) -> torch.Tensor:
    """``beta * bias + alpha * (x @ vector)``."""
    return _add(bias, mv(x, vector), beta, alpha)


def baddbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Number = 1, alpha: Number = 1
) -> torch.Tensor:
    """``beta * bias + alpha * (a @ b)`` for each matrix of a batch."""
    return _add(bias, batched_matmul(a, b), beta, alpha)


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ w.T + bias`` for ``x`` ``[..., K]`` and ``w`` ``[N, K]`` or ``[K]``."""
    if w.dim() == 1:
        out = matmul(x, w)
        return out if bias is None else out + bias
    return product(x, w, bias)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``torch.matmul``: a matrix on the right makes one product of all rows on the left, else it is one for each pair.

    PyTorch makes the same choice by strides as well, and so rounds a batch and its slice differently.
    """
    if a.dim() == 0 or b.dim() == 0:
        raise RuntimeError("both arguments to matmul need to be at least 1D")
    if a.dim() == b.dim() == 1:
        return dot(a, b)
    if b.dim() == 1:
        return product(a, b.unsqueeze(0)).squeeze(-1)
    if b.dim() == 2:
        return product(a, b.t())
    if a.dim() == 1:
        return matmul(a.unsqueeze(0), b).squeeze(-2)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:]) for x in (a, b))
    out = batched_matmul(a, b)
    return out.view(*batch, *out.shape[1:])


def scaled_dot_product_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch's own composition of products and a softmax; its fused kernels cut keys by the size of the batch."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    math_attention = torch.ops.aten._scaled_dot_product_attention_math
    out: torch.Tensor = math_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return out


def _add(bias: torch.Tensor, out: torch.Tensor, beta: Number, alpha: Number) -> torch.Tensor:
    """``beta * bias + alpha * out`` in fp32; a bias times 0 is not read, so its NaN does not count."""
    if bias.dtype != out.dtype:
        raise RuntimeError(f"the bias is {bias.dtype}, but the product is {out.dtype}")
    total = out.float() * alpha
    if beta:
        total = total + bias.expand(out.shape).float() * beta
    return total.to(out.dtype)
