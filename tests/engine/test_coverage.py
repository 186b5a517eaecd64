"""What is not covered is refused before the engine starts, with the cause and the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import registry

from vllm_deterministic.engine import attention, covered_settings, plugin
from vllm_deterministic.engine.config import DeterministicConfig, RefusalError
from vllm_deterministic.engine.coverage import Coverage, Entry
from vllm_deterministic.engine.covered_settings import setting_gaps
from vllm_deterministic.engine.cuda_attention import DeterministicCUDAAttentionBackend
from vllm_deterministic.engine.devices import CPU, CUDA, current_device, register_attention

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
        ({"load_format": "tensorizer"}, "load format 'tensorizer'"),
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
    assert "To avoid it: serve it without --enable-deterministic" in text


def test_quantized_weights_are_refused(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantization 'awq'" in refusal(folder, dtype="float16")


def test_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(RefusalError, match=r"vLLM 0\.31\.0 has not been tested; tested: 0\.32\.0.*allow-untested"):
        covered_settings.check_versions(DeterministicConfig())
    covered_settings.check_versions(DeterministicConfig(allow_untested=True))


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


@pytest.mark.parametrize(
    ("changes", "settings", "what"),
    [
        ({"dtype": "float32"}, {}, "dtype float32 is not covered"),
        ({"block_size": 256}, {"kv_split": 128}, "block size 256 is not covered: --block-size must be a power of two"),
    ],
)
def test_refused_on_a_gpu(
    changes: dict[str, Any], settings: dict[str, Any], what: str, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covered_settings, "open_cells", dict)
    config = EngineArgs(model=str(qwen3), **{"dtype": "bfloat16", "block_size": 16, **changes}).create_engine_config()
    gap, runner = setting_gaps(config, DeterministicConfig(**settings), CUDA)
    assert what in gap.refusal
    assert runner.name == "model runner V1"


def test_attention_backend_of_the_other_device_is_refused(qwen3: Path) -> None:
    with pytest.raises(RefusalError, match="--attention-backend TRITON_ATTN cannot be used"):
        covered_settings.check_engine_args(EngineArgs(model=str(qwen3), attention_backend="TRITON_ATTN"), CUDA)
    covered_settings.check_engine_args(EngineArgs(model=str(qwen3), attention_backend="CUSTOM"), CUDA)


def test_attention_of_another_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {registry.AttentionBackendEnum.CUSTOM: "theirs.Backend"})
    with pytest.raises(RefusalError, match=r"CUSTOM is theirs\.Backend in this process"):
        register_attention(CUDA)
    registry.AttentionBackendEnum.CUSTOM.clear_override()
    register_attention(CUDA)
    register_attention(CUDA)
    assert registry.AttentionBackendEnum.CUSTOM.get_class() is DeterministicCUDAAttentionBackend


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


COVERED = Entry("modules", "RMSNorm", covered_by="rms_norm", modules=("a.norm", "b.norm"))
GAP = Entry("modules", "LayerNorm", modules=("c.norm",), why="it is not proven", option="leave it out")


def test_a_gap_is_refused_unless_it_was_accepted() -> None:
    Coverage("model", "cpu", (COVERED,)).refuse()
    with pytest.raises(RefusalError) as refused:
        Coverage("model", "cpu", (COVERED, GAP)).refuse()
    assert str(refused.value) == (
        "LayerNorm (module c.norm, 1 in all) is not covered: it is not proven. To avoid it: leave it out. "
        "Or start without the promise: --deterministic-allow-uncovered."
    )
    Coverage("model", "cpu", (COVERED, GAP), allow_uncovered=True).refuse()


def test_what_would_compute_something_else_is_refused_though_accepted(qwen3: Path) -> None:
    accepted = {"additional_config": {"deterministic": {"allow_uncovered": True}}}
    assert EngineArgs(model=str(qwen3), enable_lora=True, **accepted).create_engine_config() is not None
    with pytest.raises(RefusalError, match="block size 48") as refused:
        EngineArgs(model=str(qwen3), block_size=48, **accepted).create_engine_config()
    assert "allow-uncovered" not in str(refused.value)


def test_table_and_file_tell_the_same(tmp_path: Path) -> None:
    found = Coverage("model", "cpu", (COVERED, GAP), allow_uncovered=True)
    head, _, first, second = found.table().splitlines()
    assert head == "coverage of model on cpu: NOT DETERMINISTIC, not covered: LayerNorm"
    assert first.split() == ["modules", "RMSNorm", "2", "rms_norm"]
    assert second.endswith("NOT COVERED: it is not proven")
    path = tmp_path / "coverage.json"
    found.write(path)
    written = json.loads(path.read_text())
    assert written == found.to_json()
    assert (written["schema_version"], written["deterministic"], written["allow_uncovered"]) == (1, False, True)
    assert [entry["covered_by"] for entry in written["entries"]] == ["rms_norm", None]
    assert written["entries"][1]["option"] == "leave it out"
    found.write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["coverage.json"]
    with pytest.raises(RefusalError, match=r"cannot write .*: No such file"):
        found.write(tmp_path / "nowhere" / "coverage.json")


def test_refused_settings_are_in_the_file(qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "coverage.json"
    with pytest.raises(RefusalError):
        EngineArgs(
            model=str(qwen3), enable_lora=True, additional_config={"deterministic": {"coverage_file": str(path)}}
        ).create_engine_config()
    assert [entry["name"] for entry in json.loads(path.read_text())["entries"]] == ["LoRA"]
