# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_deterministic.triton_kernels.reference import plan_attention
from vllm_deterministic.triton_kernels.reference.attention import KEY_TILE
from vllm_deterministic.triton_kernels.reference.attention_plan import QueryTiles, cache_unit


@dataclass(frozen=True)
class Step:
    """``query_lens`` tokens of each request after ``contexts`` cached ones, and the planner's settings."""

    query_lens: list[int]
    contexts: list[int]
    block_size: int
    kv_split: int
    group_size: int
    row_tiles: list[int]
    window: int | None
    max_split_rows: int

    @property
    def starts(self) -> list[int]:
        return [sum(self.query_lens[:request]) for request in range(len(self.query_lens) + 1)]

    @property
    def seq_lens(self) -> list[int]:
        return [query + context for query, context in zip(self.query_lens, self.contexts, strict=True)]

    def block_table(self) -> torch.Tensor:
        """No two requests share a block; the rest of each row, of which nothing may be read, is -1."""
        blocks = [-(-length // self.block_size) for length in self.seq_lens]
        table = torch.full((len(blocks), max(blocks) + 1), -1, dtype=torch.int32)
        numbers = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(sum(blocks)))
        for request, own in enumerate(numbers.split(blocks)):
            table[request, : len(own)] = own
        return table

    def plan(self) -> tuple[QueryTiles, ...]:
        return plan_attention(
            torch.tensor(self.starts, dtype=torch.int32),
            torch.tensor(self.seq_lens, dtype=torch.int32),
            self.block_table(),
            block_size=self.block_size,
            kv_split=self.kv_split,
            group_size=self.group_size,
            row_tiles=self.row_tiles,
            window=self.window,
            max_split_rows=self.max_split_rows,
        )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    requests = draw(st.integers(1, 5))
    kv_split = draw(st.sampled_from([64, 128, 256]))
    group_size = draw(st.sampled_from([1, 2, 4, 5, 7]))
    tiles = st.sampled_from([rows for rows in (4, 8, 16, 32, 64) if rows >= group_size])
    query = st.one_of(st.just(1), st.integers(0, 40))
    query_lens = draw(st.lists(query, min_size=requests, max_size=requests))
    context = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 255, 256, 257, 600]))
    return Step(
        query_lens,
        draw(st.lists(context, min_size=requests, max_size=requests)),
        draw(st.sampled_from([size for size in (16, 32, 64, 128, 256) if size <= kv_split])),
        kv_split,
        group_size,
        sorted(draw(st.sets(tiles, min_size=1))),
        draw(st.one_of(st.none(), st.integers(1, 300))),
        draw(st.sampled_from([1, 1 << 12, 1 << 16])),
    )


@settings(deadline=None, derandomize=True, max_examples=25)
@given(steps())
def test_every_token_is_written_once_by_a_tile_of_its_request(step: Step) -> None:
    written = torch.zeros(sum(step.query_lens), dtype=torch.int64)
    request_of = torch.arange(len(step.query_lens)).repeat_interleave(torch.tensor(step.query_lens))
    for tiles in step.plan():
        assert tiles.rows in step.row_tiles
        assert tiles.tokens * step.group_size <= tiles.rows
        assert tiles.valid[:, 0].all()
        written += torch.bincount(tiles.token[tiles.valid], minlength=len(written))
        assert (request_of[tiles.token] == request_of[tiles.token[:, :1]]).all()
    assert (written == 1).all()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(steps())
def test_every_row_sees_every_key_of_its_window_once(step: Step) -> None:
    position_of = torch.cat(
        [torch.arange(context, context + query) for query, context in zip(step.query_lens, step.contexts, strict=True)]
    )
    request_of = torch.arange(len(step.query_lens)).repeat_interleave(torch.tensor(step.query_lens))
    held = _position_of_units(step)
    for tiles in step.plan():
        seen = torch.zeros(len(tiles.token), tiles.rows, max(step.seq_lens), dtype=torch.int64)
        for batch in tiles.batches:
            units_per_tile = KEY_TILE // cache_unit(step.block_size)
            units = batch.units.view(len(batch.tile), -1, units_per_tile).tolist()
            for split, tile in enumerate(batch.tile.tolist()):
                request = int(request_of[tiles.token[tile, 0]])
                for key_tile, key_units in enumerate(units[split]):
                    visible = batch.visible[split, key_tile, 0]
                    for place, unit in enumerate(key_units):
                        own, position = held[unit]
                        assert own == request
                        slots = slice(place * cache_unit(step.block_size), (place + 1) * cache_unit(step.block_size))
                        part = visible[:, slots]
                        columns = part.any(dim=0).nonzero().flatten()
                        seen[tile][:, position + columns] += part[:, columns].long()
        key = torch.arange(max(step.seq_lens))
        for tile, tokens in enumerate(tiles.token):
            position = position_of[tokens].repeat(step.group_size).unsqueeze(-1)
            expected = key <= position
            if step.window is not None:
                expected &= key > position - step.window
            assert torch.equal(seen[tile][: len(position)], expected.long())


def _position_of_units(step: Step) -> dict[int, tuple[int, int]]:
    """Of each cache unit, whose request it is and which position its first slot holds."""
    unit, table = cache_unit(step.block_size), step.block_table()
    return {
        int(table[request, position // step.block_size]) * (step.block_size // unit)
        + position % step.block_size // unit: (request, position)
        for request, length in enumerate(step.seq_lens)
        for position in range(0, length, unit)
    }


@settings(deadline=None, derandomize=True, max_examples=25)
@given(steps())
def test_splits_ascend_and_a_run_holds_a_tile_once(step: Step) -> None:
    for tiles in step.plan():
        last = torch.full((len(tiles.token),), -1)
        held = _position_of_units(step)
        for batch in tiles.batches:
            assert len(batch.tile) == 1 or len(batch.tile) * step.kv_split * tiles.rows <= step.max_split_rows
            assert [begin for begin, _ in batch.runs] == [0, *(end for _, end in batch.runs[:-1])]
            assert batch.runs[-1][1] == len(batch.tile)
            first_units = batch.units.view(len(batch.tile), -1)[:, 0].tolist()
            split = torch.tensor([held[unit][1] for unit in first_units])
            assert (split % step.kv_split == 0).all()
            for begin, end in batch.runs:
                assert len(split[begin:end].unique()) == 1
                assert len(batch.tile[begin:end].unique()) == end - begin
                assert (split[begin:end] > last[batch.tile[begin:end]]).all()
                last[batch.tile[begin:end]] = split[begin:end]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(steps(), st.data())
def test_a_requests_splits_do_not_depend_on_its_neighbours(step: Step, data: st.DataObject) -> None:
    request = data.draw(st.sampled_from([r for r, length in enumerate(step.query_lens) if length] or [0]))
    alone = Step(**{**vars(step), "query_lens": [step.query_lens[request]], "contexts": [step.contexts[request]]})
    assert _splits_by_tile(alone)[0] == _splits_by_tile(step)[request]


def _splits_by_tile(step: Step) -> list[list[tuple[int, int, list[int]]]]:
    """By request, of each tile in order: its rows, its first token's place, and the first positions of its splits."""
    request_of = torch.arange(len(step.query_lens)).repeat_interleave(torch.tensor(step.query_lens))
    held, out = _position_of_units(step), [[] for _ in step.query_lens]
    for tiles in step.plan():
        splits: list[list[int]] = [[] for _ in tiles.token]
        for batch in tiles.batches:
            for tile, units in zip(batch.tile.tolist(), batch.units.view(len(batch.tile), -1).tolist(), strict=True):
                splits[tile].append(held[units[0]][1])
        for tile, first in enumerate(tiles.token[:, 0].tolist()):
            request = int(request_of[first])
            out[request].append((tiles.rows, first - step.starts[request], splits[tile]))
    return out


def test_takes_the_smallest_tile_that_holds_a_request() -> None:
    step = Step([1, 2, 3, 8, 9, 40], [10] * 6, 16, 64, 4, [4, 16, 32], None, 1 << 16)
    rows = {request: {rows for rows, _, _ in tiles} for request, tiles in enumerate(_splits_by_tile(step))}
    assert rows == {0: {4}, 1: {16}, 2: {16}, 3: {32}, 4: {32}, 5: {32}}


def test_leaves_out_splits_before_the_window() -> None:
    step = Step([1], [1023], 128, 256, 1, [16], 300, 1 << 16)
    assert _splits_by_tile(step) == [[(16, 0, [512, 768])]]


def test_a_step_without_tokens_has_no_tiles() -> None:
    assert Step([0, 0], [5, 7], 16, 64, 1, [16], None, 1 << 16).plan() == ()
