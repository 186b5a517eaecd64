"""Random models for an engine on a GPU, ways to run it, and the same prompts in different company."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from ..engine.engines import record

VOCABULARY, HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 8192, 1024, 3072, 8, 2, 128
LAYERS = 4
# Around the tiles of M, the pages of the cache and the chunk budget.
LENGTHS = (1, 2, 15, 16, 17, 63, 65, 127, 129, 300, 511, 700)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=5)
# Few sizes are captured, so that an engine starts in seconds; batches lie between them and above.
SIZES = [1, 2, 4, 8, 16, 32]
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "CUDA graphs": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
    },
    "compiled": {"compilation_config": {"cudagraph_capture_sizes": SIZES}},
}


def write_model(folder: Path, name: str) -> Path:
    """Write a random model of one architecture, with weights large enough that its tokens depend on its context."""
    config = {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[name]],
        "model_type": name,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    ones = {"model.norm.weight": HIDDEN}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for part, (n, k) in {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            shapes[f"{block}.{part}.weight"] = (n, k)
        ones |= {f"{block}.{norm}.weight": HIDDEN for norm in ("input_layernorm", "post_attention_layernorm")}
        if name == "qwen3":
            ones |= {f"{block}.self_attn.{norm}.weight": HEAD for norm in ("q_norm", "k_norm")}
    generator = torch.Generator().manual_seed(0)
    tensors = {key: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for key, shape in shapes.items()}
    tensors |= {key: torch.ones(width, dtype=torch.bfloat16) for key, width in ones.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompt(length: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [(length * 7 + i * 131) % VOCABULARY for i in range(length)]}


def alone(llm: LLM) -> list[Any]:
    return [record(llm.generate(prompt(length), GREEDY, use_tqdm=False)[0]) for length in LENGTHS]


def together(llm: LLM) -> list[Any]:
    """All prompts in one batch in descending order, behind neighbours of many lengths that sample."""
    neighbours = [prompt(900 + 13 * i) for i in range(20)]
    sampling = [SamplingParams(temperature=1.0, seed=i * 10, max_tokens=1 + 5 * i, detokenize=False) for i in range(20)]
    outputs = llm.generate(
        [*neighbours, *[prompt(length) for length in LENGTHS[::-1]]],
        [*sampling, *[GREEDY] * len(LENGTHS)],
        use_tqdm=False,
    )
    return [record(output) for output in outputs[len(neighbours) :]][::-1]
