"""The batch-invariant operations in plain torch: the road for devices without Triton.

Every function keeps one promise: the bytes of an output row depend on that row's inputs alone, never on the number,
position or content of the other rows.
"""

from .activation import silu_and_mul
from .attention import merge, split_partial
from .attention_plan import plan_attention
from .log_softmax import log_softmax, softmax
from .matmul import matmul
from .paged_attention import paged_attention
from .rms_norm import fused_add_rms_norm, rms_norm
from .rotary_embedding import rotary_embedding
from .sampling import greedy_sample, noise_seed, top_k_top_p, top_logprobs

__all__ = [
    "fused_add_rms_norm",
    "greedy_sample",
    "log_softmax",
    "matmul",
    "merge",
    "noise_seed",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "softmax",
    "split_partial",
    "top_k_top_p",
    "top_logprobs",
]
