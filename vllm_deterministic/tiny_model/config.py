"""The shape of the tiny model and its `config.json`."""

from dataclasses import dataclass
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**64 - 1
MAX_POSITIONS = 4096
FORMAT = 1
"""Goes up when the same `ModelConfig` gives other bytes."""


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3 model. Heads are 64 wide, two query heads share one key-value head, the MLP is 2.75 times as wide.

    The default is the smallest size seen to make vLLM's default vary under load on a CPU: hidden 256 was too small.

    Raises:
        ValueError: a value out of range, with what is allowed.
    """

    dtype: str = "float32"
    num_layers: int = 8
    hidden_size: int = 1024
    seed: int = 0
    vocab_size: int = 4096
    num_special: int = 3
    head_dim: int = 64

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not 1 <= self.num_layers <= 128:
            raise ValueError(f"{self.num_layers} layers: give 1 to 128")
        if self.hidden_size % 128 or not 128 <= self.hidden_size <= 8192:
            raise ValueError(f"hidden size {self.hidden_size}: give a multiple of 128, from 128 to 8192")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed {self.seed}: give 0 to 2**64 - 1")

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.hidden_size // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads."""
        return self.num_heads // 2

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return self.hidden_size * 11 // 4

    def to_json(self) -> dict[str, Any]:
        """The document `config.json`. Its key `tiny_model` marks the directory as one that may be replaced."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": self.vocab_size - 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": MAX_POSITIONS,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pad_token_id": self.vocab_size - 3,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "tiny_model": {"format": FORMAT, "seed": self.seed},
            "torch_dtype": self.dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
