"""Sampling whose outcome depends on (seed, output position, vocabulary id) alone, and logprobs with ordered ties."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from vllm_deterministic.triton_kernels import reference


def default_seed(server_seed: int, prompt_token_ids: Sequence[int] | None) -> int:
    """The seed of a request that brings none: 31 bits of SHA-256 over the server's seed and the prompt's token ids.

    Equal prompts get equal seeds; vLLM adds the index of the choice for each of a request's ``n`` choices.
    """
    content = f"{server_seed}:{','.join(map(str, prompt_token_ids or ()))}"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class NoiseStream:
    """The noise of one request, in the place of its ``torch.Generator``.

    ``output_token_ids`` is the request's own growing list: its length is the position, so that a step whose sample is
    thrown away leaves nothing to rewind.
    """

    seed: int
    output_token_ids: Sequence[int]

    def noise_seed(self) -> int:
        """The seed of the noise at the request's next position."""
        return reference.noise_seed(self.seed, len(self.output_token_ids))

    def get_offset(self) -> int:
        """Part of the generator's interface that vLLM uses to rewind."""
        return 0

    def set_offset(self, offset: int) -> None:
        """See ``get_offset``."""


class DeterministicTopKTopPSampler(nn.Module):
    """Top-k, top-p and the draw, each row by itself."""

    def __init__(self, logprobs_mode: str) -> None:
        super().__init__()
        self.logprobs_mode = logprobs_mode

    def forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, Any],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids ``[B]`` and, where the server reports processed values, logits or logprobs ``[B, V]``.

        Rows without a stream are greedy and their draw is thrown away: the model runner sees to that.
        """
        logits = reference.top_k_top_p(logits, k, p)
        processed = None
        if self.logprobs_mode == "processed_logits":
            processed = logits
        elif self.logprobs_mode == "processed_logprobs":
            processed = reference.log_softmax(logits)
        seeds = [generators[row].noise_seed() if row in generators else 0 for row in range(len(logits))]
        # vLLM's kernel keys its noise by (row seed, vocabulary id).
        ids = torch.ops._C.fused_gumbel_argmax(logits.float().contiguous(), torch.tensor(seeds, dtype=torch.int64))
        return ids, processed


class DeterministicSampler(Sampler):
    """vLLM's sampler with its reductions, ties and noise replaced."""

    def __init__(self, logprobs_mode: str) -> None:
        super().__init__(logprobs_mode)
        self.topk_topp_sampler = DeterministicTopKTopPSampler(logprobs_mode)

    @staticmethod
    def greedy_sample(logits: torch.Tensor) -> torch.Tensor:
        """See ``reference.greedy_sample``."""
        return reference.greedy_sample(logits)

    @staticmethod
    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        """See ``reference.log_softmax``."""
        return reference.log_softmax(logits)

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        """The logprob of each row's token, then its ``num_logprobs`` largest, ties by ascending id.

        Args:
            logprobs: ``[B, V]`` fp32.
            num_logprobs: how many.
            token_ids: ``[B]`` int64.
        """
        top, top_ids = reference.top_logprobs(logprobs, num_logprobs)
        token_ids = token_ids.unsqueeze(-1)
        chosen = logprobs.gather(-1, token_ids)
        # A count is exact in any order; vLLM compiles it, which stalls the first request that asks for logprobs.
        ranks = (logprobs >= chosen).sum(-1)
        ids = torch.cat((token_ids, top_ids), dim=1).to(torch.int32)
        return LogprobsTensors(ids, torch.cat((chosen, top), dim=1), ranks)
