# ruff: noqa: E402 (torch comes with the extras alone)
"""Attention on torch's compiled FlexAttention: a row's bytes are those of one prefill of its whole sequence."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels import flex_attention as flex_module
from vllm_deterministic.triton_kernels import flex_split
from vllm_deterministic.triton_kernels.attention import attention
from vllm_deterministic.triton_kernels.attention_plan import DEFAULT_FOLD, AttentionFold
from vllm_deterministic.triton_kernels.flex_attention import split_flex_attention

from ..triton_kernels.attention_oracle import attention_oracle
from ..triton_kernels.invariance import assert_same_bytes
from ..triton_kernels.paged_requests import LAYOUTS, Piece, Tokens, cancelling_tokens, paged, random_tokens, whole
from .captured_attention import assert_one_graph_serves_any_lengths

pytestmark = pytest.mark.gpu

# Of the sum of magnitudes: a rounding of the weight, of its split and of the result, and one for fp32 and the features.
TOLERANCE = {torch.bfloat16: 4 * 2.0**-8, torch.float16: 4 * 2.0**-11}
# All orders show where values cancel: in the first of one split, of keys; in the second, of splits.
LENGTHS = (DEFAULT_FOLD.split - 60, 3 * DEFAULT_FOLD.split + 37)


def _bias(score: Any, batch: Any, head: Any, row: Any, key: Any) -> Any:
    return score + 0.1 * (head + 1) * ((row - key) % 5)


def _documents(batch: Any, head: Any, row: Any, key: Any) -> Any:
    return (key // 700 == row // 700) | (key % 3 == 0)


# What a feature asks of the function, given the query heads, and what of the oracle beside that.
Options = dict[str, Any]
FEATURES: dict[str, tuple[Callable[[int], Options], Options]] = {
    "none": (lambda heads: {}, {}),
    "all of a kernel's": (
        lambda heads: {
            "window": 600,
            "softcap": 4.0,
            "alibi_slopes": torch.logspace(-3, 0, heads, device="cuda"),
            "sinks": torch.linspace(-3, 5, heads, device="cuda"),
        },
        {},
    ),
    "mods": (
        lambda heads: {"score_mod": _bias, "mask_mod": _documents},
        {
            "score": lambda s, head, row, key: s + 0.1 * (head + 1) * ((row - key) % 5),
            "mask": lambda head, row, key: (key // 700 == row // 700) | (key % 3 == 0),
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """What FlexAttention is compiled for."""

    dtype: torch.dtype
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    feature: str = "none"
    fold: AttentionFold = DEFAULT_FOLD

    def tokens(self, length: int, seed: int = 0, *, cancelling: bool = True) -> Tokens:
        generator = torch.Generator("cuda").manual_seed(seed)
        make = cancelling_tokens if cancelling else random_tokens
        return make(length, self.heads, self.kv_heads, self.head_dim, self.dtype, generator)

    def options(self) -> Options:
        return {"scale": self.head_dim**-0.5, "fold": self.fold} | FEATURES[self.feature][0](self.heads)

    def attend(
        self, pieces: Sequence[Piece], block_size: int = 64, layout: str = LAYOUTS[0], **options: Any
    ) -> torch.Tensor:
        """The rows of all pieces."""
        options = {"max_query_len": max(map(len, pieces))} | self.options() | options
        return split_flex_attention(*paged(pieces, block_size, layout), **options)


MAIN = Case(torch.bfloat16)
CASES = [
    MAIN,
    Case(torch.float16, 71, 1, 64, "all of a kernel's"),
    Case(torch.bfloat16, 6, 2, 80, "mods"),
    Case(torch.bfloat16, 4, 2, 256),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def enough_kernels(device: torch.device) -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


@functools.lru_cache(maxsize=8)
def prefilled(case: Case, length: int, cancelling: bool) -> tuple[Tokens, torch.Tensor]:
    """A sequence and its rows, prefilled alone."""
    tokens = case.tokens(length, cancelling=cancelling)
    return tokens, case.attend([whole(tokens)])


def batches(tokens: Tokens, other: Tokens) -> dict[str, list[Piece]]:
    """Ways of asking for rows of a sequence."""
    split, length = DEFAULT_FOLD.split, len(tokens)
    ends = [*(end for end in (1, 2, 63, 64, 65, split - 1, split, split + 1, 2 * split + 1) if end < length), length]
    cuts = sorted({0, 1, 130, min(split, length), max(1, length - 64), length})
    return {
        "decode": [Piece(tokens, end - 1, end) for end in ends],
        "decode alone": [Piece(tokens, length - 1, length)],
        "k + 1 tokens": [Piece(tokens, max(0, end - 5), end) for end in ends],
        "decode among others": [
            *(Piece(other, end - 1, end) for end in range(1, len(other), 23)),
            Piece(tokens, length - 1, length),
        ],
        "chunks": [Piece(tokens, start, stop) for start, stop in itertools.pairwise(cuts)],
        "chunks among decodes": [
            Piece(tokens, length // 3, length),
            Piece(other, len(other) - 1, len(other)),
            Piece(tokens, length - 1, length),
            Piece(other, 0, 333),
            Piece(tokens, length - 5, length),
        ],
    }


def assert_rows(case: Case, pieces: Sequence[Piece], expected: torch.Tensor, what: str, **options: Any) -> None:
    """The rows of the expected sequence's pieces have its bytes; of other sequences nothing is asked."""
    rows = case.attend(pieces, **options).split([len(piece) for piece in pieces])
    for piece, own in zip(pieces, rows, strict=True):
        if len(piece.tokens) == len(expected):
            assert_same_bytes(own, expected[piece.start : piece.stop], f"{what}, {piece.start}:{piece.stop}")


@each_case
def test_rows_keep_their_bytes(case: Case) -> None:
    other = case.tokens(700, seed=1)
    for length, cancelling in itertools.product(LENGTHS, (True, False)):
        tokens, expected = prefilled(case, length, cancelling)
        assert bool(expected.isfinite().all()), "an unused slot was read"
        with torch.compiler.set_stance("fail_on_recompile"):
            for name, pieces in batches(tokens, other).items():
                assert_rows(case, pieces, expected, name)


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_keep_the_bytes(block_size: int, layout: str) -> None:
    tokens, expected = prefilled(MAIN, LENGTHS[1], True)
    pieces = batches(tokens, MAIN.tokens(700, seed=1))["chunks among decodes"]
    assert_rows(MAIN, pieces, expected, layout, block_size=block_size, layout=layout)


@each_case
def test_close_to_float64(case: Case) -> None:
    tokens, out = prefilled(case, LENGTHS[1], False)
    options = case.options()
    features = {name: options.get(name) for name in ("window", "softcap", "alibi_slopes", "sinks")}
    features |= FEATURES[case.feature][1]
    exact = attention_oracle(tokens, scale=options["scale"], **features)
    magnitude = attention_oracle(replace(tokens, v=tokens.v.abs()), scale=options["scale"], **features)
    excess = (out.double() - exact).abs() / magnitude
    assert bool((excess <= TOLERANCE[case.dtype]).all()), float(excess.max())


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_triton_road_agrees(case: Case) -> None:
    """Two implementations of one definition, whose only common code is none of the arithmetic."""
    tokens, expected = prefilled(case, LENGTHS[1], False)
    magnitude = case.attend([whole(replace(tokens, v=tokens.v.abs()))]).float()
    for pieces in ([whole(tokens)], [Piece(tokens, LENGTHS[1] - 1, LENGTHS[1])]):
        options = {"max_query_len": len(pieces[0])} | case.options()
        out = attention(*paged(pieces, 64), **options)
        rows = slice(pieces[0].start, pieces[0].stop)
        excess = (out.float() - expected[rows].float()).abs() / magnitude[rows]
        assert bool((excess <= 2 * TOLERANCE[case.dtype]).all()), float(excess.max())


def test_fault_of_splits_that_follow_the_batch_is_seen() -> None:
    tokens, expected = prefilled(MAIN, LENGTHS[1], True)
    alone = [Piece(tokens, LENGTHS[1] - 1, LENGTHS[1])]
    for pieces in (alone, 2 * alone):
        assert_rows(MAIN, pieces, expected, "of fixed size")
    by_batch = AttentionFold(MAIN.fold.split * len(2 * alone), MAIN.fold.key_tile)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_rows(MAIN, 2 * alone, expected, "by load", fold=by_batch)


def test_fault_of_merging_in_reverse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, expected = prefilled(MAIN, LENGTHS[1], False)
    real = flex_module.fold_splits
    monkeypatch.setattr(flex_module, "fold_splits", lambda state, out, lse: real(state, out.flip(1), lse.flip(1)))
    # The result's rounding hides the order in nearly every element: it takes many.
    with pytest.raises(AssertionError, match="elements differ"):
        assert_rows(MAIN, [whole(tokens)], expected, "in reverse")


class FullApart:
    """A block mask that declares full what a decode sees whole: all key tiles but the last, which then comes first."""

    @staticmethod
    def from_kv_blocks(key_blocks: torch.Tensor, block_order: torch.Tensor, **options: Any) -> Any:
        last = (block_order + key_blocks[..., None] - 1) % block_order.shape[-1]
        return REAL_MASK.from_kv_blocks(
            key_blocks.clamp(max=1), last.int(), (key_blocks - 1).clamp(min=0), block_order, **options
        )


REAL_MASK = flex_split.BlockMask


def test_fault_of_full_blocks_visited_apart_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, expected = prefilled(MAIN, LENGTHS[0], True)
    other, rows = prefilled(MAIN, LENGTHS[0], False)
    decode = [Piece(tokens, LENGTHS[0] - 1, LENGTHS[0])]
    assert_rows(MAIN, decode, expected, "in ascending order")
    monkeypatch.setattr(flex_split, "BlockMask", FullApart)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_rows(MAIN, decode, expected, "full ones apart")
    # It is another order of the same keys.
    torch.testing.assert_close(MAIN.attend([Piece(other, LENGTHS[0] - 1, LENGTHS[0])]), rows[-1:], rtol=0.02, atol=0.02)


def test_memory_is_bounded_and_nothing_is_read_back() -> None:
    tokens, expected = prefilled(MAIN, LENGTHS[1], True)
    for pieces in (200 * [Piece(tokens, LENGTHS[1] - 1, LENGTHS[1])], 8 * [whole(tokens)]):
        tensors = paged(pieces, 64)
        options = {"max_query_len": len(pieces[0])} | MAIN.options()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = split_flex_attention(*tensors, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before <= flex_module.WORKSPACE_BYTES + 4 * out.nbytes
        for own in out.split(len(pieces[0])):
            assert_same_bytes(own, expected[pieces[0].start : pieces[0].stop], f"{len(pieces)} requests")


def test_a_captured_graph_serves_any_lengths() -> None:
    attend = functools.partial(split_flex_attention, **MAIN.options())
    assert_one_graph_serves_any_lengths(attend, *prefilled(MAIN, LENGTHS[1], True), block_size=64)
