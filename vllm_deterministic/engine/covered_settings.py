"""The gaps in an engine's settings: what has not been proven, found before anything is built."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .architectures import open_cells
from .config import FLAG, DeterministicConfig, RefusalError
from .coverage import Entry
from .devices import CUDA, Device
from .requests import refused_in_requests

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

TESTED_VERSIONS = ("0.32.0",)
# Their files are what the fingerprint is taken of; dummy weights follow from the model's configuration.
LOAD_FORMATS = ("auto", "hf", "safetensors", "mistral", "pt", "dummy")
_WITHOUT_FLAG = f"serve it without {FLAG}"
_UNPROVEN = "it is not proven yet"
# What of an architecture a setting switches off, and which: of a config, whether it is off.
_SWITCHES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prefix cache": (lambda config: not config.cache_config.enable_prefix_caching, "--no-enable-prefix-caching"),
    "chunks": (lambda config: not config.scheduler_config.enable_chunked_prefill, "--no-enable-chunked-prefill"),
    "compiled and CUDA graphs": (lambda config: config.model_config.enforce_eager, "--enforce-eager"),
    "async scheduling": (lambda config: not config.scheduler_config.async_scheduling, "--no-async-scheduling"),
}


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
    """Refuse what another part would take the place of: the attention backend and the worker are the plugin's own.

    Raises:
        RefusalError: see above.
    """
    backend = engine_args.attention_backend or getattr(engine_args.attention_config, "backend", None)
    # Of an enumeration, or as it was written, which vLLM takes in any case.
    name = str(getattr(backend, "name", backend or "auto")).upper()
    if name not in ("AUTO", device.attention_backend[0]):
        raise RefusalError(
            f"--attention-backend {name} cannot be used with deterministic serving, which brings its own: leave it out"
        )
    if getattr(engine_args.attention_config, "backend_per_kind", None):
        raise RefusalError("attention backends per kind of layer are not covered: leave them out")


def check_worker(config: "VllmConfig", device: Device) -> None:
    """Refuse another worker than the one that the plugin's takes the place of.

    Raises:
        RefusalError: see above.
    """
    worker = config.parallel_config.worker_cls
    if worker != device.vllm_worker:
        raise RefusalError(f"worker class {worker} is not covered: leave --worker-cls out")


def setting_gaps(config: "VllmConfig", deterministic: DeterministicConfig, device: Device) -> tuple[Entry, ...]:
    """What is not covered of an engine's settings, in the order in which it would be refused."""
    return (
        *_model_gaps(config.model_config, device),
        *_open_cells(config, deterministic, device),
        *_weight_gaps(config),
        *_cache_gaps(config, deterministic, device),
        *_feature_gaps(config, device),
    )


def _gap(name: str, why: str, option: str, *, can_start: bool = True) -> Entry:
    return Entry("settings", name, why=why, option=option, can_start=can_start)


def _model_gaps(model: Any, device: Device) -> Iterator[Entry]:
    if model is None:
        yield _gap("an engine without a model", "only text generation is", _WITHOUT_FLAG, can_start=False)
        return
    if model.runner_type != "generate":
        yield _gap(f"runner '{model.runner_type}'", "only text generation is", _WITHOUT_FLAG)
    for architecture in model.architectures:
        if architecture not in device.architectures:
            yield _gap(
                f"architecture {architecture}",
                f"covered on this device are {', '.join(device.architectures)} (mixture of experts, multimodal, "
                "state-space and encoder models are not proven yet)",
                _WITHOUT_FLAG,
            )
    if model.quantization is not None:
        yield _gap(f"quantization '{model.quantization}'", _UNPROVEN, "use unquantized weights")
    if getattr(model, "model_impl", "auto") == "transformers":
        yield _gap("--model-impl transformers", _UNPROVEN, "use vLLM's own implementation")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in device.dtypes:
        yield _gap(f"dtype {dtype}", _UNPROVEN, f"choose --dtype from {', '.join(device.dtypes)}")
    if model.head_dtype != model.dtype:
        yield _gap(f"an LM head in {model.head_dtype}", _UNPROVEN, "leave head_dtype out of --hf-overrides")
    if model.logits_processors:
        yield _gap("custom logits processors", "what they compute is unknown", "start without --logits-processors")
    if model.enable_prompt_embeds:
        yield _gap("prompt embeddings", _UNPROVEN, "start without --enable-prompt-embeds")


def _open_cells(config: "VllmConfig", deterministic: DeterministicConfig, device: Device) -> Iterator[Entry]:
    if device is not CUDA or config.model_config is None:
        return
    for architecture in config.model_config.architectures:
        still_open = open_cells().get(architecture, ())
        if not deterministic.allow_uncovered:
            refused = refused_in_requests([architecture], device)
            still_open = tuple(cell for cell in still_open if cell not in refused)
        switched_on = [cell for cell in still_open if cell in _SWITCHES and not _SWITCHES[cell][0](config)]
        for cell in switched_on:
            yield _gap(f"architecture {architecture} with {cell}", _UNPROVEN, f"start with {_SWITCHES[cell][1]}")
        if always := [cell for cell in still_open if cell not in _SWITCHES]:
            yield _gap(f"architecture {architecture} with {', '.join(always)}", _UNPROVEN, _WITHOUT_FLAG)


def _weight_gaps(config: "VllmConfig") -> Iterator[Entry]:
    load_format = config.load_config.load_format
    if load_format not in LOAD_FORMATS:
        yield _gap(
            f"load format '{load_format}'",
            "the fingerprint cannot tell which weights it loads",
            f"choose --load-format from {', '.join(LOAD_FORMATS)}",
        )
    if config.weight_transfer_config is not None:
        yield _gap(
            "weight transfer",
            "the fingerprint would not follow weights that are replaced while serving",
            "start without --weight-transfer-config",
        )


def _cache_gaps(config: "VllmConfig", deterministic: DeterministicConfig, device: Device) -> Iterator[Entry]:
    cache, largest = config.cache_config, deterministic.kv_split
    if device is not CUDA and deterministic.attention != "triton":
        why = "attention on CPU has one road of its own"
        yield _gap(f"--deterministic-attention {deterministic.attention}", why, "leave it out", can_start=False)
    # The attention is the plugin's own and knows neither another dtype nor blocks that do not divide a split.
    if cache.cache_dtype != "auto":
        yield _gap(
            f"KV cache dtype '{cache.cache_dtype}'", _UNPROVEN, "leave --kv-cache-dtype at 'auto'", can_start=False
        )
    size = cache.block_size
    if size is not None and (size < 16 or size > largest or size & (size - 1)):
        yield _gap(
            f"block size {size}",
            f"--block-size must be a power of two from 16 to {largest}",
            "choose such a size",
            can_start=False,
        )
    if cache.kv_sharing_fast_prefill:
        yield _gap("--kv-sharing-fast-prefill", _UNPROVEN, "leave it out")
    if config.kv_transfer_config is not None:
        yield _gap("KV transfer between servers", _UNPROVEN, "start without --kv-transfer-config")


def _feature_gaps(config: "VllmConfig", device: Device) -> Iterator[Entry]:
    runner = 2 if config.use_v2_model_runner else 1
    if runner != device.model_runner:
        # On CPU a subclass takes the place of V1's.
        yield _gap(
            f"model runner V{runner}",
            f"only V{device.model_runner} is on this device, and vLLM takes it where it knows the model",
            "unset VLLM_USE_V2_MODEL_RUNNER",
            can_start=device is CUDA,
        )
    parallel = config.parallel_config
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "data": parallel.data_parallel_size,
        "decode context": parallel.decode_context_parallel_size,
    }
    for name, size in sizes.items():
        if size != 1:
            yield _gap(f"{name} parallel size {size}", _UNPROVEN, "use 1 (for more throughput, run replicas)")
    if config.lora_config is not None:
        yield _gap("LoRA", _UNPROVEN, "start without --enable-lora")
    if config.speculative_config is not None:
        # On CPU vLLM's rejection sampler draws from torch generators, which the deterministic runner does not have.
        yield _gap("speculative decoding", _UNPROVEN, "start without --speculative-config", can_start=device is CUDA)
    if getattr(config, "watermark_config", None) is not None:
        yield _gap("watermarking", _UNPROVEN, "start without it")
