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
    "Tensor cos_sin_cache, int head_size, bool is_neox_style) -> (Tensor, Tensor)",
    _fake_rotation,
    device="CUDA",
)(qk_norm_rotary_embedding)


@define(
    "matmul(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    lambda x, w, bias: x.new_empty((*x.shape[:-1], w.shape[0])),
    device="CUDA",
)
def _matmul(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return PlannedMatmul.run(x, w, bias)
