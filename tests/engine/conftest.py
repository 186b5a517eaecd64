"""Engines in this process: started in seconds, and open to planted faults."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the extra 'cpu'")
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from vllm_deterministic.tiny_model.tokenizer import tokenizer_files

from .engines import record, starting

VOCABULARY = 4096
_BASE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 1},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 4},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 50},
}


def write_model(folder: Path, name: str, **changes: Any) -> Path:
    """Write a random model of one architecture, with weights large enough that its tokens depend on its context."""
    config = {**_BASE, **MODELS[name], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, content in tokenizer_files().items():
        (folder / file).write_text(json.dumps(content))
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    norms = ["model.norm.weight"]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        sizes = {"q": config["num_attention_heads"] * head, "k": config["num_key_value_heads"] * head}
        sizes["v"] = sizes["k"]
        for part, size in sizes.items():
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (size, hidden)
            if name == "qwen2":
                shapes[f"{block}.self_attn.{part}_proj.bias"] = (size,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (hidden, sizes["q"])
        shapes[f"{block}.mlp.gate_proj.weight"] = shapes[f"{block}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        norms += [f"{block}.input_layernorm.weight", f"{block}.post_attention_layernorm.weight"]
        if name == "qwen3":
            shapes[f"{block}.self_attn.q_norm.weight"] = shapes[f"{block}.self_attn.k_norm.weight"] = (head,)
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}
    tensors |= {key: torch.ones(hidden) for key in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="package", autouse=True)
def _engines_in_this_process() -> Iterator[None]:
    """Let vLLM run its worker here, and undo what that does to the process that other tests share."""
    cores = os.sched_getaffinity(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # The CPU worker replaces it by one that does nothing.
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(name: str, **changes: Any) -> Path:
        return write_model(tmp_path_factory.mktemp(name), name, **changes)

    return make


@pytest.fixture(scope="session")
def qwen3(model_folder: Callable[..., Path]) -> Path:
    return model_folder("qwen3")


# The smallest engine: others differ from it by what a test is about.
SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 1 << 27,
    "disable_log_stats": True,
}


@pytest.fixture
def start() -> Iterator[Callable[..., LLM]]:
    """Start a deterministic engine; it ends with the test or with the next start."""
    with starting(**SETTINGS) as start:
        yield start


@pytest.fixture(scope="module")
def engine(qwen3: Path) -> Iterator[LLM]:
    """One deterministic engine for all tests of a module."""
    with starting(**SETTINGS) as start:
        yield start(qwen3)


GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=5)


def prompts(lengths: Sequence[int]) -> list[dict[str, list[int]]]:
    """A prompt of each length; no two share a beginning."""
    return [{"prompt_token_ids": [50 + (length * 7 + i * 13) % 3000 for i in range(length)]} for length in lengths]


class Answers:
    """Asks an engine for the same prompts in different company."""

    GREEDY = GREEDY
    # Around the tiles of rows, the key tile, the block (128) and the split (256).
    LENGTHS = (1, 2, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 400)

    def alone(self, llm: LLM, lengths: Sequence[int] = LENGTHS, params: SamplingParams = GREEDY) -> list[Any]:
        return [record(llm.generate(prompt, params, use_tqdm=False)[0]) for prompt in prompts(lengths)]

    def together(self, llm: LLM, lengths: Sequence[int] = LENGTHS, params: SamplingParams = GREEDY) -> list[Any]:
        """All prompts in one batch, in descending order of length, behind neighbours that sample."""
        asked = prompts(lengths)[::-1]
        noise = prompts([length + 1000 for length in range(3)])
        noise = [{"prompt_token_ids": p["prompt_token_ids"][: 40 * (i + 1)]} for i, p in enumerate(noise)]
        sampling = [SamplingParams(temperature=1.0, seed=100 + i, max_tokens=5 + i) for i in range(len(noise))]
        outputs = llm.generate([*noise, *asked], [*sampling, *([params] * len(asked))], use_tqdm=False)
        return [record(output) for output in outputs[len(noise) :]][::-1]


@pytest.fixture
def answers() -> Answers:
    return Answers()
