"""What deterministic serving covers, and the refusal of all else before the server starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .config import DeterministicConfig, RefusalError
from .devices import CUDA, Device

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

TESTED_VERSIONS = ("0.32.0",)


def check_versions(deterministic: DeterministicConfig) -> None:
    """Refuse a vLLM that the tests have not run on.

    Raises:
        RefusalError: see above.
    """
    import vllm

    version = vllm.__version__.partition("+")[0]
    if version not in TESTED_VERSIONS and not deterministic.allow_untested:
        raise RefusalError(
            f"vLLM {version} has not been tested; tested: {', '.join(TESTED_VERSIONS)}. "
            "Install a tested version, or start with --deterministic-allow-untested and verify the server yourself."
        )


def check_engine_args(engine_args: "EngineArgs", device: Device) -> None:
    """Refuse a request for another attention backend before vLLM's CPU platform quietly ignores it.

    Raises:
        RefusalError: see above.
    """
    backend = engine_args.attention_backend or getattr(engine_args.attention_config, "backend", None)
    name = getattr(backend, "name", backend)
    if name not in (None, "auto", device.attention_backend):
        raise RefusalError(
            f"--attention-backend {name} cannot be used with deterministic serving, which brings its own: leave it out"
        )
    if getattr(engine_args.attention_config, "backend_per_kind", None):
        raise RefusalError("attention backends per kind of layer are not covered: leave them out")


def check_config(config: "VllmConfig", deterministic: DeterministicConfig, device: Device) -> None:
    """Refuse what has not been proven, with the first reason found.

    Raises:
        RefusalError: names the cause and the way out.
    """
    for reason in _uncovered(config, deterministic, device):
        raise RefusalError(reason)


def _uncovered(config: "VllmConfig", deterministic: DeterministicConfig, device: Device) -> Iterator[str]:
    yield from _uncovered_model(config.model_config, device)
    yield from _uncovered_cache(config, deterministic, device)
    yield from _uncovered_features(config, device)


def _uncovered_model(model: Any, device: Device) -> Iterator[str]:
    if model is None:
        yield "there is no model configuration: deterministic serving needs a text generation model"
        return
    if model.runner_type != "generate":
        yield f"runner '{model.runner_type}' is not covered: deterministic serving covers text generation"
    for architecture in model.architectures:
        if architecture not in device.architectures:
            yield (
                f"architecture {architecture} is not covered on this device (mixture of experts, multimodal, "
                f"state-space and encoder models are not proven yet); covered: {', '.join(device.architectures)}. "
                "Serve it without the flag."
            )
    if model.quantization is not None:
        yield f"quantization '{model.quantization}' is not covered: use unquantized weights"
    if getattr(model, "model_impl", "auto") == "transformers":
        yield "--model-impl transformers is not covered: use vLLM's own implementation"
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in device.dtypes:
        yield f"dtype {dtype} is not covered on this device; covered: {', '.join(device.dtypes)}"
    if model.head_dtype != model.dtype:
        yield f"an LM head in {model.head_dtype} is not covered: leave head_dtype out of --hf-overrides"
    if model.logits_processors:
        yield "custom logits processors are not covered: start without --logits-processors"
    if model.enable_prompt_embeds:
        yield "prompt embeddings are not covered: start without --enable-prompt-embeds"


def _uncovered_cache(config: "VllmConfig", deterministic: DeterministicConfig, device: Device) -> Iterator[str]:
    cache, largest = config.cache_config, device.largest_block or deterministic.kv_split
    if device is CUDA and deterministic.kv_split != DeterministicConfig.model_fields["kv_split"].default:
        yield "--deterministic-kv-split has no effect on a GPU yet, whose attention does not split: leave it out"
    if cache.cache_dtype != "auto":
        yield f"KV cache dtype '{cache.cache_dtype}' is not covered: leave --kv-cache-dtype at 'auto'"
    size = cache.block_size
    if size is not None and (size < 16 or size > largest or size & (size - 1)):
        yield f"block size {size} is not covered: --block-size must be a power of two from 16 to {largest}"
    if cache.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill is not covered: leave it out"
    if config.kv_transfer_config is not None:
        yield "KV transfer between servers is not covered: start without --kv-transfer-config"


def _uncovered_features(config: "VllmConfig", device: Device) -> Iterator[str]:
    parallel = config.parallel_config
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "data": parallel.data_parallel_size,
        "decode context": parallel.decode_context_parallel_size,
    }
    for name, size in sizes.items():
        if size != 1:
            yield f"{name} parallel size {size} is not covered: use 1 (for more throughput, run replicas)"
    if parallel.worker_cls != device.vllm_worker:
        yield f"worker class {parallel.worker_cls} is not covered: leave --worker-cls out"
    if config.use_v2_model_runner != (device.model_runner == 2):
        yield f"only model runner V{device.model_runner} is covered on this device: unset VLLM_USE_V2_MODEL_RUNNER"
    if config.lora_config is not None:
        yield "LoRA is not covered: start without --enable-lora"
    if config.speculative_config is not None:
        yield "speculative decoding is not covered: start without --speculative-config"
    if getattr(config, "watermark_config", None) is not None:
        yield "watermarking is not covered: start without it"


def check_model(model: "torch.nn.Module") -> None:
    """Walk the loaded model and refuse a module that computes by a road that nobody has made deterministic.

    Raises:
        RefusalError: names the module and its class.
    """
    covered = _covered_modules()
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) and type(module) not in covered:
            raise RefusalError(
                f"module {name} of class {type(module).__name__} is not covered by a deterministic implementation: "
                "serve this model without the flag"
            )


def check_flash_attention(model: "torch.nn.Module") -> None:
    """Refuse attention on a GPU that is not FlashAttention in one split, as vLLM's batch-invariant mode has it.

    Raises:
        RefusalError: names the layer and what it found.
    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    for name, module in model.named_modules():
        impl = getattr(module, "impl", None)
        if impl is None:
            continue
        if not isinstance(impl, FlashAttentionImpl):
            raise RefusalError(f"{name}: attention by {type(impl).__name__} is not covered: use FLASH_ATTN")
        if not impl.batch_invariant_enabled or impl.vllm_flash_attn_version not in (2, 3):
            raise RefusalError(
                f"{name}: FlashAttention {impl.vllm_flash_attn_version}, batch-invariant: "
                f"{impl.batch_invariant_enabled}. Only versions 2 and 3 in vLLM's batch-invariant mode are covered."
            )


def _covered_modules() -> frozenset[type]:
    from torch import nn
    from vllm.model_executor.layers import linear, rotary_embedding
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    return frozenset(
        {
            nn.Identity,
            linear.ColumnParallelLinear,
            linear.MergedColumnParallelLinear,
            linear.QKVParallelLinear,
            linear.ReplicatedLinear,
            linear.RowParallelLinear,
            # These compute their table of angles in their own way, once, and rotate as the base class does.
            rotary_embedding.RotaryEmbedding,
            rotary_embedding.Llama3RotaryEmbedding,
            rotary_embedding.LinearScalingRotaryEmbedding,
            rotary_embedding.YaRNScalingRotaryEmbedding,
            ApplyRotaryEmb,
            Attention,
            LogitsProcessor,
            ParallelLMHead,
            RMSNorm,
            SiluAndMul,
            VocabParallelEmbedding,
        }
    )
