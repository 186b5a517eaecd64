"""Gated activations."""

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :d]) * x[..., d:]`` with ``silu(g) = g / (1 + exp(-g))``.

    Torch's own ``silu`` and ``sigmoid`` compute the tail of a vector by another routine than its body, so an element's
    bytes depend on where it lies in the batch. ``exp`` does not, and the rest is exact IEEE arithmetic. The SiLU is
    rounded to ``x.dtype`` before the product, as eager does.

    Args:
        x: ``[..., 2 * d]``, bf16, fp16 or fp32.

    Returns:
        ``[..., d]`` in ``x.dtype``.
    """
    gate, up = x.chunk(2, dim=-1)
    gate = gate.float()
    return gate.div(torch.exp(-gate).add_(1)).to(x.dtype).mul_(up)
