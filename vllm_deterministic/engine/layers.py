"""The forward methods that take the place of vLLM's norm, activation and rotary layers."""

from typing import Any

import torch

from . import ops  # noqa: F401  (defines the operations)

_ops = torch.ops.vllm_deterministic


def rms_norm_forward(
    self: Any, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``RMSNorm.forward``: normalized rows, and the new residual where one is given.

    Raises:
        NotImplementedError: the layer takes its variance from part of the row.
    """
    if self.variance_size_override is not None:
        raise NotImplementedError("RMSNorm over part of a row has no deterministic implementation")
    weight = self.weight.data if self.has_weight else None
    if residual is None:
        return _ops.rms_norm(x, weight, self.variance_epsilon)
    return _ops.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)


def silu_and_mul_forward(*args: Any) -> torch.Tensor:
    """``SiluAndMul.forward``; vLLM calls it as a method and as a static method."""
    return _ops.silu_and_mul(args[-1])


def rotary_embedding_forward(
    self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``RotaryEmbedding.forward``: the rotated query and key."""
    cache = self._match_cos_sin_cache_dtype(query)
    positions = positions.flatten()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return _ops.rotary_embedding(positions, x, cache, self.head_size, self.is_neox_style)

    return rotate(query), None if key is None else rotate(key)
