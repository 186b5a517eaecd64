"""Draws follow the distribution and depend on (seed, position, id) alone; unseeded requests get the documented seed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_deterministic.engine.sampling import (
    DeterministicSampler,
    DeterministicTopKTopPSampler,
    NoiseStream,
    default_seed,
)


def draw(logits: torch.Tensor, streams: list[NoiseStream], k: Any = None, p: Any = None) -> torch.Tensor:
    return DeterministicTopKTopPSampler("raw_logprobs")(logits, dict(enumerate(streams)), k, p)[0]


def test_draws_follow_the_distribution() -> None:
    weights = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    count = 20_000
    drawn = draw(weights.log().expand(count, -1), [NoiseStream(seed, []) for seed in range(count)])
    expected = weights * count
    statistic = ((torch.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum()
    assert statistic < 18.5, "chi-square with four degrees of freedom: one chance in a thousand"


def test_positions_of_one_request_are_independent() -> None:
    logits = torch.zeros(1, 64)
    output: list[int] = []
    stream = NoiseStream(5, output)
    drawn = []
    for _ in range(64):
        drawn.append(int(draw(logits, [stream])))
        output.append(drawn[-1])
    assert len(set(drawn)) > 30
    stream.set_offset(stream.get_offset() - 4)
    assert NoiseStream(5, output[:7]).noise_seed() == NoiseStream(5, [0] * 7).noise_seed()


def test_a_filter_does_not_move_the_noise() -> None:
    logits = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    streams = [NoiseStream(row, []) for row in range(200)]
    free = draw(logits, streams)
    k = torch.full((200,), 50)
    filtered = draw(logits, streams, k=k)
    kept = logits.gather(-1, free.unsqueeze(-1)).squeeze(-1) >= logits.topk(50).values[:, -1]
    assert kept.any()
    assert torch.equal(filtered[kept], free[kept])


def test_row_of_the_batch_does_not_matter() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    streams = [NoiseStream(row, []) for row in range(40)]
    p = torch.linspace(0.3, 1.0, 40)
    together = draw(logits, streams, p=p)
    alone = [draw(logits[row : row + 1], [streams[row]], p=p[row : row + 1]) for row in range(40)]
    assert torch.equal(together, torch.cat(alone))


def test_top_logprobs_order_ties_by_id_whatever_a_neighbour_asks() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -1.0, -2.0, -2.0, -3.0]])
    few = DeterministicSampler.gather_logprobs(logprobs, 2, torch.tensor([3]))
    many = DeterministicSampler.gather_logprobs(logprobs, 6, torch.tensor([3]))
    assert few.logprob_token_ids.tolist() == [[3, 0, 2]]
    assert many.logprob_token_ids.tolist() == [[3, 0, 2, 1, 3, 4, 5]]
    assert many.selected_token_ranks.tolist() == [5]


def test_request_without_a_seed_gets_the_documented_one(qwen3: Path, start: Callable[..., LLM]) -> None:
    prompt = {"prompt_token_ids": [100, 200, 300]}
    params = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}

    def ids(llm: LLM, **changes: Any) -> list[list[int]]:
        outputs = llm.generate(prompt, SamplingParams(**params, **changes), use_tqdm=False)[0].outputs
        return [list(choice.token_ids) for choice in outputs]

    llm = start(qwen3)
    unseeded = ids(llm, n=3)
    first = default_seed(0, prompt["prompt_token_ids"])
    assert unseeded == [ids(llm, seed=first + index)[0] for index in range(3)]
    assert len({tuple(choice) for choice in unseeded}) == 3
    assert ids(llm, n=3) == unseeded
    llm = start(qwen3, additional_config={"deterministic": {"default_seed": 1}})
    assert ids(llm, n=3) != unseeded
