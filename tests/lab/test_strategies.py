# ruff: noqa: E402 (torch comes with the extra "lab" alone)
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.lab import attention, matmul, rms_norm, thread_pool
from vllm_deterministic.lab.sums import by_halves, chunk_sums, in_order

MERGES = (thread_pool.merge_by_index, thread_pool.merge_in_pairs, thread_pool.merge_by_cat)


def chunks(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([[value]]) for value in values]


@pytest.fixture
def slow_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sums a chunk of ones is the last to come."""

    def summed(x: torch.Tensor) -> torch.Tensor:
        if (x == 1).all():
            time.sleep(0.2)
        return by_halves(x)

    monkeypatch.setattr(thread_pool, "by_halves", summed)


def test_orders_of_addition() -> None:
    values = [1.0, 1e8, -1e8, 1.0]
    assert in_order(list(torch.tensor(values))).item() == 1.0
    assert by_halves(torch.tensor(values)).item() == 0.0  # (1 - 1e8) + (1e8 + 1)
    assert by_halves(torch.tensor([1.0, 2.0, 3.0])).item() == 6.0
    assert [part.tolist() for part in chunk_sums(torch.arange(5.0).view(1, 5), 2)] == [[1.0], [5.0], [4.0]]


def test_who_comes_first_decides_a_merge_on_arrival_and_no_other(slow_first: None) -> None:
    parts = chunks(1.0, 1e8, -1e8)
    with ThreadPoolExecutor(4) as pool:
        assert thread_pool.merge_on_arrival(pool, parts).tolist() == [1.0]
        assert thread_pool.merge_by_index(pool, parts).tolist() == [0.0]
        assert thread_pool.merge_in_pairs(pool, parts).tolist() == [0.0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_every_merge_takes_every_chunk_once(count: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        for merge in (*MERGES, thread_pool.merge_on_arrival):
            assert merge(pool, chunks(*(2.0**k for k in range(count)))).tolist() == [2.0**count - 1]


def test_the_faults_cut_by_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(x: torch.Tensor, chunk: int) -> tuple[torch.Tensor, ...]:
        seen.append(chunk)
        return chunk_sums(x, chunk)

    monkeypatch.setattr(rms_norm, "chunk_sums", noted)
    for rows in (1, 2, 32):
        rms_norm.batch_chunks(torch.ones(rows, 512))
        rms_norm.fixed_chunks(torch.ones(rows, 512))
    assert seen == [64, 64, 128, 64, 512, 64]


def test_splits_of_1000_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    partial = attention._partial

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> attention.Partial:
        seen.append(len(k))
        return partial(q, k, v)

    monkeypatch.setattr(attention, "_partial", noted)
    q, k, v = torch.randn(8, 2, 64), torch.randn(8, 1000, 64), torch.randn(8, 1000, 64)
    attention.fixed_splits(q, k, v)
    assert seen == [256, 256, 256, 232] * 8
    seen.clear()
    attention.batch_splits(q, k, v)
    assert seen == [250] * 4 * 8


def test_a_tile_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    linear = matmul.linear

    def noted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return linear(x, w)

    monkeypatch.setattr(matmul, "linear", noted)
    assert matmul.fixed_tile(torch.ones(17, 512), torch.ones(3, 512)).tolist() == [[512.0] * 3] * 17
    assert seen == [(16, 512)] * 2
    seen.clear()
    matmul.fixed_segments(torch.ones(5, 512), torch.ones(3, 512))
    assert seen == [(16, 256)] * 2
