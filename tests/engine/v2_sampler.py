"""vLLM's sampler of model runner V2 without a model: rows of logits with parameters, alone and among others."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

PROMPT = (3, 5, 8, 13, 21, 5)
# The third word ends with what follows the last token of the output; 8 follows a word that was not said.
OUTPUT = (7, 5, 7, 11)
BAD_WORDS = [[7], [11, 2], [9, 8], [5, 7, 11, 4]]
# What SamplingParams takes but `bad_words`, which needs a tokenizer.
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy with logprobs": {"temperature": 0, "logprobs": 5},
    "temperature 1": {"temperature": 1.0},
    "temperature": {"temperature": 0.6, "logprobs": 0},
    "hot": {"temperature": 2.0, "logprobs": 1},
    "top-k": {"top_k": 20, "logprobs": 20},
    "top-k of one": {"top_k": 1},
    "large top-k": {"top_k": 300},
    "top-p": {"top_p": 0.95},
    "small top-p": {"top_p": 0.1, "temperature": 0.8},
    "top-k and top-p": {"top_k": 20, "top_p": 0.95, "temperature": 0.6, "logprobs": 3},
    "top-p of many": {"top_k": 250, "top_p": 0.999, "temperature": 2.0},
    "min-p": {"min_p": 0.1, "temperature": 1.3},
    "repetition": {"repetition_penalty": 1.3},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": -0.4, "repetition_penalty": 0.9, "top_p": 0.9},
    "greedy penalties": {"temperature": 0, "frequency_penalty": 1.5},
    "bias": {"logit_bias": {4: 5.0, 11: -100.0, 17: 1.25}, "logprobs": 2},
    "allowed": {"allowed_token_ids": [2, 9, 4, 100, 17], "logprobs": 1},
    "allowed and biased": {"allowed_token_ids": list(range(3, 90)), "logit_bias": {88: 3.0, 3: 2.0, 40: -1.0}},
    "bad words": {"temperature": 0.9, "_bad_words_token_ids": BAD_WORDS},
    "no stop yet": {"min_tokens": 9, "stop_token_ids": [2, 4], "logit_bias": {4: 50.0}},
    "logprobs of ids": {"logprob_token_ids": [1, 4, 9], "temperature": 0},
}


@dataclass(frozen=True)
class Row:
    """One request at its last position: logits ``[V]`` and what it asks for."""

    name: str
    logits: torch.Tensor
    params: SamplingParams


@dataclass(frozen=True)
class Answer:
    """What came of a row. ``logits``: processed, ``[V]`` fp32."""

    token: int
    rank: int
    logprobs: tuple[tuple[int, str], ...]
    logits: torch.Tensor

    def differs(self, other: "Answer") -> str:
        """What differs, empty if nothing does."""
        for name in ("token", "rank", "logprobs"):
            if getattr(self, name) != getattr(other, name):
                return f"{name}: {getattr(self, name)}, not {getattr(other, name)}"
        return "" if torch.equal(self.logits, other.logits) else "processed logits"


def rows(width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Each parameter on logits of several kinds: spread, full of ties, all equal, mostly -inf."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(width, generator=generator) * 3
    masked = spread.where(torch.arange(width) % 37 == 4, float("-inf"))
    kinds = {"spread": spread, "ties": (spread / 2).round(), "equal": torch.zeros(width), "masked": masked}
    return [
        Row(
            f"{name}, {kind}",
            logits.to(device, dtype),
            SamplingParams(**{"temperature": 1.0, "seed": 100 * number, **parameters}),
        )
        for number, (name, parameters) in enumerate(PARAMETERS.items())
        for kind, logits in kinds.items()
    ]


class V2Sampler:
    """The sampler with slots for requests; those of requests that are not in a batch keep what they hold."""

    def __init__(self, width: int, device: torch.device, slots: int, **settings: Any) -> None:
        self.width, self.device = width, device
        self.states = RequestState(slots, 64, 64, 0, width, device)
        config: Any = SimpleNamespace(reasoning_config=None)
        self.sampler = Sampler(config, slots, width, device, self.states, **settings)

    def __call__(self, batch: Sequence[Row], slots: Sequence[int]) -> list[Answer]:
        """Sample each row once, row i as the request in slot ``slots[i]``."""
        for row, slot in zip(batch, slots, strict=True):
            self.states.free_indices = [slot]
            self.states.add_request(str(slot), len(PROMPT), [*PROMPT, *OUTPUT], 0, 32)
            self.sampler.add_request(slot, row.params)
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        # As in an engine, which pads the vocabulary: rows lie apart.
        logits = torch.full((len(batch), self.width + 61), 1e4, dtype=batch[0].logits.dtype, device=self.device)
        logits = logits[:, : self.width]
        for place, row in enumerate(batch):
            logits[place] = row.logits
        processed: list[torch.Tensor] = []
        sample = Sampler.sample.__get__(self.sampler)

        def keeping(*args: Any, **named: Any) -> Any:
            sampled, seen = sample(*args, **named)
            processed.append(seen.float())
            return sampled, seen

        self.sampler.sample = keeping  # type: ignore[method-assign]
        output = self.sampler(logits, self._batch(slots))
        tensors = output.logprobs_tensors
        answers = []
        for place, row in enumerate(batch):
            logprobs: tuple[tuple[int, str], ...] = ()
            rank = -1
            if row.params.num_logprobs is not None:
                assert tensors is not None
                columns = slice(row.params.num_logprobs + 1)
                ids, values = tensors.logprob_token_ids[place, columns], tensors.logprobs[place, columns]
                logprobs = tuple((id, value.hex()) for id, value in zip(ids.tolist(), values.tolist(), strict=True))
                rank = int(tensors.selected_token_ranks[place])
            answers.append(Answer(int(output.sampled_token_ids[place]), rank, logprobs, processed[0][place]))
        return answers

    def _batch(self, slots: Sequence[int]) -> Any:
        count, length = len(slots), len(PROMPT) + len(OUTPUT)

        def on_device(values: Any, dtype: torch.dtype) -> torch.Tensor:
            return torch.as_tensor(values, dtype=dtype, device=self.device)

        mapping, each = on_device(slots, torch.int64), on_device(range(count), torch.int64)
        lengths = torch.full((count,), length, dtype=torch.int32)
        return SimpleNamespace(
            num_reqs=count,
            idx_mapping=mapping,
            idx_mapping_np=np.asarray(slots),
            expanded_idx_mapping=mapping,
            expanded_local_pos=torch.zeros_like(mapping, dtype=torch.int32),
            cu_num_logits=on_device(range(count + 1), torch.int32),
            cu_num_logits_np=np.arange(count + 1),
            positions=torch.full_like(mapping, length - 1),
            input_ids=torch.full_like(mapping, OUTPUT[-1], dtype=torch.int32),
            logits_indices=each,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
        )


def alone(sampler: V2Sampler, asked: Sequence[Row]) -> list[Answer]:
    """Each row in a batch of its own, in the first slot."""
    return [sampler([row], [0])[0] for row in asked]


def differences(
    sampler: V2Sampler, asked: Sequence[Row], expected: Sequence[Answer], sizes: Sequence[int]
) -> list[str]:
    """What differs from ``expected`` in batches of random rows in random slots."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        picked = torch.randint(len(asked), (size,), generator=generator).tolist()
        slots = torch.randperm(sampler.states.max_num_reqs, generator=generator)[:size].tolist()
        answers = sampler([asked[number] for number in picked], slots)
        for number, answer in zip(picked, answers, strict=True):
            if what := answer.differs(expected[number]):
                found.append(f"{asked[number].name} among {size}: {what}")
    return found
