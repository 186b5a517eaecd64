"""Random models of the widths of real ones, and requests of every kind in different company."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from vllm_deterministic.tiny_model.tokenizer import tokenizer_files

from ..engine.engines import record

VOCABULARY = 8192
_LONG_ROPE = {"short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [1.0 + i / 4 for i in range(48)]}
_DECODER = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 2048}
# The type of the model for transformers, and its configuration: Qwen3-1.7B, Qwen2.5-1.5B, Llama-3.2-1B, Mistral-7B,
# Gemma-3-1B, Gemma-2-2B, Phi-4-mini, GPT-2 XL, with fewer layers and windows that the prompts exceed.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3ForCausalLM": (
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "Qwen2ForCausalLM": (
        "qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    ),
    "LlamaForCausalLM": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "MistralForCausalLM": (
        "mistral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 300,
        },
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "Gemma2ForCausalLM": (
        "gemma2",
        {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 300,
            "tie_word_embeddings": True,  # vLLM has no other
        },
    ),
    "Phi3ForCausalLM": (
        "phi3",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 1024,
                **_LONG_ROPE,
            },
        },
    ),
    # The odd vocabulary is padded, and logits are rows of a wider tensor.
    "GPT2LMHeadModel": ("gpt2", {"hidden_size": 1600, "num_attention_heads": 25, "vocab_size": VOCABULARY + 3}),
}
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


def write_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """Write a random model and a tokenizer; the weights are so large that its tokens depend on its context.

    Args:
        folder: of the files.
        architecture: one of ``ARCHITECTURES``.
        changes: to its configuration.
    """
    kind, settings = ARCHITECTURES[architecture]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    own = {"architectures": [architecture], "dtype": "bfloat16", "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, **{**_DECODER, **special, **own, **settings, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        # A larger embedding that is the LM head too would answer with the token that it was asked with.
        scale = 0.005 if config.tie_word_embeddings and "embed" in name else 0.05
        values = torch.randn(parameter.shape, generator=generator, device=device).mul_(scale)
        if name.endswith("weight") and parameter.dim() == 1:  # of a norm
            values += 1.0
        tensors[name] = values.bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for file, content in tokenizer_files().items():
        (folder / file).write_text(json.dumps(content))
    return folder


def prompt(length: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [(length * 7 + i * 131) % VOCABULARY for i in range(length)]}


class Asked(NamedTuple):
    """One request of a test, by a name for what differs."""

    name: str
    length: int
    params: SamplingParams


ANSWERS = tuple(Asked(f"greedy {length}", length, GREEDY) for length in LENGTHS)
EVERY_KIND = (
    *ANSWERS,
    *(
        Asked(
            f"two choices {length}",
            length,
            SamplingParams(
                n=2, temperature=1.0, seed=1000 * length, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=2
            ),
        )
        for length in (3, 128, 600)
    ),
    *(
        Asked(
            f"prompt logprobs {length}",
            length,
            SamplingParams(temperature=0, max_tokens=2, detokenize=False, logprobs=1, prompt_logprobs=3),
        )
        for length in (2, 70, 301, 650)
    ),
    *(
        Asked(
            f"regular expression {length}",
            length,
            SamplingParams(
                temperature=1.0,
                seed=7,
                max_tokens=24,
                detokenize=False,
                logprobs=2,
                structured_outputs=StructuredOutputsParams(regex="(red|green|[0-9]{3}|blue,){8}"),
            ),
        )
        for length in (4, 310)
    ),
)
# Where vLLM's libraries for grammars are not installed, structured output stays unproven.
if importlib.util.find_spec("lmformatenforcer") is None:
    EVERY_KIND = tuple(one for one in EVERY_KIND if one.params.structured_outputs is None)
# They fit in a small cache as they come, and outgrow it.
CROWD = tuple(
    Asked(
        f"in a crowd {length}",
        length,
        SamplingParams(
            temperature=1.0, seed=1000 * length, max_tokens=64, ignore_eos=True, detokenize=False, logprobs=1
        ),
    )
    for length in range(90, 138)
)


def whole_record(output: RequestOutput) -> Any:
    """Bytes of the choices, and of the prompt's logprobs where they were asked for."""
    if output.prompt_logprobs is None:
        return record(output)
    prompt_logprobs = [[(i, p.logprob.hex()) for i, p in (step or {}).items()] for step in output.prompt_logprobs]
    return record(output), prompt_logprobs


def alone(llm: LLM, asked: Sequence[Asked] = ANSWERS) -> list[Any]:
    return [whole_record(llm.generate(prompt(one.length), one.params, use_tqdm=False)[0]) for one in asked]


def together(llm: LLM, asked: Sequence[Asked] = ANSWERS) -> list[Any]:
    """All in one batch in reverse order, behind neighbours of many lengths that sample."""
    neighbours = [prompt(900 + 13 * i) for i in range(20)]
    sampling = [SamplingParams(temperature=1.0, seed=i * 10, max_tokens=1 + 5 * i, detokenize=False) for i in range(20)]
    outputs = llm.generate(
        [*neighbours, *[prompt(one.length) for one in asked[::-1]]],
        [*sampling, *[one.params for one in asked[::-1]]],
        use_tqdm=False,
    )
    return [whole_record(output) for output in outputs[len(neighbours) :]][::-1]


def streamed(llm: LLM, asked: Sequence[Asked]) -> list[Any]:
    """All in one batch, put together from what each step adds."""
    engine = llm.llm_engine
    parts: dict[str, list[RequestOutput]] = {}
    for number, one in enumerate(asked):
        params = one.params.clone()
        params.output_kind = RequestOutputKind.DELTA
        engine.add_request(str(number), prompt(one.length), params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            parts.setdefault(output.request_id, []).append(output)
    return [_joined(parts[str(number)]) for number in range(len(asked))]


def _joined(parts: Sequence[RequestOutput]) -> Any:
    choices: dict[int, tuple[tuple[int, ...], list[Any]]] = {}
    for part in parts:
        for choice, (tokens, logprobs) in zip(part.outputs, record(part), strict=True):
            before = choices.get(choice.index, ((), []))
            choices[choice.index] = (before[0] + tokens, before[1] + logprobs)
    choices_in_order = [choices[index] for index in sorted(choices)]
    first = whole_record(parts[0])
    return (choices_in_order, first[1]) if isinstance(first, tuple) else choices_in_order


def counter(llm: LLM, name: str) -> float:
    """One of the engine's counters; it must have been started with ``disable_log_stats=False``."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def differing(asked: Sequence[Asked], answers: Sequence[Any], expected: Sequence[Any]) -> list[str]:
    """Names of the requests whose answers differ."""
    return [one.name for one, answer, wanted in zip(asked, answers, expected, strict=True) if answer != wanted]
