# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.bit_class import same_bytes
from vllm_deterministic.triton_kernels.reference import merge, split_partial
from vllm_deterministic.triton_kernels.reference.attention import KEY_TILE, Partial

from ..invariance import assert_same_bytes
from ..oracles import assert_close

SPLITS, TILES, HEADS, ROWS = 3, 4, 2, 16
HEAD_SIZES = (64, 80, 128)


def _inputs(head_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(head_size)
    q = torch.randn(SPLITS, HEADS, ROWS, head_size, generator=generator) * 0.5
    k, v = (torch.randn(SPLITS, TILES, HEADS, KEY_TILE, head_size, generator=generator) for _ in range(2))
    visible = torch.rand(SPLITS, TILES, 1, ROWS, KEY_TILE, generator=generator) < 0.7
    visible[0, :, :, 3] = False  # a row that sees nothing
    visible[1, 2:] = False  # whole tiles that no row sees
    return q, k, v, visible


def _assert_same_state(actual: Partial, expected: Partial, what: str) -> None:
    for name in ("maximum", "total", "weighted"):
        assert_same_bytes(getattr(actual, name), getattr(expected, name), f"{what}: {name}")


def _take(state: Partial, index: object) -> Partial:
    return Partial(state.maximum[index], state.total[index], state.weighted[index])


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_close_to_the_oracle(head_size: int, threads: int) -> None:
    q, k, v, visible = _inputs(head_size)
    state = split_partial(q, k, v, visible, threads)
    scores = torch.einsum("chrd,cthkd->cthrk", q.double(), k.double()).masked_fill(~visible, -math.inf)
    maximum = scores.amax(dim=(1, 4))
    weights = (scores - maximum.clamp(min=-1e300).view(SPLITS, 1, HEADS, ROWS, 1)).exp()
    assert_close(state.maximum, maximum)
    assert_close(state.total, weights.sum(dim=(1, 4)))
    assert_close(state.weighted, torch.einsum("cthrk,cthkd->chrd", weights, v.double()))
    empty = _take(state, (0, slice(None), 3))
    assert (empty.maximum == -math.inf).all()
    assert not empty.total.any()
    assert not empty.weighted.any()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_split_keeps_its_bytes_beside_any_other(head_size: int, threads: int) -> None:
    q, k, v, visible = _inputs(head_size)
    together = split_partial(q, k, v, visible, threads)
    for picked in ([0], [1], [2], [2, 0], [1, 1, 1, 2, 0, 0, 2]):
        state = split_partial(q[picked], k[picked], v[picked], visible[picked], threads)
        _assert_same_state(state, _take(together, picked), f"splits {picked}")
    nan = torch.full_like(q[:1], math.nan)
    beside = split_partial(
        torch.cat([nan, q]), torch.cat([k[:1], k]), torch.cat([v[:1], v]), visible[[0, 0, 1, 2]], threads
    )
    _assert_same_state(_take(beside, slice(1, None)), together, "beside a split of NaN queries")
    q[:, :, ::2] = math.inf
    _assert_same_state(
        _take(split_partial(q, k, v, visible, threads), (slice(None), slice(None), slice(1, None, 2))),
        _take(together, (slice(None), slice(None), slice(1, None, 2))),
        "beside infinite rows",
    )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_key_tiles_past_the_last_visible_key_change_nothing(head_size: int, threads: int) -> None:
    q, k, v, visible = _inputs(head_size)
    short = split_partial(q[1:2], k[1:2, :2], v[1:2, :2], visible[1:2, :2], threads)
    _assert_same_state(split_partial(q[1:2], k[1:2], v[1:2], visible[1:2], threads), short, "two tiles more")


def _splits(rows: int, count: int) -> list[Partial]:
    q, k, v, visible = _inputs(64)
    picked = torch.randint(SPLITS, (count,), generator=torch.Generator().manual_seed(1))
    states = []
    for number, split in enumerate(picked.tolist()):
        state = split_partial(
            q[[1]], k[[split]].roll(number, dims=3), v[[split]].roll(number, dims=4), visible[[split]]
        )
        states.append(_take(state, (slice(None), slice(None), slice(0, rows))))
    return states


def _fold(states: list[Partial]) -> Partial:
    state = states[0]
    for other in states[1:]:
        state = merge(state, other)
    return state


def test_merging_with_an_empty_state_is_exact() -> None:
    (state,) = _splits(ROWS, 1)
    empty = Partial(
        torch.full_like(state.maximum, -math.inf), torch.zeros_like(state.total), torch.zeros_like(state.weighted)
    )
    _assert_same_state(merge(empty, state), state, "empty first")
    _assert_same_state(merge(state, empty), state, "empty second")
    _assert_same_state(merge(empty, empty), empty, "both empty")


def test_merging_is_close_to_the_oracle() -> None:
    states = _splits(ROWS, 5)
    merged = _fold(states)
    maximum = torch.stack([state.maximum for state in states]).double().amax(0)
    scales = [(state.maximum.double() - maximum.clamp(min=-1e300)).exp() for state in states]
    assert_close(merged.maximum, maximum)
    assert_close(merged.total, sum(state.total.double() * s for state, s in zip(states, scales, strict=True)))
    assert_close(
        merged.weighted,
        sum(state.weighted.double() * s.unsqueeze(-1) for state, s in zip(states, scales, strict=True)),
    )


def test_a_row_merges_by_itself() -> None:
    states = _splits(ROWS, 5)
    merged = _fold(states)
    for rows in (slice(0, 1), slice(5, 9), slice(0, ROWS, 3)):
        index = (slice(None), slice(None), rows)
        _assert_same_state(_fold([_take(state, index) for state in states]), _take(merged, index), f"rows {rows}")


def test_fault_merge_in_another_order() -> None:
    states = _splits(ROWS, 5)
    ascending = _fold(states)
    same = [
        same_bytes(_fold([states[i] for i in order]).weighted, ascending.weighted)
        for order in itertools.permutations(range(5))
    ]
    # Two states commute, so an order and the one with its first two swapped agree; the others do not.
    assert same[0]
    assert not any(same[1:24])
    assert not same_bytes(_fold(states[::-1]).weighted, ascending.weighted)
