"""What the operations run on a GPU: the launchers of ``triton_kernels``."""

import torch

from vllm_deterministic.triton_kernels.activation import gelu, gelu_and_mul, silu_and_mul
from vllm_deterministic.triton_kernels.layer_norm import layer_norm
from vllm_deterministic.triton_kernels.rms_norm import fused_add_rms_norm, rms_norm
from vllm_deterministic.triton_kernels.rotary_embedding import (
    qk_norm_rotary_embedding,
    qk_rotary_embedding,
    rotary_embedding,
)
from vllm_deterministic.triton_kernels.soft_cap import soft_cap

from .cuda_linear import PlannedMatmul
from .ops import define, implement


def _fake_rotation(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


implement("rms_norm", "CUDA")(rms_norm)
implement("fused_add_rms_norm", "CUDA")(fused_add_rms_norm)
implement("silu_and_mul", "CUDA")(silu_and_mul)
implement("rotary_embedding", "CUDA")(rotary_embedding)
define(
    "qk_rotary_embedding(Tensor positions, Tensor q, Tensor k, Tensor cos_sin_cache, int head_size, "
    "bool is_neox_style) -> (Tensor, Tensor)",
    _fake_rotation,
    device="CUDA",
)(qk_rotary_embedding)
define(
    "qk_norm_rotary_embedding(Tensor positions, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float epsilon, "
    "Tensor cos_sin_cache, int head_size, bool is_neox_style, float weight_offset) -> (Tensor, Tensor)",
    _fake_rotation,
    device="CUDA",
)(qk_norm_rotary_embedding)


def _fake_row(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor", _fake_row, device="CUDA")(
    layer_norm
)
define("gelu(Tensor x, str approximate) -> Tensor", _fake_row, device="CUDA")(gelu)
define("soft_cap(Tensor x, float cap) -> Tensor", _fake_row, device="CUDA")(soft_cap)
define(
    "gelu_and_mul(Tensor x, str approximate) -> Tensor",
    lambda x, approximate: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    device="CUDA",
)(gelu_and_mul)


@define("gemma_rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", _fake_row, device="CUDA")
def _gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return rms_norm(x, weight, epsilon, weight_offset=1.0)


@define(
    "fused_add_gemma_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    lambda x, residual, weight, epsilon: (x.new_empty(x.shape), x.new_empty(x.shape)),
    device="CUDA",
)
def _fused_add_gemma_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return fused_add_rms_norm(x, residual, weight, epsilon, weight_offset=1.0)


@define(
    "matmul(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    lambda x, w, bias: x.new_empty((*x.shape[:-1], w.shape[0])),
    device="CUDA",
)
def _matmul(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return PlannedMatmul.run(x, w, bias)
