# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
"""Attention on torch's FlexAttention at small sizes, by its own definition on CPU.

Library products on CPU promise no bytes. Padded to one shape they keep them, which shows that all around them does.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_deterministic.triton_kernels import flex_attention as flex_module
from vllm_deterministic.triton_kernels.attention_plan import AttentionFold
from vllm_deterministic.triton_kernels.flex_attention import jobs_at_once, split_flex_attention
from vllm_deterministic.triton_kernels.flex_jobs import query_tiles
from vllm_deterministic.triton_kernels.flex_split import compiled_splits

from .attention_oracle import attention_oracle
from .attention_refusals import REFUSED
from .invariance import assert_same_bytes
from .oracles import assert_close
from .paged_requests import LAYOUTS, Piece, Tokens, paged, random_tokens, whole

FOLD = AttentionFold(split=32, key_tile=16)
SCALE, HEADS, LENGTH = 0.2, 3, 100
SLOPES, SINKS = torch.tensor([0.5, 0.25, 0.0625]), torch.tensor([1.0, -2.0, -math.inf])
SCORES, SEEN = torch.linspace(-1, 1, HEADS), torch.arange(LENGTH) % 3 != 1


# Both look tables up, as a model's do, by positions that the longest sequence has.
def _relative(score: Any, batch: Any, head: Any, row: Any, key: Any) -> Any:
    return score + SCORES[head + batch] * ((row - key) % 5)


def _two_in_three(batch: Any, head: Any, row: Any, key: Any) -> Any:
    return SEEN[key] | ~SEEN[row + batch]


def _nothing_before_ten(batch: Any, head: Any, row: Any, key: Any) -> Any:
    return row >= 10


# What a feature asks of the function, and what of the oracle.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "window": 2 * ({"window": 11},),
    "window of a split": 2 * ({"window": 32},),
    "softcap": 2 * ({"softcap": 3.0},),
    "ALiBi": 2 * ({"alibi_slopes": SLOPES},),
    "sinks": 2 * ({"sinks": SINKS},),
    "window, softcap and sinks": 2 * ({"window": 23, "softcap": 5.0, "sinks": SINKS},),
    "score_mod": ({"score_mod": _relative}, {"score": lambda s, head, row, key: s + SCORES[head] * ((row - key) % 5)}),
    "mask_mod": ({"mask_mod": _two_in_three}, {"mask": lambda head, row, key: SEEN[key] | ~SEEN[row]}),
    "rows that see nothing": (
        {"mask_mod": _nothing_before_ten},
        {"mask": lambda head, row, key: (row >= 10) & (key >= 0)},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def few_jobs() -> Iterator[None]:
    """Jobs in small groups, so that small sizes take several calls, and room for every kernel of this module."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=100):
        patch.setattr(flex_module, "MOST_JOBS", 4)
        yield


def _tokens(length: int = LENGTH, seed: int = 0, dtype: torch.dtype = torch.float32, head_dim: int = 64,
            heads: int = HEADS, kv_heads: int = 1) -> Tokens:  # fmt: skip
    return random_tokens(length, heads, kv_heads, head_dim, dtype, torch.Generator().manual_seed(seed))


def _attend(
    pieces: Sequence[Piece], block_size: int = 16, layout: str = LAYOUTS[0], **options: Any
) -> list[torch.Tensor]:
    """The rows of each piece."""
    out = split_flex_attention(*paged(pieces, block_size, layout), **({"scale": SCALE, "fold": FOLD} | options))
    return list(out.split([len(piece) for piece in pieces]))


def _assert_rows(pieces: Sequence[Piece], expected: dict[int, torch.Tensor], what: str, **options: Any) -> None:
    """Each piece's rows have the bytes of one prefill of its whole sequence."""
    for piece, rows in zip(pieces, _attend(pieces, **options), strict=True):
        assert_same_bytes(rows, expected[id(piece.tokens)][piece.start : piece.stop], f"{what}, {piece.start}:")


@pytest.mark.parametrize(
    ("feature", "dtype"),
    [*((feature, torch.float32) for feature in FEATURES), ("sinks", torch.float16), ("sinks", torch.bfloat16)],
)
def test_close_to_the_oracle(feature: str, dtype: torch.dtype) -> None:
    options, of_oracle = FEATURES[feature]
    tokens = _tokens(dtype=dtype)
    (out,) = _attend([whole(tokens)], **options)
    assert out.dtype == dtype
    assert_close(out, attention_oracle(tokens, scale=SCALE, **of_oracle))


@pytest.mark.parametrize("feature", FEATURES)
def test_every_request_has_the_bytes_of_one_prefill(feature: str) -> None:
    """Decode, k + 1 tokens, chunks at odd boundaries and whole prompts, alone and in one batch."""
    options, _ = FEATURES[feature]
    tokens, other = _tokens(), _tokens(40, 1)
    expected = {id(t): _attend([whole(t)], **options)[0] for t in (tokens, other)}
    pieces = [Piece(tokens, 99, 100), Piece(other, 3, 40), Piece(tokens, 31, 36), Piece(tokens, 43, 95), whole(other)]
    for asked in (pieces, pieces[::-1], pieces[:1]):
        _assert_rows(asked, expected, feature, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_block_sizes_keep_the_bytes(layout: str) -> None:
    tokens = _tokens()
    expected = {id(tokens): _attend([whole(tokens)])[0]}
    for block_size in (1, 24, 64):
        pieces = [Piece(tokens, 99, 100), Piece(tokens, 20, 37)]
        _assert_rows(pieces, expected, f"{block_size}", block_size=block_size, layout=layout)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_chunks_neighbours_and_blocks(data: st.DataObject) -> None:
    feature = data.draw(st.sampled_from(sorted(FEATURES)))
    options, _ = FEATURES[feature]
    tokens = _tokens(data.draw(st.integers(1, LENGTH)))
    cuts = data.draw(st.sets(st.integers(1, max(1, len(tokens) - 1)), max_size=3)) - {len(tokens)}
    others = [
        (_tokens(length, 1 + number), start % length)
        for number, (length, start) in enumerate(
            data.draw(st.lists(st.tuples(st.integers(1, LENGTH), st.integers(0, 99)), max_size=4))
        )
    ]
    pieces = [Piece(tokens, start, stop) for start, stop in itertools.pairwise([0, *sorted(cuts), len(tokens)])]
    pieces = data.draw(st.permutations(pieces + [Piece(t, start, len(t)) for t, start in others]))
    expected = {id(t): _attend([whole(t)], **options)[0] for t in (tokens, *(t for t, _ in others))}
    _assert_rows(
        pieces,
        expected,
        feature,
        block_size=data.draw(st.integers(1, 40)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        **options,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 80), (5, 1, 96), (4, 2, 128), (71, 1, 16), (150, 1, 16), (4, 2, 48)]
)
def test_heads_of_every_size_and_group(heads: int, kv_heads: int, head_dim: int) -> None:
    tokens = _tokens(45, 0, torch.float32, head_dim, heads, kv_heads)
    (prefill,) = _attend([whole(tokens)])
    assert_close(prefill, attention_oracle(tokens, scale=SCALE))
    pieces = [Piece(tokens, 44, 45), Piece(tokens, 20, 22)]
    _assert_rows(pieces, {id(tokens): prefill}, f"{heads} heads")


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The tensors that each call of FlexAttention is given and gives."""
    calls: list[list[torch.Tensor]] = []
    attend = compiled_splits("cpu")

    def record(kernel: Any, *args: Any) -> Any:
        results = attend(kernel, *args)
        calls.append([x for x in (*args, *results) if x is not None])
        return results

    monkeypatch.setattr(flex_module, "compiled_splits", lambda device_type: record)
    return calls


def test_every_call_has_one_shape_within_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _recorded(monkeypatch)
    tokens = _tokens()
    monkeypatch.setattr(flex_module, "WORKSPACE_BYTES", 1 << 20)
    counts = []
    for pieces in ([Piece(tokens, 99, 100)], 12 * [Piece(tokens, 99, 100)], 12 * [Piece(tokens, 9, 10)]):
        _attend(pieces, max_query_len=1, max_seq_len=pieces[0].stop)
        counts.append(len(calls) - sum(counts))
    _attend(3 * [whole(tokens)])
    # Four jobs a call: the four splits of one tile, or of four tiles the only one.
    assert counts == [1, 12, 3]
    assert len({tuple((x.shape, x.stride(), x.dtype) for x in call) for call in calls}) == 1
    assert max(sum(x.nbytes for x in call) for call in calls) <= flex_module.WORKSPACE_BYTES


def test_one_compiled_kernel_serves_every_batch() -> None:
    tokens = _tokens()
    options = {**FEATURES["score_mod"][0], **FEATURES["mask_mod"][0], "window": 50}
    _attend([whole(tokens)], **options)
    with torch.compiler.set_stance("fail_on_recompile"):
        _attend([Piece(tokens, 99, 100)], block_size=5, layout=LAYOUTS[2], **options)
        _attend([Piece(tokens, n, n + 1) for n in range(9)] + [Piece(tokens, 9, 80)], **options)
        with pytest.raises(RuntimeError, match="recompile"):
            _attend([Piece(tokens, 99, 100)], **options | {"window": 51})


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without contents whatever asks for one raises."""
    monkeypatch.setattr(
        flex_module,
        "compiled_splits",
        lambda device_type: lambda kernel, rows, *args: (rows, rows.new_empty(rows.shape[:-1], dtype=torch.float32)),
    )
    tensors = [
        x.to("meta") for x in paged([whole(_tokens(dtype=torch.float16)), whole(_tokens(7, 1, torch.float16))], 16)
    ]
    out = split_flex_attention(*tensors, scale=1.0, fold=FOLD, window=40, sinks=SINKS.to("meta"))
    assert out.shape == tensors[0].shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(tensors[5].max() > 1)


def test_tiles_cover_every_row_once() -> None:
    starts = torch.tensor([0, 1, 1, 1, 38, 43, 60], dtype=torch.int32)
    lengths = torch.tensor([9, 12, 0, 40, 5, 99], dtype=torch.int32)
    tiles = query_tiles(starts, lengths, rows=64, width=4, max_query_len=37, multiple=8)
    assert len(tiles) % 8 == 0
    rows = tiles.tokens(nowhere=64)
    assert sorted(rows[rows != 64].tolist()) == list(range(60))
    for request, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        own = tiles.request[:, None].expand_as(rows)[(rows >= start) & (rows < stop)]
        assert own.tolist() == (stop - start) * [request]
    position = tiles.position[:, None] + torch.arange(4)
    ends = torch.where(rows == 64, 0, position - rows + starts[1:].long()[tiles.request][:, None])
    assert bool((ends == torch.where(rows == 64, 0, tiles.seq_len[:, None])).all())
    assert len(query_tiles(starts, lengths, rows=10**6, width=4, max_query_len=1, multiple=1)) == 6


def _behind(tokens: Tokens, hidden: int) -> torch.Tensor:
    """The last row of a sequence with ``hidden`` more tokens ahead of it that no row may see."""
    ahead = [torch.zeros(hidden, *x.shape[1:], dtype=x.dtype) for x in (tokens.q, tokens.k, tokens.v)]
    behind = Tokens(*(torch.cat(pair) for pair in zip(ahead, (tokens.q, tokens.k, tokens.v), strict=True)))
    piece = Piece(behind, len(behind) - 1, len(behind))
    return _attend([piece], mask_mod=lambda batch, head, row, key: key >= hidden)[0]


def test_hidden_splits_are_exact_no_ops() -> None:
    tokens = _tokens()
    for hidden in (FOLD.split, 3 * FOLD.split):
        assert_same_bytes(_behind(tokens, hidden), _attend([whole(tokens)])[0][-1:], f"{hidden} hidden positions")


@pytest.mark.parametrize("hidden", [FOLD.key_tile, 7])
def test_fault_of_splits_aligned_to_the_chunk_is_seen(hidden: int) -> None:
    """Splits that begin elsewhere than at a multiple of their size, as they would where a chunk's first row says."""
    tokens = _tokens()
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bytes(_behind(tokens, hidden), _attend([whole(tokens)])[0][-1:], "aligned to the chunk")


def test_fault_of_splits_that_follow_the_batch_is_seen() -> None:
    """As torch's SPLIT_KV has them: a number of splits, whose size the load decides."""
    tokens, other = _tokens(), _tokens(40, 1)
    expected = {id(t): _attend([whole(t)])[0] for t in (tokens, other)}
    pieces = [Piece(tokens, 99, 100), whole(other)]
    _assert_rows(pieces, expected, "of fixed size")
    with pytest.raises(AssertionError, match="elements differ"):
        _assert_rows(pieces, expected, "by load", fold=AttentionFold(FOLD.split * len(pieces), FOLD.key_tile))


def test_fault_of_merging_in_reverse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _tokens()
    expected = {id(tokens): _attend([whole(tokens)])[0]}
    piece = [Piece(tokens, 99, 100)]
    real = flex_module.fold_splits
    monkeypatch.setattr(flex_module, "fold_splits", lambda state, out, lse: real(state, out.flip(1), lse.flip(1)))
    with pytest.raises(AssertionError, match="elements differ"):
        _assert_rows(piece, expected, "in reverse")


def test_fault_of_a_state_that_forgets_its_maximum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs added without the weights that their splits have in the whole."""
    tokens = _tokens()

    def unweighted(state: Any, out: torch.Tensor, lse: torch.Tensor) -> Any:
        return real(state, out, torch.where(lse == -math.inf, lse, 0.0))

    real = flex_module.merge
    monkeypatch.setattr(flex_module, "merge", unweighted)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(_attend([whole(tokens)])[0], attention_oracle(tokens, scale=SCALE))


def test_only_rows_of_requests_are_written() -> None:
    """Padding as CUDA graphs have it: rows past the last request's, and requests of no rows or of too many."""
    tokens = _tokens()
    (expected,) = _attend([whole(tokens)])
    q, k_cache, v_cache, table, starts, lengths = paged([Piece(tokens, 99, 100), Piece(tokens, 80, 100)], 16)
    padded = torch.cat([q, torch.full((5, *q.shape[1:]), math.nan)])
    table = torch.cat([table, torch.full((3, table.shape[1]), 10**6, dtype=torch.int32)])
    starts = torch.cat([starts, starts[-1:].expand(3)])
    lengths = torch.cat([lengths, torch.tensor([0, 70, 0], dtype=torch.int32)])
    buffer = torch.full((len(padded) + 2, HEADS + 1, 64 + 8), 77.0)
    inside = buffer[1:-1, :HEADS, 8:]
    for max_query_len, written in ((20, 21), (19, 1)):
        out = split_flex_attention(
            padded, k_cache, v_cache, table, starts, lengths, scale=SCALE, fold=FOLD, max_query_len=max_query_len,
            out=inside,
        )  # fmt: skip
        assert out.data_ptr() == inside.data_ptr()
        assert_same_bytes(inside[:written], torch.cat([expected[99:], expected[80:]])[:written], "rows")
        inside[:written] = 77.0
        assert bool((buffer == 77).all())


def test_a_request_longer_than_promised_is_nan() -> None:
    tokens, other = _tokens(70), _tokens(20, 1)
    long, short = _attend([Piece(tokens, 60, 70), Piece(other, 15, 20)], max_seq_len=69)
    assert bool(long.isnan().all())
    assert_same_bytes(short, _attend([whole(other)])[0][15:], "beside it")


def test_jobs_follow_the_model_alone() -> None:
    caches = [torch.empty(1, 16, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (1, 8, 64, 10**5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_module, "MOST_JOBS", 64)
        assert [jobs_at_once(cache, 4, 512) for cache in caches] == [64, 32, 4, 1]


def test_no_requests_and_no_rows() -> None:
    tokens = _tokens(5)
    q, k_cache, v_cache, table, starts, lengths = paged([whole(tokens)], 16)
    assert split_flex_attention(q[:0], k_cache, v_cache, table, starts * 0, lengths, scale=1.0).shape == (0, HEADS, 64)
    assert split_flex_attention(q, k_cache, v_cache, table[:0], starts[:1], lengths[:0], scale=1.0).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *REFUSED,
        ({"q": lambda a: a["q"][..., :8]}, r"q is \(5, 3, 8\)"),
        ({"q": lambda a: a["q"].repeat(1, 2, 1)[:, :4], "k_cache": lambda a: a["k_cache"].repeat(1, 1, 3, 1),
          "v_cache": lambda a: a["v_cache"].repeat(1, 1, 3, 1)}, "q has 4 heads and k_cache 3"),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Any], message: str) -> None:
    names = ("q", "k_cache", "v_cache", "block_table", "query_start_loc", "seq_lens")
    arguments: dict[str, Any] = dict(zip(names, paged([whole(_tokens(5))], 16), strict=True))
    arguments |= {"scale": 1.0, "fold": FOLD}
    with pytest.raises(ValueError, match=message):
        split_flex_attention(**(arguments | {name: value(arguments) for name, value in change.items()}))
