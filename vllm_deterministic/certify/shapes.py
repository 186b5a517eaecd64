"""The shapes of a model's linear layers, from its config.json."""

import json
from pathlib import Path
from typing import Any

Shape = tuple[int, int]

_VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary to it


def parse_shape(text: str) -> Shape:
    """Read ``N,K``.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        n, k = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not of the form N,K, for example 6144,4096") from None
    if n < 1 or k < 1:
        raise ValueError(f"{text!r}: N and K must be at least 1")
    return n, k


def model_shapes(directory: Path, tensor_parallel: int = 1) -> dict[Shape, str]:
    """``(N, K)`` of each linear layer of a dense decoder as vLLM builds it, with the layers' names.

    Args:
        directory: holds the model's config.json.
        tensor_parallel: number of ranks; the shapes are those of one.

    Raises:
        ValueError: there is no such file, it lacks a size, or the ranks do not divide one.
    """
    config = _read(directory / "config.json")

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{directory / 'config.json'} has no usable {name}: {value!r}")
        return value

    def share(what: str, total: int) -> int:
        if total % tensor_parallel:
            raise ValueError(f"{tensor_parallel} ranks do not divide {what} of {total}")
        return total // tensor_parallel

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", hidden // heads)
    kv_heads = size("num_key_value_heads", heads)
    # With fewer key-value heads than ranks each rank holds a copy of one.
    kv_share = 1 if tensor_parallel % kv_heads == 0 else share("num_key_value_heads", kv_heads)
    q_share, intermediate = share("num_attention_heads", heads), share("intermediate_size", size("intermediate_size"))
    vocabulary = -(-size("vocab_size") // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    layers = {
        "qkv": ((q_share + 2 * kv_share) * head_dim, hidden),
        "o": (hidden, q_share * head_dim),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "lm_head": (share("the padded vocabulary", vocabulary), hidden),
    }
    shapes: dict[Shape, str] = {}
    for layer, shape in layers.items():
        shapes[shape] = f"{shapes[shape]}, {layer}" if shape in shapes else layer
    return shapes


def model_dtype(directory: Path) -> str:
    """The dtype that vLLM serves the model in by default: its own if that has 16 bits, else bfloat16.

    Raises:
        ValueError: there is no config.json that can be read.
    """
    config = _read(directory / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in ("bfloat16", "float16") else "bfloat16"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object")
    return config
