"""Root mean square normalization (https://arxiv.org/abs/1910.07467), alone and with the residual added first."""

import torch

from .row_sum import row_sum


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension.

    The mean and the quotient are fp32; the quotient is rounded to ``weight.dtype`` before the product, as eager does.

    Args:
        x: ``[..., H]``, bf16, fp16 or fp32.
        weight: ``[H]`` or None for no scale.
        epsilon: added to the mean square.

    Returns:
        ``[..., H]`` in ``x.dtype``.
    """
    return _normalize(x.float(), weight, epsilon).to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual)`` and the sum itself, rounded once to ``x.dtype``.

    The norm reads the fp32 sum before it is rounded, as vLLM's own operation does.

    Args:
        x: ``[..., H]``.
        residual: ``[..., H]``.
        weight: ``[H]`` or None.
        epsilon: added to the mean square.

    Returns:
        the normalized rows and the new residual, both ``[..., H]`` in ``x.dtype``.
    """
    total = x.float() + residual.float()
    return _normalize(total, weight, epsilon).to(x.dtype), total.to(x.dtype)


def _normalize(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    mean_square = row_sum(x * x).unsqueeze(-1) / x.shape[-1]
    x = x * torch.rsqrt(mean_square + epsilon)
    return x if weight is None else x.to(weight.dtype) * weight
