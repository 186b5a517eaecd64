"""What the operations run on a GPU: the launchers of ``triton_kernels``."""

import torch

from vllm_deterministic.triton_kernels.activation import silu_and_mul
from vllm_deterministic.triton_kernels.rms_norm import fused_add_rms_norm, rms_norm
from vllm_deterministic.triton_kernels.rotary_embedding import (
    qk_norm_rotary_embedding,
    qk_rotary_embedding,
    rotary_embedding,
)

from .cuda_linear import PlannedMatmul
from .ops import define, implement

implement("silu_and_mul", "CUDA")(silu_and_mul)


@define(
    "matmul(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    lambda x, w, bias: x.new_empty((*x.shape[:-1], w.shape[0])),
    device="CUDA",
)
def _matmul(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return PlannedMatmul.run(x, w, bias)


@implement("rms_norm", "CUDA")
def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return rms_norm(x, weight, epsilon)


@implement("fused_add_rms_norm", "CUDA")
def _fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return fused_add_rms_norm(x, residual, weight, epsilon)


@implement("rotary_embedding", "CUDA")
def _rotary_embedding(
    positions: torch.Tensor, x: torch.Tensor, cos_sin_cache: torch.Tensor, head_size: int, is_neox_style: bool
) -> torch.Tensor:
    return rotary_embedding(positions, x, cos_sin_cache, head_size, is_neox_style)


@define(
    "qk_rotary_embedding(Tensor positions, Tensor q, Tensor k, Tensor cos_sin_cache, int head_size, "
    "bool is_neox_style) -> (Tensor, Tensor)",
    lambda positions, q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    device="CUDA",
)
def _qk_rotary_embedding(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return qk_rotary_embedding(positions, q, k, cos_sin_cache, head_size, is_neox_style)


@define(
    "qk_norm_rotary_embedding(Tensor positions, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float epsilon, "
    "Tensor cos_sin_cache, int head_size, bool is_neox_style) -> (Tensor, Tensor)",
    lambda positions, q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    device="CUDA",
)
def _qk_norm_rotary_embedding(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    epsilon: float,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return qk_norm_rotary_embedding(
        positions, q, k, q_weight, k_weight, epsilon, cos_sin_cache, head_size, is_neox_style
    )
