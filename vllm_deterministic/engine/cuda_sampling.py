"""What takes the place of parts of vLLM's GPU sampler, model runner V2's."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.token_logprobs import token_logprobs
from vllm_deterministic.triton_kernels.top_k import LARGEST_K, top_k
from vllm_deterministic.triton_kernels.top_k_top_p import top_k_top_p


class WithoutFusion:
    """A Triton kernel each of whose operations rounds by itself.

    Triton compiles a kernel anew for another dtype or alignment, both of which neighbours may change; which products
    and sums are then fused into one rounding is the compiler's choice.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        return functools.partial(self._kernel[grid], enable_fp_fusion=False)


def limiting(_apply_top_k_top_p: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What takes the place of ``apply_top_k_top_p``."""

    def apply_top_k_top_p(
        logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None, has_topp_only_rows: bool = True
    ) -> torch.Tensor:
        # vLLM 0.33 tells what is in the batch, by which its own kernel is chosen; here one serves every batch.
        return top_k_top_p(logits, k, p)

    return apply_top_k_top_p


def scoring(_compute_token_logprobs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What takes the place of ``compute_token_logprobs``."""

    def compute_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return token_logprobs(logits, token_ids.to(torch.int64))

    return compute_token_logprobs


def bias_in_turns(apply_logit_bias: Callable[..., None]) -> Callable[..., None]:
    """``apply_logit_bias`` in a launch each for allowed ids, biases and stop ids: each sees what the last one wrote."""

    @functools.wraps(apply_logit_bias)
    def in_turns(
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        pos: torch.Tensor,
        num_allowed_token_ids: torch.Tensor,
        allowed_token_ids: torch.Tensor,
        num_logit_bias: torch.Tensor,
        logit_bias_token_ids: torch.Tensor,
        logit_bias: torch.Tensor,
        min_lens: torch.Tensor,
        num_stop_token_ids: torch.Tensor,
        *rest: Any,
    ) -> None:
        none = torch.zeros_like(num_logit_bias)
        for allowed, biased, stopped in (
            (num_allowed_token_ids, none, none),
            (none, num_logit_bias, none),
            (none, none, num_stop_token_ids),
        ):
            apply_logit_bias(
                logits,
                expanded_idx_mapping,
                pos,
                allowed,
                allowed_token_ids,
                biased,
                logit_bias_token_ids,
                logit_bias,
                min_lens,
                stopped,
                *rest,
            )

    return in_turns


class TorchWithOrderedTopk:
    """``torch`` as vLLM's GPU logprobs see it: its ``topk``, which picks candidates, orders ties by ascending id."""

    # Elements of one call: their keys take 32 MiB.
    CHUNK: ClassVar[int] = 1 << 22
    # The values of k that our kernel is compiled for, of which the first ones are taken: what vLLM allows by default,
    # so that serving does not stop to compile, and all that the kernel can.
    COMPILED: ClassVar[tuple[int, ...]] = (20, LARGEST_K)

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def topk(self, x: torch.Tensor, k: int, dim: int = -1) -> torch.return_types.topk:
        """The ``k`` largest of each row of ``[B, V]``; both ways below give the same."""
        for compiled in self.COMPILED if x.is_cuda else ():
            if k <= compiled <= x.shape[-1]:
                return torch.return_types.topk(tuple(largest[:, :k] for largest in top_k(x, compiled)))
        rows = max(1, self.CHUNK // x.shape[-1])
        # Adding zero makes -0 and 0 equal, as they are in a comparison.
        values, ids = zip(*(reference.top_logprobs(part.float() + 0.0, k) for part in x.split(rows)), strict=True)
        return torch.return_types.topk((torch.cat(values), torch.cat(ids)))
