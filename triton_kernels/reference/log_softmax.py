"""Softmax and its logarithm over the last dimension."""

import torch

from .row_sum import row_sum


def _shifted(x: torch.Tensor) -> torch.Tensor:
    return x.float() - x.float().amax(dim=-1, keepdim=True)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x - max(x) - log(sum(exp(x - max(x))))`` in fp32.

    Args:
        x: ``[..., V]``, bf16, fp16 or fp32, with at least one finite element in each row.

    Returns:
        ``[..., V]`` fp32.
    """
    shifted = _shifted(x)
    return shifted - torch.log(row_sum(torch.exp(shifted))).unsqueeze(-1)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """``exp(x - max(x)) / sum(exp(x - max(x)))`` in fp32.

    Args:
        x: ``[..., V]``, bf16, fp16 or fp32, with at least one finite element in each row.

    Returns:
        ``[..., V]`` fp32.
    """
    weights = torch.exp(_shifted(x))
    return weights / row_sum(weights).unsqueeze(-1)
