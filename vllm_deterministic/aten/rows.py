"""Reductions of PyTorch on the batch-invariant kernels: each row adds up in an order that follows its length alone."""

from collections.abc import Callable, Sequence

import torch

from vllm_deterministic.triton_kernels import layer_norm as layer_norm_kernel
from vllm_deterministic.triton_kernels import mean as mean_kernel
from vllm_deterministic.triton_kernels import rms_norm as rms_norm_kernel
from vllm_deterministic.triton_kernels import softmax as softmax_kernel


def mean(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The mean over some dimensions, all of them for None or none, accumulated in fp32."""
    x = x if dtype is None else x.to(dtype)
    if x.dim() == 0:
        return x.clone()
    places = range(x.dim())
    reduced = sorted(places[d] for d in dim or places)  # IndexError where there is no such dimension
    kept = [d for d in places if d not in reduced]
    rows = x.permute(*kept, *reduced).reshape(*(x.shape[d] for d in kept), -1)
    out = mean_kernel.mean(rows, -1)
    return out.view([1 if d in reduced else size for d, size in enumerate(x.shape)]) if keepdim else out


def softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """The softmax along ``dim``, in fp32, rounded once to ``x.dtype`` unless ``half_to_float``."""
    return _along(softmax_kernel.softmax, x, dim, half_to_float)


def log_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """The logarithm of the softmax, as above."""
    return _along(softmax_kernel.log_softmax, x, dim, half_to_float)


def rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """``F.rms_norm``; without ``eps`` that of fp32, in which the mean is taken."""
    _check(x, shape)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return rms_norm_kernel.rms_norm(x.flatten(-len(shape)), _flat(weight), eps).view(x.shape)


def layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """``F.layer_norm``."""
    _check(x, shape)
    weight, bias = _flat(weight), _flat(bias)
    return layer_norm_kernel.layer_norm(x.flatten(-len(shape)), weight, bias, eps).view(x.shape)


def _along(
    kernel: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dim: int, half_to_float: bool
) -> torch.Tensor:
    rows = x.reshape(1) if x.dim() == 0 else x.movedim(dim, -1)
    out = kernel(rows).to(torch.float32 if half_to_float else x.dtype)
    return out.reshape(()) if x.dim() == 0 else out.movedim(-1, dim).contiguous()


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.flatten()


def _check(x: torch.Tensor, shape: Sequence[int]) -> None:
    if not shape or list(x.shape[-len(shape) :]) != list(shape):
        raise RuntimeError(f"the norm is over {list(shape)}, but the input has shape {list(x.shape)}")
