"""Seeded random weights: the same bytes on every machine, and a model whose every layer matters to its output.

numpy promises the raw bits of a bit generator for ever, its distributions only for one version. So a weight is a 16-bit
integer from the raw bits, centred, times a scale: each step is exact or rounds once, as IEEE 754 says.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_deterministic.tiny_model.config import ModelConfig

Array = np.ndarray[Any, np.dtype[Any]]

# Root mean square of a centred uniform 16-bit integer.
_UNIT = math.sqrt((2**32 - 1) / 12)

# How much louder than variance-preserving a projection is. Attention is so sharp that the context decides, and that a
# difference in the last bit of float32 has grown to 1e-3 of a logit at the top: what varies in a server, shows. (So the
# model is no measure of precision: in bfloat16 it answers otherwise than in float32.) The logits are flat enough for
# near-ties: the likeliest token has a probability of about 0.13.
QUERY_KEY_GAIN = 4.0
OUTPUT_GAIN = 2.0
LOGIT_STD = 2.5


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint: uniform noise of root mean square `rms` around `mean`, the last rows zero."""

    name: str
    shape: tuple[int, ...]
    rms: float
    mean: float = 0.0
    zero_rows: int = 0


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield the tensors of the checkpoint in the order in which they are drawn.

    The rows of `lm_head` for the special tokens are zero, so that greedy decoding never ends a text by accident.
    """

    def linear(name: str, rows: int, columns: int, gain: float = 1.0, zero_rows: int = 0) -> TensorSpec:
        return TensorSpec(f"{name}.weight", (rows, columns), gain / math.sqrt(columns), zero_rows=zero_rows)

    def norm(name: str, width: int, gain: float = 1.0) -> TensorSpec:
        return TensorSpec(f"{name}.weight", (width,), gain / 4, mean=gain)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield TensorSpec("model.embed_tokens.weight", (config.vocab_size, hidden), 1.0)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield norm(f"{prefix}.input_layernorm", hidden)
        yield linear(f"{prefix}.self_attn.q_proj", q_size, hidden)
        yield linear(f"{prefix}.self_attn.k_proj", kv_size, hidden)
        yield linear(f"{prefix}.self_attn.v_proj", kv_size, hidden)
        yield norm(f"{prefix}.self_attn.q_norm", config.head_dim, QUERY_KEY_GAIN)
        yield norm(f"{prefix}.self_attn.k_norm", config.head_dim, QUERY_KEY_GAIN)
        yield linear(f"{prefix}.self_attn.o_proj", hidden, q_size, OUTPUT_GAIN)
        yield norm(f"{prefix}.post_attention_layernorm", hidden)
        yield linear(f"{prefix}.mlp.gate_proj", inner, hidden)
        yield linear(f"{prefix}.mlp.up_proj", inner, hidden)
        yield linear(f"{prefix}.mlp.down_proj", hidden, inner, OUTPUT_GAIN)
    yield norm("model.norm", hidden)
    yield linear("lm_head", config.vocab_size, hidden, LOGIT_STD, zero_rows=config.num_special)


def draw(spec: TensorSpec, bits: np.random.Philox) -> Array:
    """Draw the next tensor from `bits` as float32."""
    count = math.prod(spec.shape)
    raw = np.asarray(bits.random_raw(-(-count // 4))).astype("<u8").view("<u2")[:count]
    centred = raw.astype(np.float32) - np.float32(2**15 - 0.5)
    x = (np.float32(spec.mean) + centred * np.float32(spec.rms / _UNIT)).reshape(spec.shape)
    x[spec.shape[0] - spec.zero_rows :] = 0
    return x


def to_bytes(x: Array, dtype: str) -> bytes:
    """Little-endian bytes of float32 `x` in `dtype`, rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = x.astype("<f4").view("<u4")
        x = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    data: bytes = x.astype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype]).tobytes()
    return data
