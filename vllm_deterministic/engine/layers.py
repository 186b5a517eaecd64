"""The methods that take the place of those of vLLM's layers."""

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


def fused_rotary_embedding_forward(
    self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``RotaryEmbedding.forward`` on a GPU: one launch for query and key."""
    if key is None:
        return rotary_embedding_forward(self, positions, query)
    cache = self._match_cos_sin_cache_dtype(query)
    return _ops.qk_rotary_embedding(positions.flatten(), query, key, cache, self.head_size, self.is_neox_style)


def qwen3_attention_forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """``Qwen3Attention.forward`` on a GPU: one launch for the norms and the rotation of query and key."""
    qkv, _ = self.qkv_proj(hidden_states)
    q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    rotary = self.rotary_emb
    q, k = _ops.qk_norm_rotary_embedding(
        positions.flatten(),
        q,
        k,
        self.q_norm.weight.data,
        self.k_norm.weight.data,
        self.q_norm.variance_epsilon,
        rotary._match_cos_sin_cache_dtype(q),
        rotary.head_size,
        rotary.is_neox_style,
    )
    output, _ = self.o_proj(self.attn(q, k, v))
    return output


def linear_apply(self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``apply`` of a linear layer or LM head without quantization, on a GPU."""
    return _ops.matmul(x, layer.weight, bias)
