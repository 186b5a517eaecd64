"""A model directory of random weights that ``vllm serve`` loads like any other: files that the fingerprint hashes."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_probes

from vllm_deterministic.tiny_model.tokenizer import tokenizer_files

SHAPES: dict[str, dict[str, Any]] = {
    **engine_probes.MODELS,
    # For a check of the benchmark itself on a machine without a GPU.
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
}
_WRITERS = 6  # of files at once: a single one does not keep a disk busy


def write_random_model(directory: Path, shape: str, layers: int | None = None) -> dict[str, Any]:
    """Write a Qwen3 model in bfloat16, matrices of standard deviation 0.02 and unit norms, with a tokenizer.

    Every id of the vocabulary decodes to a text of its own. A directory that an earlier call has written in full is
    left as it is. Returns its ``config.json``.

    Raises:
        ValueError: another model is in the directory.
    """
    config = engine_probes.configuration(SHAPES[shape], layers)
    if directory.exists():
        if json.loads((directory / "config.json").read_text()) != config:
            raise ValueError(f"{directory} holds another model: give another --model-dir")
        return config
    staging = directory.with_name(f"{directory.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        for name, content in {"config.json": config, **_tokenizer(config)}.items():
            (staging / name).write_text(json.dumps(content))
        shards = list(_shards(config))
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        with ThreadPoolExecutor(_WRITERS) as writers:
            list(writers.map(_write_shard, [staging / name for name in names], shards, range(len(shards))))
        index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (staging / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return config


def _shards(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of the tensors by name, in one dictionary for each file."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        yield {"lm_head.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        tensors = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        yield {f"model.layers.{layer}.{name}.weight": size for name, size in tensors.items()}


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    # Not above: every process that sends load imports the benchmark, and would take seconds over torch.
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1234 + seed)
    tensors = {}
    for name, size in shapes.items():
        if len(size) == 1:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            values = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
            tensors[name] = values.mul_(0.02).cpu()
    save_file(tensors, path, {"format": "pt"})


def _tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of the tiny model; ids beyond its own are words that no text is split into."""
    files = tokenizer_files()
    vocabulary = files["tokenizer.json"]["model"]["vocab"]
    vocabulary |= {f"Ġw{token}": token for token in range(len(vocabulary), config["vocab_size"])}
    files["tokenizer_config.json"]["model_max_length"] = config["max_position_embeddings"]
    return files
