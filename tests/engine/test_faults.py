"""Each part of the engine broken on purpose: the comparison that holds the promise must see it."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm_deterministic.triton_kernels import reference

from vllm_deterministic.engine import attention, ops, sampling
from vllm_deterministic.engine.linear import RowTiledLinear


def _rows_follow_m(monkeypatch: pytest.MonkeyPatch) -> None:
    """K is cut in two where a batch has more than four rows."""
    original = RowTiledLinear.__call__

    def call(self: RowTiledLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] <= 4:
            return original(self, x, bias)
        left = x.clone()
        left[..., x.shape[-1] // 2 :] = 0
        return original(self, left, bias) + original(self, x - left, None)

    monkeypatch.setattr(RowTiledLinear, "__call__", call)


def _split_follows_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reference.plan_attention

    def plan(query_start_loc: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs["kv_split"] = 128 if len(query_start_loc) > 4 else 256
        return original(query_start_loc, *args, **kwargs)

    monkeypatch.setattr(attention.reference, "plan_attention", plan)


def _merge_in_arrival_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reference.paged_attention
    arrival = random.Random(0)

    def shuffled(q: Any, units: Any, plan: Any, **kwargs: Any) -> None:
        for tiles in plan:
            for batch in tiles.batches:
                runs = list(batch.runs)
                arrival.shuffle(runs)
                object.__setattr__(batch, "runs", tuple(runs))
        original(q, units, plan, **kwargs)

    monkeypatch.setattr(attention.reference, "paged_attention", shuffled)


def _norm_in_chunks_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        parts = x.float().square().chunk(1 + min(x.shape[0], 7), dim=-1)
        mean = sum(part.sum(-1, keepdim=True) for part in parts) / x.shape[-1]
        return (x.float() * torch.rsqrt(mean + epsilon)).to(weight.dtype) * weight

    monkeypatch.setattr(ops.reference, "rms_norm", rms_norm)


def _log_softmax_in_chunks_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def log_softmax(x: torch.Tensor) -> torch.Tensor:
        shifted = x.float() - x.float().amax(-1, keepdim=True)
        parts = shifted.exp().chunk(1 + min(x.shape[0], 7), dim=-1)
        return shifted - torch.log(sum(part.sum(-1, keepdim=True) for part in parts))

    monkeypatch.setattr(sampling.reference, "log_softmax", log_softmax)


def _stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the last block are visible although they lie behind the row."""
    original = reference.plan_attention

    def plan(*args: Any, **kwargs: Any) -> Any:
        tiles = original(*args, **kwargs)
        for tile in tiles:
            for batch in tile.batches:
                batch.visible.logical_or_(torch.tensor(len(args[0]) > 4))
        return tiles

    monkeypatch.setattr(attention.reference, "plan_attention", plan)


@pytest.mark.parametrize(
    "plant",
    [
        _rows_follow_m,
        _split_follows_batch,
        _merge_in_arrival_order,
        _norm_in_chunks_of_the_batch,
        _log_softmax_in_chunks_of_the_batch,
        _stale_cache,
    ],
)
def test_fault_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None], engine: LLM, answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (5, 64, 257, 300, 600, 900)
    assert answers.alone(engine, lengths) == answers.together(engine, lengths), "without the fault"
    plant(monkeypatch)
    assert engine.reset_prefix_cache()
    assert answers.alone(engine, lengths) != answers.together(engine, lengths)
    monkeypatch.undo()
    assert engine.reset_prefix_cache()


def test_noise_by_batch_row_is_seen(engine: LLM, answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, logprobs=0)
    lengths = (5, 64, 100)
    assert answers.alone(engine, lengths, params) == answers.together(engine, lengths, params), "without the fault"
    drawn = iter(range(10**6))
    monkeypatch.setattr(sampling.NoiseStream, "noise_seed", lambda self: next(drawn))
    assert answers.alone(engine, lengths, params) != answers.together(engine, lengths, params)
