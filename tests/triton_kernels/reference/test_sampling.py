# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import itertools
import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.reference import greedy_sample, noise_seed, top_k_top_p, top_logprobs

from .. import oracles
from ..invariance import assert_batch_invariant, assert_same_bytes

WIDTHS = (1, 2, 17, 1000, 40000)


def _tied_logits(rows: int, width: int) -> torch.Tensor:
    """Multiples of a quarter, at most 2: many tokens are equal, those with the largest logit among them."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(rows, width, generator=generator).mul(8).round().div(4).clamp(max=2)


@pytest.mark.parametrize("width", WIDTHS)
def test_greedy_takes_the_lowest_of_the_largest(width: int, threads: int) -> None:
    x = _tied_logits(4, width)
    for row in (*x, torch.zeros(width)):
        assert greedy_sample(row.unsqueeze(0)).item() == row.tolist().index(max(row.tolist()))
    assert_batch_invariant(greedy_sample, x, sizes=(2, 3, 17))


def test_fault_greedy_takes_the_highest_when_alone() -> None:
    def greedy(x: torch.Tensor) -> torch.Tensor:
        return greedy_sample(x) if len(x) > 1 else x.shape[-1] - 1 - greedy_sample(x.flip(-1))

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(greedy, _tied_logits(4, 1000))


@pytest.mark.parametrize("width", WIDTHS)
def test_top_logprobs_close_to_the_oracle(width: int) -> None:
    x = _tied_logits(3, width) - 3
    x[0, : width // 2] = -math.inf
    for k in sorted({1, min(20, width), width} if width <= 1000 else {1, 20}):
        values, ids = top_logprobs(x, k)
        assert (values.dtype, ids.dtype) == (torch.float32, torch.int64)
        for row, row_ids in zip(x.tolist(), ids.tolist(), strict=True):
            assert row_ids == sorted(range(width), key=lambda token, row=row: (-row[token], token))[:k]
        assert_same_bytes(values, x.gather(-1, ids), "values")


@pytest.mark.parametrize("width", [17, 1000, 40000])
def test_top_logprobs_of_a_row_stay_whatever_k_a_neighbour_asks_for(width: int, threads: int) -> None:
    x = _tied_logits(4, width)
    assert_batch_invariant(lambda rows: tuple(part[:, :5] for part in top_logprobs(rows, 4 + len(rows) % 9)), x[:, :17])
    for k in (5, 6, 16, 17):
        assert_batch_invariant(lambda rows, k=k: tuple(part[:, :5] for part in top_logprobs(rows, k)), x, sizes=(2, 7))
        assert_same_bytes(top_logprobs(x, k)[1][:, :5], top_logprobs(x, 5)[1], f"k = {k}")


def test_fault_ties_follow_the_algorithm_that_k_chooses() -> None:
    def top(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
        if k <= 8:
            values, ids = rows.sort(descending=True, stable=True)
        else:
            values, ids = rows.flip(-1).sort(descending=True, stable=True)
            ids = rows.shape[-1] - 1 - ids
        return values[:, :5], ids[:, :5]

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(lambda rows: top(rows, 5 if len(rows) == 1 else 20), _tied_logits(4, 100))


def _kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


@pytest.mark.parametrize("width", [1, 2, 17, 1000])
def test_filters_like_the_oracle(width: int) -> None:
    grid = list(
        itertools.product(sorted({1, 2, min(5, width), max(1, width // 2), width}), (0.0, 0.3, 0.9, 0.999, 1.0))
    )
    grid = [(min(k, width), p) for k, p in grid]
    x = torch.randn(len(grid), width, generator=torch.Generator().manual_seed(width)) * 3
    k, p = torch.tensor([k for k, _ in grid]), torch.tensor([p for _, p in grid])
    out = top_k_top_p(x, k, p)
    assert _kept(out) == [oracles.top_k_top_p(row, *limits) for row, limits in zip(x.tolist(), grid, strict=True)]
    assert_same_bytes(out[out.isfinite()], x[out.isfinite()], "what is kept")
    assert _kept(top_k_top_p(x, k, None)) == [
        oracles.top_k_top_p(row, limit, 1.0) for row, (limit, _) in zip(x.tolist(), grid, strict=True)
    ]
    assert _kept(top_k_top_p(x, None, p)) == [
        oracles.top_k_top_p(row, width, limit) for row, (_, limit) in zip(x.tolist(), grid, strict=True)
    ]


def test_ties_go_to_the_lowest_ids() -> None:
    equal = torch.zeros(4, 8)
    # Eighths are exact, so the nucleus ends where the mass before a token reaches p and not one token later.
    out = top_k_top_p(equal, torch.tensor([3, 8, 8, 4]), torch.tensor([1.0, 0.5, 0.51, 0.5]))
    assert _kept(out) == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1}]
    shuffled = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert _kept(top_k_top_p(shuffled, torch.tensor([4]), None)) == [{1, 2, 3, 4}]


def test_no_limits_change_nothing(threads: int) -> None:
    x = torch.randn(3, 40000, generator=torch.Generator().manual_seed(0)) * 20
    x[1, ::2] = -math.inf
    assert top_k_top_p(x, None, None) is x
    out = top_k_top_p(x, torch.full((3,), 40000), torch.ones(3))
    assert_same_bytes(out, x, "k = V and p = 1")


@pytest.mark.parametrize("width", [1, 17, 1000, 40000])
def test_rows_keep_their_bytes(width: int, threads: int) -> None:
    x = _tied_logits(6, width)
    k = torch.tensor([1, 3, 50, width, width, 20]).clamp(max=width)
    p = torch.tensor([0.9, 1.0, 0.5, 0.99, 1.0, 0.1])
    sizes = (2, 3, 5, 17) if width < 30000 else (2, 5)
    assert_batch_invariant(top_k_top_p, x, k, p, sizes=sizes)
    assert_batch_invariant(lambda x, k: top_k_top_p(x, k, None), x, k, sizes=sizes)
    assert_batch_invariant(lambda x, p: top_k_top_p(x, None, p), x, p, sizes=sizes)


def test_a_neighbour_with_a_limit_does_not_limit_the_row() -> None:
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 20
    unlimited = torch.tensor([1000]), torch.tensor([1.0])
    out = top_k_top_p(
        torch.cat([x, x]), torch.cat([unlimited[0], torch.tensor([2])]), torch.cat([unlimited[1], torch.tensor([0.1])])
    )
    assert_same_bytes(out[:1], x, "beside a limited row")


def test_fault_k_from_a_neighbour() -> None:
    k = torch.tensor([1, 3, 50, 1000])
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(
            lambda x, k: top_k_top_p(x, k.max().expand(len(k)), None), _tied_logits(4, 1000), k, sizes=(3, 5)
        )


def test_fault_ties_at_the_limit_follow_the_batch() -> None:
    def filter_by_threshold(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Small batches keep all that equals the k-th, as a search for a threshold does."""
        if len(x) > 4:
            return top_k_top_p(x, k, None)
        threshold = x.sort(descending=True).values.gather(-1, k.unsqueeze(-1) - 1)
        return x.masked_fill(x < threshold, -math.inf)

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(filter_by_threshold, _tied_logits(4, 1000), torch.tensor([7, 30, 50, 200]))


def _seeds_of(positions: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    return torch.tensor(
        [noise_seed(seed, position) for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)]
    )


POSITIONS, SEEDS = torch.tensor([0, 1, 2, 100, 0]), torch.tensor([0, 0, -5, 2**62, 1])


def test_noise_keeps_its_seed_in_every_batch() -> None:
    assert_batch_invariant(_seeds_of, POSITIONS, SEEDS)


def test_fault_noise_follows_the_batch_row() -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(
            lambda positions, seeds: _seeds_of(positions, seeds + torch.arange(len(seeds))), POSITIONS, SEEDS
        )


def _shared_noise(seed_of: Callable[[int, int], int], seeds: range, positions: int) -> int:
    """How many (seed, position) pairs get noise that another pair gets too."""
    noise = [seed_of(seed, position) for seed in seeds for position in range(positions)]
    return len(noise) - len(set(noise))


def test_noise_differs_for_every_seed_and_position() -> None:
    assert _shared_noise(noise_seed, range(-50, 150), 300) == 0
    assert _shared_noise(noise_seed, range(2**63 - 20, 2**63 + 20), 300) == 0
    noise = [noise_seed(seed, position) for seed in (0, -1, 2**31, 2**80) for position in (0, 1, 2**20)]
    assert all(0 <= value < 2**63 for value in noise)
    # Every bit is in use, those that a smaller seed would leave at zero too.
    assert len({value >> 55 for seed in range(50) for value in [noise_seed(seed, 0)]}) > 40


def test_fault_adjacent_seeds_share_positions() -> None:
    assert _shared_noise(lambda seed, position: seed + position, range(3), 300) == 2 * 299


def test_noise_seed_is_fixed_for_good() -> None:
    # Recorded outputs depend on these numbers: SplitMix64 as published, seeded with its own output.
    def splitmix64(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert splitmix64(1234567) == 6457827717110365317  # the first output of the published reference for this seed
    for seed, position in ((0, 0), (1, 0), (1, 7), (-3, 2)):
        start = splitmix64(seed % 2**64)
        assert noise_seed(seed, position) == splitmix64((start + position * 0x9E3779B97F4A7C15) % 2**64) >> 1
