"""The operations of ``triton_kernels`` as opaque torch operations: compiled and eager code run the same kernels.

A compiler may not look inside: it would fuse element-wise code with wider intermediates, and would freeze one choice of
tile for every number of rows. Here are the schemas, and what runs on CPU; ``cuda_ops.py`` has what runs on GPUs.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from vllm_deterministic.triton_kernels import reference

from .linear import RowTiledLinear

_Op = TypeVar("_Op", bound=Callable[..., Any])
_library = torch.library.Library("vllm_deterministic", "FRAGMENT")


def define(schema: str, fake: Callable[..., Any], device: str = "CPU") -> Callable[[_Op], _Op]:
    """Define ``torch.ops.vllm_deterministic.<name>``; the decorated function runs it on ``device``."""
    name = _library.define(schema)
    torch.library.register_fake(f"vllm_deterministic::{name}", fake, lib=_library)
    return implement(name, device)


def implement(name: str, device: str) -> Callable[[_Op], _Op]:
    """The decorated function runs a defined operation on ``device``."""

    def decorate(function: _Op) -> _Op:
        _library.impl(name, function, device)
        return function

    return decorate


@define(
    "linear(Tensor x, Tensor? bias, str layer) -> Tensor",
    lambda x, bias, layer: x.new_empty((*x.shape[:-1], RowTiledLinear.named[layer].out_features)),
)
def _linear(x: torch.Tensor, bias: torch.Tensor | None, layer: str) -> torch.Tensor:
    return RowTiledLinear.named[layer](x, bias)


@define(
    "rms_norm(Tensor x, Tensor? weight, float epsilon) -> Tensor",
    lambda x, weight, epsilon: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return reference.rms_norm(x, weight, epsilon)


@define(
    "fused_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float epsilon) -> (Tensor, Tensor)",
    lambda x, residual, weight, epsilon: (torch.empty_like(x), torch.empty_like(x)),
)
def _fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.fused_add_rms_norm(x, residual, weight, epsilon)


@define("silu_and_mul(Tensor x) -> Tensor", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return reference.silu_and_mul(x)


@define(
    "rotary_embedding(Tensor positions, Tensor x, Tensor cos_sin_cache, int head_size, bool is_neox_style) -> Tensor",
    lambda positions, x, cos_sin_cache, head_size, is_neox_style: x.new_empty(x.shape),
)
def _rotary_embedding(
    positions: torch.Tensor, x: torch.Tensor, cos_sin_cache: torch.Tensor, head_size: int, is_neox_style: bool
) -> torch.Tensor:
    return reference.rotary_embedding(positions, x, cos_sin_cache, head_size, is_neox_style)
