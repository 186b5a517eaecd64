# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import functools
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.bit_class import certified_row_tiles, mirrored, same_bytes
from vllm_deterministic.triton_kernels.reference import plan_attention, split_partial
from vllm_deterministic.triton_kernels.reference.attention import KEY_TILE
from vllm_deterministic.triton_kernels.reference.attention_plan import QueryTiles
from vllm_deterministic.triton_kernels.reference.paged_attention import Workspace, cache_units, write_cache

from .. import oracles
from ..invariance import assert_same_bytes
from ..oracles import DTYPES, assert_close
from .serving import BASE_ROWS, Request, Schedule, Serving, chunks, decode_from, serve, whole

# Query heads, KV heads, head size: groups of 1, 2, 5 and 7.
SHAPES = [(1, 1, 64), (4, 2, 80), (5, 1, 128), (7, 1, 64)]
WINDOWS = [None, 100]
# Around the end of a split of 256; for one shape also into the third.
LENGTHS = (1, 37, 255, 256, 257)
LONG_SHAPE = SHAPES[1]


def _requests(shape: tuple[int, int, int], dtype: torch.dtype, lengths: Sequence[int]) -> list[Request]:
    heads, kv_heads, head_size = shape
    generator = torch.Generator().manual_seed(0)

    def random_heads(length: int, count: int) -> torch.Tensor:
        return torch.randn(length, count, head_size, generator=generator).to(dtype)

    return [Request(random_heads(n, heads), random_heads(n, kv_heads), random_heads(n, kv_heads)) for n in lengths]


@functools.cache
def _alone(
    shape: tuple[int, int, int], dtype: torch.dtype, window: int | None, threads: int
) -> tuple[list[Request], list[torch.Tensor]]:
    """Requests and what each gives alone, prefilled whole."""
    requests = _requests(shape, dtype, LENGTHS + (600,) * (shape == LONG_SHAPE))
    return requests, [serve([request], whole, Serving(window=window))[0] for request in requests]


def _assert_served_alike(
    requests: Sequence[Request], expected: Sequence[torch.Tensor], schedule: Schedule, serving: Serving
) -> None:
    """Serve ``requests`` together and compare each with what it gives alone."""
    for number, out in enumerate(serve(requests, schedule, serving)):
        assert_same_bytes(out, expected[number], f"request {number} of {len(out)} tokens")


@functools.cache
def _certified_rows(head_size: int, threads: int) -> tuple[int, ...]:
    """The numbers of rows of a query tile whose two products are one bit class on this machine."""
    generator = torch.Generator().manual_seed(0)
    candidates, rows = (8, 32, 64), 64
    keys = mirrored(KEY_TILE, head_size, sign=1, dtype=torch.float32, generator=generator).t()
    values = mirrored(head_size, KEY_TILE, sign=1, dtype=torch.float32, generator=generator).t().contiguous()
    certified = {BASE_ROWS, *candidates}
    for right in (keys, values):

        def product(left: torch.Tensor, right: torch.Tensor = right) -> torch.Tensor:
            count = threads + 1
            return torch.bmm(left.expand(count, *left.shape).contiguous(), right.expand(count, *right.shape))[0]

        x = mirrored(rows, right.shape[0], sign=-1, dtype=torch.float32, generator=generator)
        certified &= set(certified_row_tiles(product, x, base=BASE_ROWS, candidates=candidates))
    return tuple(sorted(certified))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_the_oracle(
    shape: tuple[int, int, int], window: int | None, dtype: torch.dtype, one_thread: int
) -> None:
    requests, outs = _alone(shape, dtype, window, one_thread)
    for request, out in zip(requests, outs, strict=True):
        assert_close(out, oracles.attention(request.q, request.k, request.v, shape[2] ** -0.5, window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_equals_prefill(shape: tuple[int, int, int], window: int | None, threads: int) -> None:
    requests, expected = _alone(shape, torch.float32, window, threads)
    for first, number in ((1, 1), (253, 4), (596, 5)):
        if number < len(requests):
            _assert_served_alike([requests[number]], [expected[number]], decode_from(first), Serving(window=window))


@pytest.mark.parametrize(
    ("shape", "window", "dtype"),
    [
        *((shape, window, torch.float32) for shape in SHAPES for window in WINDOWS),
        (LONG_SHAPE, None, torch.bfloat16),
        (LONG_SHAPE, None, torch.float16),
    ],
)
def test_any_chunks_beside_any_neighbours_equal_prefill_alone(
    shape: tuple[int, int, int], window: int | None, dtype: torch.dtype, threads: int
) -> None:
    requests, expected = _alone(shape, dtype, window, threads)
    _assert_served_alike(requests, expected, whole, Serving(window=window))
    # Requests join, wait, prefill and decode in the same steps.
    _assert_served_alike(requests, expected, chunks(0, 200), Serving(window=window))


@pytest.mark.parametrize("block_size", [16, 32, 64, 256])
def test_the_block_size_does_not_matter(block_size: int, one_thread: int) -> None:
    for shape, window in ((LONG_SHAPE, None), (SHAPES[3], 100)):
        requests, expected = _alone(shape, torch.float32, window, one_thread)
        _assert_served_alike(requests, expected, chunks(20, 300), Serving(block_size=block_size, window=window))


@pytest.mark.parametrize("shape", SHAPES)
def test_any_certified_tiles_give_the_same_bytes(shape: tuple[int, int, int], one_thread: int) -> None:
    requests, expected = _alone(shape, torch.float32, None, one_thread)
    certified = _certified_rows(shape[2], one_thread)
    _assert_served_alike(requests, expected, chunks(20, 300), Serving(row_tiles=certified))
    for rows in certified:
        _assert_served_alike(requests[1:], expected[1:], whole, Serving(row_tiles=(rows,)))


@pytest.mark.parametrize("max_split_rows", [1, 1 << 14, 1 << 24])
def test_how_many_splits_are_computed_together_does_not_matter(max_split_rows: int, one_thread: int) -> None:
    requests, expected = _alone(LONG_SHAPE, torch.float32, None, one_thread)
    _assert_served_alike(requests, expected, chunks(20, 300), Serving(max_split_rows=max_split_rows))


def test_blocks_behind_the_window_may_be_forgotten(one_thread: int) -> None:
    requests, expected = _alone(LONG_SHAPE, torch.float32, 100, one_thread)
    serving = Serving(window=100, block_size=16, forget_behind_window=True)
    _assert_served_alike(requests, expected, chunks(20, 100), serving)


@pytest.mark.parametrize("stale", [math.nan, math.inf, 3e38])
def test_what_others_left_in_the_cache_does_not_matter(stale: float, one_thread: int) -> None:
    requests, expected = _alone(LONG_SHAPE, torch.float32, None, one_thread)
    _assert_served_alike(requests, expected, chunks(20, 200), Serving(stale=stale, block_size=16))


def test_a_neighbour_of_nan_and_infinity_stays_by_itself(one_thread: int) -> None:
    requests, expected = _alone(LONG_SHAPE, torch.float32, None, one_thread)
    for value in (math.nan, math.inf):
        hostile = Request(*(torch.full_like(x, value) for x in (requests[3].q, requests[3].k, requests[3].v)))
        for schedule in (whole, chunks(20, 200)):
            outs = serve([hostile, requests[5], hostile, requests[4]], schedule, Serving())
            assert_same_bytes(outs[1], expected[5], "between two")
            assert_same_bytes(outs[3], expected[4], "after two")


def test_another_split_gives_the_same_values_in_other_bytes(one_thread: int) -> None:
    requests, expected = _alone(LONG_SHAPE, torch.float32, None, one_thread)
    for kv_split in (64, 128, 512):
        (out,) = serve([requests[5]], whole, Serving(kv_split=kv_split))
        torch.testing.assert_close(out, expected[5], rtol=1e-4, atol=1e-5)
        assert not same_bytes(out, expected[5])
        (decoded,) = serve([requests[5]], decode_from(597), Serving(kv_split=kv_split))
        assert_same_bytes(decoded, out, f"a split of {kv_split}")


# Faults. Each is seen by the check that the operation passes above.


def _assert_check_fails(
    serving: Serving, schedule: Schedule, lengths: Sequence[int] = LENGTHS, shape: tuple[int, int, int] = LONG_SHAPE
) -> None:
    requests = _requests(shape, torch.float32, lengths)
    expected = [serve([request], whole, serving)[0] for request in requests]
    with pytest.raises(AssertionError, match="elements differ"):
        _assert_served_alike(requests, expected, schedule, serving)


def test_fault_split_follows_the_batch(one_thread: int) -> None:
    def plan(starts: torch.Tensor, seq_lens: torch.Tensor, *args: object, **kwargs: object) -> tuple[QueryTiles, ...]:
        """A fixed number of splits, shared among the requests; so their size follows the longest."""
        num_splits = max(1, 4 // len(seq_lens))
        kv_split = max(KEY_TILE, 1 << (-(-int(seq_lens.max()) // num_splits) - 1).bit_length())
        return plan_attention(starts, seq_lens, *args, **{**kwargs, "kv_split": kv_split})

    _assert_check_fails(Serving(plan=plan), whole)
    _assert_check_fails(Serving(plan=plan), decode_from(250), lengths=(257,))


def test_fault_merge_in_order_of_arrival(one_thread: int) -> None:
    def plan(starts: torch.Tensor, seq_lens: torch.Tensor, *args: object, **kwargs: object) -> tuple[QueryTiles, ...]:
        """With several requests in a step their splits come in any order."""
        numbers = random.Random(len(seq_lens))
        tiles = plan_attention(starts, seq_lens, *args, **kwargs)
        if len(seq_lens) == 1:
            return tiles
        return tuple(replace(t, batches=tuple(numbers.sample(t.batches, len(t.batches)))) for t in tiles)

    _assert_check_fails(Serving(plan=plan, kv_split=64, max_split_rows=1), whole)


def _bmm_by_rows(a: torch.Tensor, b: torch.Tensor, min_batch: int) -> torch.Tensor:
    """The inner dimension in two halves for tiles of few rows, as a library does to occupy all threads."""
    if a.shape[1] > BASE_ROWS:
        return torch.bmm(a, b)
    half = a.shape[2] // 2
    return torch.bmm(a[..., :half], b[:, :half]) + torch.bmm(a[..., half:], b[:, half:])


def test_fault_tile_of_rows_follows_the_chunk(monkeypatch: pytest.MonkeyPatch, one_thread: int) -> None:
    monkeypatch.setattr(sys.modules[split_partial.__module__], "_bmm", _bmm_by_rows)
    _assert_check_fails(Serving(row_tiles=(16, 32)), decode_from(250), lengths=(257,))
    # With one tile for all, such a library does no harm.
    requests = _requests(LONG_SHAPE, torch.float32, (257,))
    _assert_served_alike(requests, serve(requests, whole, Serving()), decode_from(250), Serving())


def test_fault_stale_units_are_not_cleared(one_thread: int) -> None:
    def write(units: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        slots = units.shape[3]
        units[slot_mapping // slots, 0, :, slot_mapping % slots] = k
        units[slot_mapping // slots, 1, :, slot_mapping % slots] = v

    # A whole prefill of 37 tokens leaves 27 stale slots in its key tile: NaN times weight zero is NaN.
    requests = _requests(LONG_SHAPE, torch.float32, (37,))
    expected = serve(requests, whole, Serving(stale=0.0, write=write))
    with pytest.raises(AssertionError, match="elements differ"):
        _assert_served_alike(requests, expected, whole, Serving(write=write))


# The cache.


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_writes_each_slot_and_reads_it_back(block_size: int) -> None:
    cache = torch.full((3, 2, block_size, 2 * 8), math.nan)
    units = cache_units(cache, block_size)
    slots_in_unit = min(block_size, KEY_TILE)
    assert units.shape == (3 * block_size // slots_in_unit, 2, 2, slots_in_unit, 8)
    assert units.data_ptr() == cache.data_ptr()
    k, v = torch.arange(1.0, 97).view(6, 2, 8), -torch.arange(1.0, 97).view(6, 2, 8)
    first = 2 * block_size
    slots = torch.tensor([first, first + 1, -1, first + 2, 5, -1])
    write_cache(units, k, v, slots)
    for token in (0, 1, 3):
        slot = int(slots[token])
        unit = units[slot // slots_in_unit]
        assert torch.equal(unit[0, :, slot % slots_in_unit], k[token])
        assert torch.equal(unit[1, :, slot % slots_in_unit], v[token])
    assert not units[first // slots_in_unit, :, :, 3:].any()
    # Slot 5 does not open its unit, so the other slots keep what they hold; padding is written nowhere.
    assert units[0, :, :, [0, 4, 6]].isnan().all()
    assert not (units == k[2, 0, 0]).any()
    assert not (units == k[5, 0, 0]).any()


def test_a_workspace_is_used_again() -> None:
    workspace = Workspace()
    large = workspace.take("k", (4, 6), torch.float32)
    small = workspace.take("k", (2, 3), torch.float32)
    assert small.shape == (2, 3)
    assert small.data_ptr() == large.data_ptr()
    assert workspace.take("v", (4, 6), torch.float32).data_ptr() != large.data_ptr()
    assert workspace.take("k", (4, 6), torch.bfloat16).dtype == torch.bfloat16
