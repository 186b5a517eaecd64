# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
"""The matrix product at small sizes, each way of a tile by itself: numpy's order of additions follows its sizes."""

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_deterministic.triton_kernels import matmul as matmul_module
from vllm_deterministic.triton_kernels import tiles
from vllm_deterministic.triton_kernels.cancelling_inputs import alternating_signs, normal
from vllm_deterministic.triton_kernels.matmul import batched_matmul, matmul
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan

from . import oracles
from .interpreter import INTERPRETED, ROUNDED, interpreting
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED

PLAIN = Tile(16, 32, 64, warps=4, stages=2, tma=False)
# Ways of a tile, and the segments that each is tried with.
WAYS = {
    "plain": (PLAIN, 1),
    "by descriptor": (replace(PLAIN, tma=True), 1),
    "stored by descriptor": (replace(PLAIN, tma=True, tma_store=True), 1),
    "swapped": (replace(PLAIN, swapped=True), 1),
    "swapped, by descriptor": (replace(PLAIN, swapped=True, tma=True), 1),
    "persistent": (replace(PLAIN, persistent=True, tma=True, group_m=2), 1),
    "persistent, swapped": (replace(PLAIN, persistent=True, swapped=True), 1),
    "flattened": (replace(PLAIN, persistent=True, flatten=True, tma=True), 1),
    "two products": (replace(PLAIN, side_n=16, tma=True, tma_store=True), 1),
    "two products, swapped": (replace(PLAIN, side_n=16, swapped=True, persistent=True), 1),
    "walked segments": (replace(PLAIN, tma=True), 3),
    "walked segments, two products": (replace(PLAIN, side_n=16, persistent=True), 2),
    "walked segments, flattened": (replace(PLAIN, persistent=True, flatten=True), 3),
    "split segments": (replace(PLAIN, split=True, tma=True, tma_store=True), 3),
    "split segments, persistent": (replace(PLAIN, split=True, persistent=True, swapped=True), 2),
}
each_way = pytest.mark.parametrize("way", WAYS)
# Tails of every block, K past two boundaries of segments, rows aligned to 16 bytes and not.
SIZES = ((19, 50, 264), (3, 33, 45), (17, 1, 520), (1, 17, 1))


def _inputs(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    x, w = normal(m, n, k, dtype, generator)
    return x, w, torch.randn(n, generator=generator).mul(5).to(dtype)


def _embedded(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """``x`` as a view with NaN around it."""
    rows = torch.full((len(x) + 2, before + x.shape[1] + after), math.nan, dtype=x.dtype)
    return rows[1:-1, before : before + x.shape[1]].copy_(x)


@each_way
@pytest.mark.parametrize("dtype", ROUNDED)
def test_close_to_the_oracle(dtype: torch.dtype, way: str) -> None:
    tile, segments = WAYS[way]
    for sizes in SIZES:
        x, w, bias = _inputs(*sizes, dtype)
        for b in (None, bias):
            out = matmul(x, w, b, tile=tile, segments=segments)
            assert out.dtype == dtype
            assert_close(out, oracles.matmul(x, w, b))


@each_way
@pytest.mark.parametrize("dtype", ROUNDED)
def test_rows_keep_their_bytes(dtype: torch.dtype, way: str) -> None:
    tile, segments = WAYS[way]
    x, w = alternating_signs(3, 33, 300, dtype, torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 33).to(dtype)
    assert_batch_invariant(lambda x: matmul(x, w, bias, tile=tile, segments=segments), x, sizes=(2, 19))


@settings(max_examples=25, deadline=None)
@given(
    way=st.sampled_from(sorted(WAYS)),
    dtype=st.sampled_from(ROUNDED),
    m=st.integers(1, 40),
    n=st.integers(1, 50),
    k=st.integers(1, 300),
    x_margins=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    w_margins=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    n_major=st.booleans(),
    row=st.integers(0, 39),
    content=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 60000.0]),
)
def test_any_sizes_strides_and_neighbours(way, dtype, m, n, k, x_margins, w_margins, n_major, row, content) -> None:
    tile, segments = WAYS[way]
    row %= m
    x, w, bias = _inputs(m, n, k, dtype)
    hostile = torch.full_like(x, content)
    hostile[row] = x[row]
    strided = _embedded(w.t(), *w_margins).t() if n_major else _embedded(w, *w_margins)
    with interpreting():
        alone = matmul(x[row : row + 1], w, bias, tile=tile, segments=segments)
        assert_close(alone, oracles.matmul(x[row : row + 1], w, bias))
        among = matmul(_embedded(hostile, *x_margins), strided, bias, tile=tile, segments=segments)
    if n_major:
        # numpy adds in another order where a matrix is transposed.
        assert_close(among[row : row + 1], oracles.matmul(x[row : row + 1], w, bias))
    else:
        assert_same_bytes(among[row], alone[0], f"row {row} of {m}")


@pytest.mark.parametrize("dtype", ROUNDED)
def test_split_segments_are_the_walked_ones(dtype: torch.dtype) -> None:
    x, w = alternating_signs(17, 40, 700, dtype, torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 40).to(dtype)
    for tile in (PLAIN, replace(PLAIN, tma=True, persistent=True), replace(PLAIN, swapped=True)):
        walked = matmul(x, w, bias, tile=tile, segments=2)
        assert_same_bytes(matmul(x, w, bias, tile=replace(tile, split=True), segments=2), walked, "split")
        assert not torch.equal(walked, matmul(x, w, bias, tile=tile, segments=1))


@each_way
def test_nothing_is_written_but_the_output(way: str) -> None:
    tile, segments = WAYS[way]
    x, w, bias = _inputs(18, 40, 264, torch.float16)
    expected = matmul(x, w, bias, tile=tile, segments=segments)
    for margin in (8, 3):
        buffer = torch.full((18 + 40, 40 + 2 * margin), 77.0).half()
        inside = buffer[20:-20, margin:-margin]
        out = matmul(x, w, bias, tile=tile, segments=segments, out=inside)
        assert out.data_ptr() == inside.data_ptr()
        assert_same_bytes(inside, expected, "out")
        inside.fill_(77.0)
        assert bool((buffer == 77).all())


@pytest.mark.parametrize("dtype", ROUNDED)
def test_whole_waves_leave_the_last_rows_to_the_plan(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four programs at once and two tiles across N, a wave is two tiles of M."""
    n, k, segments = 50, 700, 2
    waves = replace(PLAIN, persistent=True, flatten=True, whole_waves=True)
    rest = replace(PLAIN, block_m=32, split=True, tma=True)
    plan = TilePlan(n, k, segments, ((8, rest), (1 << 30, waves)))
    x, w = alternating_signs(70, n, k, dtype, torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, n).to(dtype)
    expected = matmul(x, w, bias, tile=PLAIN, segments=segments)
    launched: list[tuple[int, Tile]] = []
    launch = matmul_module._launch
    monkeypatch.setattr(
        matmul_module,
        "_launch",
        lambda x, w, b, out, tile, s: (launched.append((x.shape[1], tile)), launch(x, w, b, out, tile, s)),
    )
    for m, parts in {
        8: [(8, rest)],
        30: [(30, waves)],  # one wave
        33: [(32, waves), (1, rest)],
        48: [(32, waves), (16, waves)],
        49: [(49, waves)],  # more than half of the last wave
        70: [(64, waves), (6, rest)],
    }.items():
        launched.clear()
        assert_same_bytes(matmul(x[:m], w, bias, plan=plan), expected[:m], f"{m} rows")
        assert launched == parts, f"{m} rows"
        launched.clear()
        assert_same_bytes(matmul(x[:m], w, bias, plan=plan, tile=waves), expected[:m], f"{m} rows")
        assert launched[-1:] == parts[-1:] or m == 8
        launched.clear()
        assert_same_bytes(matmul(x[:m], w, bias, tile=waves, segments=segments), expected[:m], f"{m} rows")
        assert launched == [(m, waves)]


def test_the_table_chooses_where_no_tile_is_given() -> None:
    for m, n, k in ((3, 20, 4100), (40, 33, 65)):
        x, w, bias = _inputs(m, n, k, torch.float16)
        assert_close(matmul(x, w, bias), oracles.matmul(x, w, bias))


def test_any_number_of_dimensions() -> None:
    x, w, bias = _inputs(12, 20, 40, torch.float16)
    expected = matmul(x, w, bias)
    assert_same_bytes(matmul(x.view(2, 3, 2, 40), w, bias), expected.view(2, 3, 2, 20), "four")
    assert_same_bytes(matmul(x[0], w, bias), expected[0], "one")
    transposed = x.view(3, 4, 40).transpose(0, 1)
    assert_same_bytes(matmul(transposed, w, bias), expected.view(3, 4, 20).transpose(0, 1).contiguous(), "transposed")
    assert_same_bytes(matmul(x[:1].expand(12, -1), w, bias), expected[:1].expand(12, -1), "one row many times")


@pytest.mark.parametrize("dtype", ROUNDED)
def test_batched(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_module, "_MOST_BATCHES", 2)
    for batch, m, n, k in ((5, 18, 20, 40), (1, 3, 17, 65), (2, 1, 1, 1)):
        x, w, _ = _inputs(batch * m, batch * n, k, dtype)
        a, w = x.view(batch, m, k), w.view(batch, n, k)
        out = batched_matmul(a, w.transpose(1, 2), tile=PLAIN)
        for number in range(batch):
            assert_same_bytes(out[number], matmul(a[number], w[number], tile=PLAIN), f"matrix {number}")
        contiguous = batched_matmul(a, w.transpose(1, 2).contiguous(), tile=PLAIN)
        torch.testing.assert_close(contiguous, out)
        shared = batched_matmul(a, w[0].t().expand(batch, -1, -1), tile=PLAIN)
        assert_same_bytes(shared[-1], matmul(a[-1], w[0], tile=PLAIN), "one matrix for all")


@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_batch_whose_tile_splits_k(dtype: torch.dtype) -> None:
    batch, m, n, k = 3, 2, 17, 4096
    assert tiles.segments(n, k) == 2
    x, w, _ = _inputs(batch * m, batch * n, k, dtype)
    a, w = x.view(batch, m, k), w.view(batch, n, k)
    tile = Tile(16, 32, 256, warps=4, stages=1, split=True)
    out = batched_matmul(a, w.transpose(1, 2), tile=tile)
    for number in range(batch):
        assert_same_bytes(out[number], matmul(a[number], w[number], tile=tile), f"matrix {number}")


@pytest.mark.parametrize("dtype", ROUNDED)
def test_nothing_of_something(dtype: torch.dtype) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    bias = torch.arange(20).to(dtype)
    assert matmul(zeros(0, 8), zeros(20, 8), bias).shape == (0, 20)
    assert matmul(zeros(2, 0, 8), zeros(20, 8), bias).shape == (2, 0, 20)
    assert matmul(zeros(3, 8), zeros(0, 8)).shape == (3, 0)
    for tile, segments in WAYS.values():
        out = matmul(zeros(3, 0), zeros(20, 0), bias, tile=tile, segments=segments)
        assert_same_bytes(out, bias.expand(3, -1), "bias alone")
    assert_same_bytes(matmul(zeros(2, 3, 0), zeros(20, 0)), zeros(2, 3, 20), "zeros")
    assert batched_matmul(zeros(0, 4, 8), zeros(0, 8, 5)).shape == (0, 4, 5)
    assert_same_bytes(batched_matmul(zeros(2, 4, 0), zeros(2, 0, 5)), zeros(2, 4, 5), "zeros")


def _half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 64, dtype=torch.int8)}, r"x is torch.int8; bfloat16, float16 and float32"),
        ({"x": torch.zeros(4, 64).double(), "w": torch.zeros(32, 64).double()}, r"x is torch.float64"),
        ({"x": _half()}, r"x \(\) and w \(32, 64\) do not agree on K"),
        ({"x": _half(4, 63)}, r"x \(4, 63\) and w \(32, 64\) do not agree on K"),
        ({"w": _half(64)}, r"w \(64,\) do not agree on K"),
        ({"w": _half(1, 32, 64)}, r"w \(1, 32, 64\) do not agree on K"),
        ({"w": torch.zeros(32, 64)}, r"w is torch.float32 on cpu, but x is torch.float16 on cpu"),
        ({"w": _half(32, 64).to("meta")}, r"w is torch.float16 on meta"),
        ({"x": _half(4, 64).to("meta"), "w": _half(32, 64).to("meta")}, r"x is on meta"),
        ({"bias": _half(31)}, r"bias has shape \(31,\); it must be \[32\]"),
        ({"bias": _half(1, 32)}, r"bias has shape \(1, 32\)"),
        ({"bias": torch.zeros(32)}, r"bias is torch.float32"),
        ({"out": _half(4, 31)}, r"out is torch.float16 \(4, 31\) .* must be torch.float16 \[4, 32\]"),
        ({"out": torch.zeros(4, 32)}, r"out is torch.float32"),
        ({"out": _half(32, 4).t()}, r"contiguous along N"),
        ({"x": _half(2, 2, 64), "out": _half(4, 32)}, r"out is"),
        ({"segments": 0}, r"segments is 0"),
    ],
)
def test_refuses_what_it_cannot_do(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(**({"x": _half(4, 64), "w": _half(32, 64)} | changed))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (_half(4, 64), _half(64, 32), "a and b must be"),
        (_half(2, 4, 64), _half(3, 64, 32), "a and b must be"),
        (_half(2, 4, 63), _half(2, 64, 32), "do not agree on K"),
        (_half(2, 4, 64), torch.zeros(2, 64, 32), "b is torch.float32"),
    ],
)
def test_refuses_batches_that_it_cannot_multiply(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batched_matmul(a, b)


def test_fault_segments_that_follow_the_batch() -> None:
    x, w = alternating_signs(4, 40, 1000, torch.float32, torch.Generator().manual_seed(0))
    for tile in (PLAIN, replace(PLAIN, split=True)):
        with pytest.raises(AssertionError, match="elements differ"):
            assert_batch_invariant(
                lambda x, tile=tile: matmul(x, w, tile=tile, segments=2 if len(x) < 4 else 1), x, sizes=(9,)
            )
