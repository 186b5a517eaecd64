"""The methods that take the place of those of vLLM's layers."""

from typing import Any

import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

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


def gemma_rms_norm_forward(
    self: Any, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``GemmaRMSNorm.forward``: as ``RMSNorm``'s, times one more than the weight."""
    if residual is None:
        return _ops.gemma_rms_norm(x, self.weight.data, self.variance_epsilon)
    return _ops.fused_add_gemma_rms_norm(x, residual, self.weight.data, self.variance_epsilon)


def layer_norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``LayerNorm.forward``: in fp32 whatever the dtypes, rounded once."""
    return _ops.layer_norm(x, self.weight, self.bias, self.eps)


def silu_and_mul_forward(*args: Any) -> torch.Tensor:
    """``SiluAndMul.forward``; vLLM calls it as a method and as a static method."""
    return _ops.silu_and_mul(args[-1])


def gelu_and_mul_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``GeluAndMul.forward``."""
    return _ops.gelu_and_mul(x, self.approximate)


def gelu_tanh_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``forward`` of ``NewGELU`` and ``FastGELU``, which write one formula in two ways."""
    return _ops.gelu(x, "tanh")


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


def long_rotary_embedding_forward(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Phi3LongRoPEScaledRotaryEmbedding.forward`` on a GPU: its table has the short angles first, then the long ones.

    Raises:
        NotImplementedError: positions are to be shifted, which no model of vLLM asks for.
    """
    if key is None or offsets is not None:
        raise NotImplementedError("LongRoPE without a key or with offsets has no deterministic implementation")
    short = self.original_max_position_embeddings
    table = self.long_short_cos_sin_cache[short:] if self.use_long_rope else self.long_short_cos_sin_cache[:short]
    return _ops.qk_rotary_embedding(positions.flatten(), query, key, table, self.head_size, True)


def qk_norm_attention_forward(
    self: Any, positions: torch.Tensor, hidden_states: torch.Tensor, **_: Any
) -> torch.Tensor:
    """``forward`` of ``Qwen3Attention`` and ``Gemma3Attention`` on a GPU: one launch for query and key."""
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
        1.0 if isinstance(self.q_norm, GemmaRMSNorm) else 0.0,
    )
    output, _ = self.o_proj(self.attn(q, k, v))
    return output


def logits_processor_forward(
    self: Any,
    lm_head: torch.nn.Module,
    hidden_states: torch.Tensor,
    embedding_bias: torch.Tensor | None = None,
    skip_gather: bool = False,
) -> torch.Tensor | None:
    """``LogitsProcessor.forward`` with the soft cap in one operation; the scale is one product, rounded once anyway."""
    if self.logits_as_input:
        logits = hidden_states
    else:
        logits = self._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)
    if logits is not None and self.soft_cap is not None:
        logits = _ops.soft_cap(logits, self.soft_cap)
    return logits if logits is None or self.scale == 1.0 else logits * self.scale


def linear_apply(self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``apply`` of a linear layer or LM head without quantization, on a GPU."""
    return _ops.matmul(x, layer.weight, bias)
