"""What is not covered is refused before the engine starts, with the cause and the way out."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_deterministic.engine import attention, coverage, plugin
from vllm_deterministic.engine.config import DeterministicConfig, RefusalError
from vllm_deterministic.engine.devices import CPU, CUDA, current_device

plugin.register()


def refusal(model: Path, **changes: Any) -> str:
    with pytest.raises(RefusalError) as refused:
        EngineArgs(model=str(model), additional_config={"deterministic": True}, **changes).create_engine_config()
    text = str(refused.value)
    assert len(text.splitlines()) <= 2
    return text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attention_backend": "FLASH_ATTN"}, "--attention-backend FLASH_ATTN"),
        ({"block_size": 48}, "block size 48"),
        ({"block_size": 512}, "block size 512"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype 'fp8'"),
        ({"tensor_parallel_size": 2}, "tensor parallel size 2"),
        ({"pipeline_parallel_size": 2}, "pipeline parallel size 2"),
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"runner": "pooling"}, "runner 'pooling'"),
        ({"model_impl": "transformers"}, "transformers"),
        ({"logits_processors": ["a.b:C"]}, "custom logits processors"),
        ({"worker_cls": "a.Worker"}, "worker class a.Worker"),
    ],
)
def test_refused_setting(changes: dict[str, Any], what: str, qwen3: Path) -> None:
    assert what in refusal(qwen3, **changes)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "Qwen3MoeForCausalLM",
            {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        ),
        ("Gemma2ForCausalLM", {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}),
        ("GPT2LMHeadModel", {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    ],
)
def test_refused_architecture(name: str, config: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    folder = model_folder("qwen3", **config, architectures=[name])
    text = refusal(folder)
    assert f"architecture {name} is not covered" in text
    assert "Qwen3ForCausalLM" in text


def test_quantized_weights_are_refused(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantization 'awq'" in refusal(folder, dtype="float16")


def test_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(RefusalError, match=r"vLLM 0\.31\.0 has not been tested; tested: 0\.32\.0.*allow-untested"):
        coverage.check_versions(DeterministicConfig())
    coverage.check_versions(DeterministicConfig(allow_untested=True))


def test_device_that_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = "vllm.platforms.current_platform"
    assert current_device() is CPU
    monkeypatch.setattr(f"{platform}.is_cpu", lambda: False)
    with pytest.raises(RefusalError, match="device 'cpu' is not covered: serve on an NVIDIA GPU"):
        current_device()
    monkeypatch.setattr(f"{platform}.is_cuda", lambda: True)
    monkeypatch.setattr(f"{platform}.has_device_capability", lambda capability: capability <= (7, 5))
    monkeypatch.setattr(f"{platform}.get_device_name", lambda: "Tesla T4")
    with pytest.raises(RefusalError, match=r"Tesla T4 is not covered: .* sm_80"):
        current_device()
    monkeypatch.setattr(f"{platform}.has_device_capability", lambda capability: capability <= (8, 0))
    assert current_device() is CUDA


def test_architecture_refused_on_a_gpu_alone(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("mistral")
    config = EngineArgs(model=str(folder), dtype="bfloat16").create_engine_config()
    coverage.check_config(config, DeterministicConfig(), CPU)
    with pytest.raises(RefusalError, match="architecture MistralForCausalLM is not covered on this device"):
        coverage.check_config(config, DeterministicConfig(), CUDA)


@pytest.mark.parametrize(
    ("changes", "settings", "what"),
    [
        ({"dtype": "float32"}, {}, "dtype float32 is not covered on this device; covered: bfloat16, float16"),
        ({"block_size": 64}, {}, "block size 64 is not covered: --block-size must be a power of two from 16 to 32"),
        ({}, {"kv_split": 512}, "--deterministic-kv-split has no effect on a GPU yet"),
        ({}, {}, "only model runner V2 is covered"),
    ],
)
def test_refused_on_a_gpu(changes: dict[str, Any], settings: dict[str, Any], what: str, qwen3: Path) -> None:
    config = EngineArgs(model=str(qwen3), **{"dtype": "bfloat16", "block_size": 16, **changes}).create_engine_config()
    config.parallel_config.worker_cls = CUDA.vllm_worker
    with pytest.raises(RefusalError, match=re.escape(what)):
        coverage.check_config(config, DeterministicConfig(**settings), CUDA)


def test_attention_backend_of_the_other_device_is_refused(qwen3: Path) -> None:
    with pytest.raises(RefusalError, match="--attention-backend TRITON_ATTN cannot be used"):
        coverage.check_engine_args(EngineArgs(model=str(qwen3), attention_backend="TRITON_ATTN"), CUDA)
    coverage.check_engine_args(EngineArgs(model=str(qwen3), attention_backend="FLASH_ATTN"), CUDA)


def test_unknown_module_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.LayerNorm(8))
    with pytest.raises(RefusalError, match="module 1 of class LayerNorm"):
        coverage.check_model(model)
    coverage.check_model(model[:1])


@pytest.mark.parametrize(
    ("batch_invariant", "version", "what"),
    [(False, 3, "layer: FlashAttention 3, batch-invariant: False"), (True, 4, "layer: FlashAttention 4")],
)
def test_attention_in_more_than_one_split_is_refused(batch_invariant: bool, version: int, what: str) -> None:
    impl = object.__new__(FlashAttentionImpl)
    impl.batch_invariant_enabled, impl.vllm_flash_attn_version = True, 3
    model = torch.nn.Sequential(OrderedDict(layer=torch.nn.Identity()))
    model.layer.impl = impl
    coverage.check_flash_attention(model)
    impl.batch_invariant_enabled, impl.vllm_flash_attn_version = batch_invariant, version
    with pytest.raises(RefusalError, match=what):
        coverage.check_flash_attention(model)
    model.layer.impl = object()
    with pytest.raises(RefusalError, match="layer: attention by object is not covered"):
        coverage.check_flash_attention(model)


@pytest.mark.parametrize(
    ("feature", "what"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft-cap"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8"),
        ({"kv_sharing_target_layer_name": "other"}, "KV sharing"),
    ],
)
def test_refused_attention(feature: dict[str, Any], what: str) -> None:
    with pytest.raises(RefusalError, match=what):
        attention.DeterministicCPUAttentionImpl(
            num_heads=4, head_size=64, scale=0.125, num_kv_heads=2, **{"kv_cache_dtype": "auto", **feature}
        )
