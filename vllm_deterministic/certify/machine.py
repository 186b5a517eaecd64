"""The GPU at hand and everything else that a verdict is conditional on."""

import ctypes

import torch
import triton

from vllm_deterministic import __version__
from vllm_deterministic.triton_kernels import tile_table
from vllm_deterministic.triton_kernels.cublaslt import cublaslt
from vllm_deterministic.triton_kernels.launch import MINIMUM_CAPABILITY, capability


def cuda_device() -> torch.device:
    """The current CUDA device.

    Raises:
        ValueError: there is none, or it is too old.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device: certify runs on the GPU that is to serve")
    device = torch.device("cuda", torch.cuda.current_device())
    if capability(device) < MINIMUM_CAPABILITY:
        (major, minor), needed = capability(device), "".join(map(str, MINIMUM_CAPABILITY))
        raise ValueError(f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; sm_{needed} or newer is needed")
    return device


def identity(device: torch.device) -> dict[str, str]:
    """Everything that a verdict is conditional on; ``TABLE_VERSION`` follows the kernel's own source too."""
    library = cublaslt(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cublaslt": str(library.version) if library else "absent",
        "tiles": tile_table.TABLE_VERSION,
        "vllm-deterministic": __version__,
    }


def _driver_version() -> str:
    """The NVIDIA driver's version, from NVML, which comes with every driver; torch tells only the CUDA version."""
    version = ctypes.create_string_buffer(80)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
            return "unknown"
    except (OSError, AttributeError):
        return "unknown"
    return version.value.decode(errors="replace")
