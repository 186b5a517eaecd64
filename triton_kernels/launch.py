"""What every launcher asks of the device."""

import functools

import torch
from triton import knobs

MINIMUM_CAPABILITY = (8, 0)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that kernels are built for; (0, 0) under Triton's interpreter, which runs on CPU."""
    return (0, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


def programmatic_launch(x: torch.Tensor) -> bool:
    """Whether a kernel may be launched before the one ahead of it in the stream ends (Hopper and newer).

    Such a kernel calls ``gdc_wait`` before it reads or writes anything, weights too, which the kernel ahead may be
    updating. It may ask for lines into the cache before that: what is written to them meanwhile is still seen. Only the
    kernels of attention know what the one ahead writes, and read other things before it ends (``attention_kernel``).
    """
    return capability(x.device) >= (9, 0)


def check_device(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor that no kernel can run on.

    Raises:
        ValueError: names the tensor, its device and what is allowed.
    """
    if x.device.type == "cpu" and knobs.runtime.interpret:
        return
    if x.device.type != "cuda":
        raise ValueError(f"{name} is on {x.device}; the Triton kernels need a CUDA device")
    if capability(x.device) < MINIMUM_CAPABILITY:
        major, minor = capability(x.device)
        raise ValueError(f"{name} is on a device of architecture sm_{major}{minor}; sm_80 or newer is needed")
