"""Every covered architecture, dtype and cache geometry: alone equals among neighbours, in bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from vllm_deterministic.engine.devices import CPU


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral"])
def test_architecture(name: str, model_folder: Callable[..., Path], start: Callable[..., LLM], answers: Any) -> None:
    llm = start(model_folder(name))
    assert answers.alone(llm) == answers.together(llm)


def test_every_covered_architecture_is_tested(model_folder: Callable[..., Path]) -> None:
    tested = {"Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"}
    assert set(CPU.architectures) == tested


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype: str, qwen3: Path, start: Callable[..., LLM], answers: Any) -> None:
    llm = start(qwen3, dtype=dtype)
    assert answers.alone(llm) == answers.together(llm)


def test_bytes_do_not_depend_on_how_the_engine_is_set_up(qwen3: Path, start: Callable[..., LLM], answers: Any) -> None:
    """Block size, prefix cache, chunk budget and preemption; each engine answers alone and together."""
    llm = start(qwen3)
    expected = answers.alone(llm)
    assert answers.together(llm) == expected, "whole prompts, prefix cache warm"
    variants: dict[str, dict[str, Any]] = {
        "blocks of 16, no prefix cache": {"block_size": 16, "enable_prefix_caching": False},
        "chunks of 16 tokens": {"max_num_batched_tokens": 16, "max_num_seqs": 16, "block_size": 64},
        "chunks of 64 tokens": {"max_num_batched_tokens": 64, "max_num_seqs": 32, "block_size": 32},
    }
    for what, settings in variants.items():
        llm = start(qwen3, **settings)
        assert answers.together(llm) == expected, what
        assert answers.alone(llm) == expected, f"{what}, again"


def test_preempted_requests_resume_with_the_same_bytes(qwen3: Path, start: Callable[..., LLM], answers: Any) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True, logprobs=5)
    lengths = [100 + i for i in range(8)]
    expected = answers.alone(start(qwen3, block_size=16), lengths, params)
    # Eight requests of up to 147 tokens want 80 blocks and get 40.
    llm = start(qwen3, block_size=16, num_gpu_blocks_override=40, max_model_len=256, disable_log_stats=False)
    assert answers.together(llm, lengths, params) == expected
    preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preemptions > 0, "no request was preempted: the test proves nothing"
