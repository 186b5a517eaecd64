# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
"""Attention at small sizes: a row's bytes are those of one prefill of its whole sequence, however it is asked."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction
from vllm_deterministic.triton_kernels import attention as attention_module
from vllm_deterministic.triton_kernels import attention_kernel
from vllm_deterministic.triton_kernels.attention import attention
from vllm_deterministic.triton_kernels.attention_plan import (
    WORKSPACE_BYTES,
    AttentionFold,
    AttentionPlan,
    AttentionTile,
    attention_plan,
    long_tiles,
    workspace_bytes,
)
from vllm_deterministic.triton_kernels.reference.split_attention import split_attention

from .attention_oracle import attention_oracle
from .attention_refusals import REFUSED
from .interpreter import INTERPRETED, interpreting
from .invariance import assert_same_bytes
from .oracles import assert_close
from .paged_requests import LAYOUTS, Piece, Tokens, paged, random_tokens, whole

pytestmark = INTERPRETED

FOLD = AttentionFold(split=32, key_tile=16)
SMALL, LARGE = AttentionTile(16, warps=4, stages=2), AttentionTile(32, warps=4, stages=2)
# Each road, and both in one batch: requests of up to 16 rows on one, of more on the other.
PLANS = {
    "long": AttentionPlan(None, 0, 1, SMALL),
    "long, by pointers": AttentionPlan(None, 0, 1, LARGE, descriptors=False),
    "short, three programs": AttentionPlan(SMALL, 15, 3, LARGE),
    "short, two splits a program": AttentionPlan(SMALL, 15, 3, LARGE, least=2),
    "short, up to two splits a program": AttentionPlan(SMALL, 15, 3, LARGE, least=2, at_once=5),
    "short, a program a split": AttentionPlan(LARGE, 6, 100, SMALL),
    "short, in registers": AttentionPlan(SMALL, 100, 1, SMALL),
}
SCALE = 0.2
HEADS = 3
SLOPES, SINKS = torch.tensor([0.5, 0.25, 0.0625]), torch.tensor([1.0, -2.0, -math.inf])


@triton.jit
def _relative(score, head, q_position, key, data_ptr):
    return score + tl.load(data_ptr + head) * ((q_position - key) % 5).to(tl.float32)


@triton.jit
def _blocks_of_seven(head, q_position, key, data_ptr):
    return (key // 7 == q_position // 7) | (key % 3 == 0)


@triton.jit
def _nothing_before_ten(head, q_position, key, data_ptr):
    return q_position >= 10


SCORES = torch.linspace(-1, 1, HEADS + 1)
# What a feature asks of the kernel, and what of the oracle.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "window": ({"window": 11}, {"window": 11}),
    "window of a split": ({"window": 32}, {"window": 32}),
    "softcap": ({"softcap": 3.0}, {"softcap": 3.0}),
    "ALiBi": ({"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES}),
    "sinks": ({"sinks": SINKS}, {"sinks": SINKS}),
    "window, softcap and sinks": 2 * ({"window": 23, "softcap": 5.0, "sinks": SINKS},),
    "score_mod": (
        {"score_mod": InterpretedFunction(_relative.fn), "mod_data": SCORES},
        {"score": lambda s, head, row, key: s + float(SCORES[head]) * ((row - key) % 5)},
    ),
    "mask_mod": (
        {"mask_mod": InterpretedFunction(_blocks_of_seven.fn)},
        {"mask": lambda head, row, key: (key // 7 == row // 7) | (key % 3 == 0)},
    ),
    "rows that see nothing": (
        {"mask_mod": InterpretedFunction(_nothing_before_ten.fn)},
        {"mask": lambda head, row, key: (row >= 10) & (key >= 0)},
    ),
}


def _tokens(length: int, seed: int, dtype: torch.dtype = torch.float32, head_dim: int = 64, heads: int = HEADS,
            kv_heads: int = 1) -> Tokens:  # fmt: skip
    return random_tokens(length, heads, kv_heads, head_dim, dtype, torch.Generator().manual_seed(seed))


def _attend(
    pieces: Sequence[Piece], plan: str = "long", block_size: int = 16, layout: str = LAYOUTS[0], **options: Any
) -> list[torch.Tensor]:
    """The rows of each piece."""
    options = {"scale": SCALE, "fold": FOLD, "plan": PLANS[plan]} | options
    out = attention(*paged(pieces, block_size, layout), **options)
    return list(out.split([len(piece) for piece in pieces]))


def _assert_rows(pieces: Sequence[Piece], expected: dict[int, torch.Tensor], what: str, **options: Any) -> None:
    """Each piece's rows have the bytes of one prefill of its whole sequence."""
    for piece, rows in zip(pieces, _attend(pieces, **options), strict=True):
        assert_same_bytes(rows, expected[id(piece.tokens)][piece.start : piece.stop], f"{what}, {piece.start}:")


@pytest.mark.parametrize(
    ("feature", "dtype"), [*((feature, torch.float32) for feature in FEATURES), ("sinks", torch.float16)]
)
def test_close_to_the_oracle(feature: str, dtype: torch.dtype) -> None:
    options, of_oracle = FEATURES[feature]
    tokens = _tokens(55, 0, dtype)
    expected = attention_oracle(tokens, scale=SCALE, **of_oracle)
    (out,) = _attend([whole(tokens)], **options)
    assert out.dtype == dtype
    assert_close(out, expected)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_keeps_the_same_fold(feature: str) -> None:
    options, of_oracle = FEATURES[feature]
    mods = {f"{name}_mod": of_oracle[name] for name in ("score", "mask") if name in of_oracle}
    mods = {name: _by_head(mod) if name == "score_mod" else mod for name, mod in mods.items()}
    options = {name: value for name, value in options.items() if "mod" not in name}
    tokens = _tokens(75, 0, torch.float32)
    pieces = [Piece(tokens, 74, 75), whole(tokens), Piece(tokens, 30, 41)]
    out = split_attention(*paged(pieces, 16), scale=SCALE, fold=FOLD, **options, **mods)
    expected = attention_oracle(tokens, scale=SCALE, **of_oracle)
    assert_close(out, torch.cat([expected[piece.start : piece.stop] for piece in pieces]))


def _by_head(score: Any) -> Any:
    """A score function of one head as one of all heads."""
    return lambda s, head, row, key: torch.stack([score(s[h], h, row, key) for h in head.flatten().tolist()])


@pytest.mark.parametrize("feature", FEATURES)
def test_every_road_gives_the_bytes_of_one_prefill(feature: str) -> None:
    """Decode, k + 1 tokens, chunks at odd boundaries and whole prompts in one batch, by both roads."""
    options, _ = FEATURES[feature]
    tokens = _tokens(70, 0)
    expected = {id(tokens): _attend([whole(tokens)], **options)[0]}
    pieces = [Piece(tokens, 69, 70), Piece(tokens, 31, 36), Piece(tokens, 43, 65)]
    _assert_rows(pieces, expected, feature, plan="short, three programs", block_size=32, **options)


@pytest.mark.parametrize("plan", ["long", "long, by pointers", "short, three programs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_block_sizes_keep_the_bytes(layout: str, plan: str) -> None:
    tokens = _tokens(45, 0)
    expected = {id(tokens): _attend([whole(tokens)])[0]}
    for block_size in (8, 32):
        pieces = [Piece(tokens, 44, 45), Piece(tokens, 20, 37)]
        _assert_rows(pieces, expected, f"{block_size}", plan=plan, block_size=block_size, layout=layout)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_chunks_neighbours_blocks_and_roads(data: st.DataObject) -> None:
    feature = data.draw(st.sampled_from(sorted(FEATURES)))
    options, _ = FEATURES[feature]
    tokens = _tokens(data.draw(st.integers(1, 70)), 0)
    cuts = data.draw(st.sets(st.integers(1, max(1, len(tokens) - 1)), max_size=2)) - {len(tokens)}
    edges = [0, *sorted(cuts), len(tokens)]
    others = [
        (_tokens(length, 1 + number), start % length)
        for number, (length, start) in enumerate(
            data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)), max_size=1))
        )
    ]
    pieces = [Piece(tokens, start, stop) for start, stop in itertools.pairwise(edges)]
    pieces = data.draw(st.permutations(pieces + [Piece(t, start, len(t)) for t, start in others]))
    with interpreting():
        expected = {id(t): _attend([whole(t)], **options)[0] for t in (tokens, *(t for t, _ in others))}
        _assert_rows(
            pieces,
            expected,
            feature,
            plan=data.draw(st.sampled_from(sorted(PLANS))),
            block_size=data.draw(st.sampled_from([16, 32])),
            layout=data.draw(st.sampled_from(LAYOUTS)),
            decodes=data.draw(st.integers(0, next((i for i, p in enumerate(pieces) if len(p) > 1), len(pieces)))),
            **options,
        )


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("decodes", [0, 1, 3])
def test_chunks_behind_decodes(plan: str, decodes: int) -> None:
    first, second = _tokens(55, 0), _tokens(60, 1)
    expected = {id(tokens): _attend([whole(tokens)])[0] for tokens in (first, second)}
    pieces = [*(Piece(first, end - 1, end) for end in (20, 21, 22)), Piece(second, 3, 12), Piece(first, 40, 52)]
    _assert_rows(pieces, expected, plan, plan=plan, decodes=decodes)


@given(
    lens=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    decodes=st.integers(0, 40),
    group=st.integers(1, 9),
    block_m=st.sampled_from([16, 64, 128, 192]),
)
def test_every_long_tile_has_a_number(lens: list[int], decodes: int, group: int, block_m: int) -> None:
    """Request r's tiles are numbered from ``query_start[r] * group // block_m + r`` on."""
    lens = [1] * decodes + lens
    starts = [0, *itertools.accumulate(lens)]
    first = decodes * group // block_m + decodes
    last = [starts[r] * group // block_m + r - first - (-lens[r] * group // block_m) for r in range(decodes, len(lens))]
    assert max(last) <= long_tiles(sum(lens), len(lens), decodes, group, block_m)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 80), (5, 1, 96), (7, 1, 64), (4, 2, 128), (20, 1, 192), (2, 2, 256)]
)
def test_heads_of_every_size_and_group(heads: int, kv_heads: int, head_dim: int) -> None:
    tokens = _tokens(33, 0, torch.float32, head_dim, heads, kv_heads)
    (prefill,) = _attend([whole(tokens)], scale=head_dim**-0.5)
    assert_close(prefill, attention_oracle(tokens, scale=head_dim**-0.5))
    for plan, layout in (("short, three programs", LAYOUTS[0]), ("short, a program a split", LAYOUTS[1])):
        pieces = [Piece(tokens, 32, 33), Piece(tokens, 20, 22)]
        _assert_rows(pieces, {id(tokens): prefill}, plan, plan=plan, layout=layout, block_size=32, scale=head_dim**-0.5)


@triton.jit
def _from(head, q_position, key, data_ptr):
    return key >= tl.load(data_ptr)


def _behind(tokens: Tokens, hidden: int) -> torch.Tensor:
    """The last row of a sequence with ``hidden`` more tokens ahead of it that no row may see."""
    ahead = [torch.zeros(hidden, *x.shape[1:], dtype=x.dtype) for x in (tokens.q, tokens.k, tokens.v)]
    behind = Tokens(*(torch.cat(pair) for pair in zip(ahead, (tokens.q, tokens.k, tokens.v), strict=True)))
    piece = Piece(behind, len(behind) - 1, len(behind))
    options = {"mask_mod": InterpretedFunction(_from.fn), "mod_data": torch.tensor([hidden], dtype=torch.int32)}
    return _attend([piece], "short, three programs", **options)[0]


def test_hidden_splits_are_exact_no_ops() -> None:
    tokens = _tokens(100, 0)
    for hidden in (FOLD.split, 3 * FOLD.split):
        assert_same_bytes(_behind(tokens, hidden), _attend([whole(tokens)])[0][-1:], f"{hidden} hidden positions")


@pytest.mark.parametrize("hidden", [FOLD.key_tile, 7])
def test_fault_of_splits_aligned_to_the_chunk_is_seen(hidden: int) -> None:
    """Splits that begin elsewhere than at a multiple of their size, as they would where a chunk's first row says."""
    tokens = _tokens(100, 0)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bytes(_behind(tokens, hidden), _attend([whole(tokens)])[0][-1:], "aligned to the chunk")


# Of a split, so that the reference has tiles to be raised in.
EIGHT_TILES = AttentionFold(split=128, key_tile=16)
# By how much, in units of log 2, scores rise from each tile to the next: never enough to raise the reference, after a
# few tiles, at each tile; fall; and beyond what any weight can hold.
RISES = (0.0, 0.5, 3.0, 7.9, 8.1, 20.0, -3.0, 500.0, -500.0)


def _rising(rise: float, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> Tokens:
    """Scores that rise with the position, by more for later query heads, beside what they are at random."""
    tokens = _tokens(150, 0, dtype, heads=heads)
    q, k = tokens.q.clone(), tokens.k.clone()
    q[..., 0] = torch.linspace(0.5, 1.0, heads)
    k[..., 0] = (torch.arange(len(k)) * (rise / EIGHT_TILES.key_tile * math.log(2) / SCALE)).unsqueeze(1)
    return replace(tokens, q=q, k=k)


@pytest.mark.parametrize(("rise", "dtype"), zip(RISES, itertools.cycle([torch.float32, torch.float16])))
def test_a_reference_that_is_raised_seldom_or_often(rise: float, dtype: torch.dtype) -> None:
    tokens = _rising(rise, dtype)
    (prefill,) = _attend([whole(tokens)], fold=EIGHT_TILES)
    assert_close(prefill, attention_oracle(tokens, scale=SCALE))
    pieces = [Piece(tokens, 149, 150), Piece(tokens, 139, 144), Piece(tokens, 40, 51)]
    _assert_rows(pieces, {id(tokens): prefill}, f"{rise}", plan="short, three programs", fold=EIGHT_TILES)


@triton.jit
def _raised_together(m, largest):
    return tl.where(tl.max(tl.where(m == largest, 0.0, largest - m), axis=0) > 8.0, tl.maximum(m, largest), m)


def test_fault_of_a_reference_raised_for_other_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one tile whose references are raised together, as a warp's vote on more than time would raise them."""
    tokens = _rising(4.0)
    piece = [Piece(tokens, 149, 150)]
    expected = {id(tokens): _attend([whole(tokens)], fold=EIGHT_TILES)[0]}
    _assert_rows(piece, expected, "each by itself", plan="short, three programs", fold=EIGHT_TILES)
    monkeypatch.setattr(attention_kernel, "raised", InterpretedFunction(_raised_together.fn))
    expected = {id(tokens): _attend([whole(tokens)], fold=EIGHT_TILES)[0]}
    with pytest.raises(AssertionError, match="elements differ"):
        _assert_rows(piece, expected, "together", plan="short, three programs", fold=EIGHT_TILES)


def test_fault_of_splits_that_follow_the_batch_is_seen() -> None:
    tokens, other = _tokens(100, 0), _tokens(40, 1)
    expected = {id(t): _attend([whole(t)])[0] for t in (tokens, other)}
    for pieces in ([Piece(tokens, 99, 100)], [Piece(tokens, 99, 100), whole(other)]):
        _assert_rows(pieces, expected, f"{len(pieces)}", fold=FOLD)
        by_batch = replace(FOLD, split=FOLD.split * len(pieces))
        if by_batch != FOLD:
            with pytest.raises(AssertionError, match="elements differ"):
                _assert_rows(pieces, expected, f"{len(pieces)}", fold=by_batch)


def test_fault_of_merging_in_reverse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _tokens(100, 0)
    expected = {id(tokens): _attend([whole(tokens)])[0]}
    piece = [Piece(tokens, 99, 100)]
    _assert_rows(piece, expected, "in order", plan="short, three programs")
    real = attention_kernel.fold_kernel

    class Reversed:
        def __getitem__(self, grid: Any) -> Any:
            def launch(partial: torch.Tensor, m: torch.Tensor, total: torch.Tensor, *args: Any, **options: Any) -> None:
                slots, rows = args[8:10]
                states = (x.view(-1, slots, rows, *x.shape[1:]).flip(1).flatten(0, 2) for x in (partial, m, total))
                real[grid](*states, *args, **options)

            return launch

    monkeypatch.setattr(attention_module, "fold_kernel", Reversed())
    with pytest.raises(AssertionError, match="elements differ"):
        _assert_rows(piece, expected, "in reverse", plan="short, three programs")


@pytest.mark.parametrize("plan", ["long", "short, three programs", "short, in registers"])
def test_only_rows_of_requests_are_written(plan: str) -> None:
    """Padding as CUDA graphs have it: rows past the last request's, and requests of no rows."""
    tokens = _tokens(70, 0)
    (expected,) = _attend([whole(tokens)])
    pieces = [Piece(tokens, 69, 70), Piece(tokens, 50, 70)]
    q, k_cache, v_cache, table, starts, lengths = paged(pieces, 16)
    padded = torch.cat([q, torch.full((5, *q.shape[1:]), math.nan)])
    table = torch.cat([table, torch.full((3, table.shape[1]), 10**6, dtype=torch.int32)])
    starts = torch.cat([starts, starts[-1:].expand(3)])
    lengths = torch.cat([lengths, torch.tensor([0, 70, 0], dtype=torch.int32)])
    buffer = torch.full((len(padded) + 2, HEADS + 1, 64 + 8), 77.0)
    inside = buffer[1:-1, :HEADS, 8:]
    out = attention(
        padded, k_cache, v_cache, table, starts, lengths, scale=SCALE, fold=FOLD, plan=PLANS[plan], out=inside
    )
    assert out.data_ptr() == inside.data_ptr()
    assert_same_bytes(inside[:21], torch.cat([expected[69:], expected[50:]]), "rows")
    inside[:21] = 77.0
    assert bool((buffer == 77).all())


@pytest.mark.parametrize("plan", ["long", "short, three programs", "short, in registers"])
def test_a_request_longer_than_promised_is_nan(plan: str) -> None:
    tokens, other = _tokens(70, 0), _tokens(20, 1)
    long, short = _attend([Piece(tokens, 60, 70), Piece(other, 15, 20)], plan, max_seq_len=69)
    assert bool(long.isnan().all())
    assert_same_bytes(short, _attend([whole(other)])[0][15:], "beside it")


def test_the_plan_covers_every_request_within_its_workspace() -> None:
    for requests in (1, 3, 64, 256, 1024):
        for max_query_len in (1, 5, 2048):
            for group, kv_heads, head_dim in ((4, 8, 128), (1, 16, 64), (71, 1, 64), (8, 8, 256)):
                for max_splits in (1, 2, 64, 256):
                    plan = attention_plan(
                        head_dim=head_dim,
                        group=group,
                        kv_heads=kv_heads,
                        requests=requests,
                        max_query_len=max_query_len,
                        max_splits=max_splits,
                    )
                    assert plan.long or plan.short_rows >= max_query_len * group
                    assert plan.long or max_query_len < 2048
                    workspace = workspace_bytes(requests, kv_heads, max_splits, plan.short_rows, head_dim)
                    assert plan.parts == 1 or workspace <= WORKSPACE_BYTES
                    assert plan.parts <= max_splits


def test_no_requests_and_no_rows() -> None:
    tokens = _tokens(5, 0)
    q, k_cache, v_cache, table, starts, lengths = paged([whole(tokens)], 16)
    assert attention(q[:0], k_cache, v_cache, table, starts * 0, lengths, scale=1.0).shape == (0, HEADS, 64)
    assert attention(q, k_cache, v_cache, table[:0], starts[:1], lengths[:0], scale=1.0).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *REFUSED,
        ({"q": lambda a: a["q"][..., :48]}, r"k_cache is .* 48\]"),
        ({x: lambda a, x=x: a[x][..., :48] for x in ("q", "k_cache", "v_cache")}, r"q is \(5, 3, 48\) .* D one of"),
        ({"v_cache": lambda a: a["v_cache"].transpose(1, 3).contiguous().transpose(1, 3)}, "v_cache has strides"),
        (
            {
                "k_cache": lambda a: a["k_cache"].repeat(1, 1, 2, 1),
                "v_cache": lambda a: a["v_cache"].repeat(1, 1, 2, 1),
            },
            "q has 3 heads and k_cache 2",
        ),
        ({"fold": lambda a: AttentionFold(40, 8)}, "split is 40 and key_tile 8"),
        ({"fold": lambda a: AttentionFold(72, 16)}, "split is 72"),
        ({"fold": lambda a: AttentionFold(48, 16), "block": 32}, "a block has 32 slots and a split 48"),
        ({"decodes": lambda a: 2}, "decodes is 2; of 1 requests with 5"),
        ({"plan": lambda a: AttentionPlan(None, 0, 1, None)}, "takes no request"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    names = ("q", "k_cache", "v_cache", "block_table", "query_start_loc", "seq_lens")
    change = dict(change)
    tensors = paged([whole(_tokens(5, 0))], change.pop("block", 16))
    arguments: dict[str, Any] = dict(zip(names, tensors, strict=True)) | {"scale": 1.0, "fold": FOLD}
    with pytest.raises(ValueError, match=message):
        attention(**(arguments | {name: value(arguments) for name, value in change.items()}))
