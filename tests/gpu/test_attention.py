# ruff: noqa: E402 (torch comes with the extras alone)
"""Attention at real sizes: a row's bytes are those of one prefill of its whole sequence, by whichever plan."""

import functools
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton
import triton.language as tl
from vllm_deterministic.triton_kernels import attention as attention_module
from vllm_deterministic.triton_kernels.attention import attention
from vllm_deterministic.triton_kernels.attention_plan import (
    DEFAULT_FOLD,
    AttentionFold,
    AttentionPlan,
    AttentionTile,
    HopperTile,
    attention_plan,
)

from ..triton_kernels.attention_oracle import attention_oracle
from ..triton_kernels.paged_requests import LAYOUTS, Piece, Tokens, cancelling_tokens, paged, random_tokens, whole
from .captured_attention import POISON, assert_one_graph_serves_any_lengths

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
# Of the sum of magnitudes: a weight's rounding above and below the fraction, and the result's.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
LENGTH = 3 * DEFAULT_FOLD.split + 37
# By how much scores rise from each key tile to the next, in units of log 2: the reference of weights is raised at none,
# after some, at each; or falls behind.
RISES = (0.5, 4.0, 9.0, 30.0, -9.0)


@triton.jit
def _bias(score, head, q_position, key, data_ptr):
    return score + tl.load(data_ptr + head) * ((q_position - key) % 5).to(tl.float32)


@triton.jit
def _documents(head, q_position, key, data_ptr):
    return (key // 700 == q_position // 700) | (key % 3 == 0)


# What a feature asks of the kernel, given the query heads; its oracle is derived from it.
FEATURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda heads: {},
    "window": lambda heads: {"window": 600},
    "softcap": lambda heads: {"softcap": 4.0},
    "ALiBi": lambda heads: {"alibi_slopes": torch.logspace(-3, 0, heads, device="cuda")},
    "sinks": lambda heads: {"sinks": torch.linspace(-3, 5, heads, device="cuda")},
    "score_mod": lambda heads: {"score_mod": _bias, "mod_data": torch.linspace(-1, 1, heads + 1, device="cuda")},
    "mask_mod": lambda heads: {"mask_mod": _documents},
}


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, but for the plan."""

    dtype: torch.dtype
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    feature: str = "none"
    block_size: int = 64
    layout: str = LAYOUTS[0]
    fold: AttentionFold = DEFAULT_FOLD

    def plans(self) -> dict[str, AttentionPlan]:
        """What ``attention_plan`` chooses under different loads, and for some cases other tiles."""
        group = self.heads // self.kv_heads
        chosen = {
            f"{requests} of {query_len}": attention_plan(
                head_dim=self.head_dim,
                group=group,
                kv_heads=self.kv_heads,
                requests=requests,
                max_query_len=query_len,
                max_splits=splits,
            )
            for requests, query_len, splits in ((1, 4096, 8), (1, 1, 8), (4096, 1, 8), (8, 5, 8), (8, 4096, 8))
        }
        if self != Case(self.dtype):
            return chosen
        tiles = [
            AttentionTile(rows, warps, 3) for rows, warps in ((16, 1), (16, 2), (16, 8), (32, 4), (64, 4), (64, 8))
        ]
        chosen |= {f"{t} in registers": AttentionPlan(t, 4 * LENGTH, 1, None) for t in tiles}
        chosen |= {f"{t}, split": AttentionPlan(t, 64, 3, AttentionTile(128, 8, 3)) for t in tiles}
        chosen |= {f"{t}, two splits a program": AttentionPlan(t, 64, 3, None, least=2) for t in tiles[:1]}
        chosen |= {f"{t}, up to three": AttentionPlan(t, 64, 9, None, least=3, at_once=64) for t in tiles[:1]}
        chosen |= {f"{t}, long": AttentionPlan(None, 0, 1, t, descriptors=False) for t in tiles}
        any_tile = AttentionTile(64, 4, 2)
        for hopper in (HopperTile(2, 2), HopperTile(2, 4)):
            chosen[f"{hopper}"] = AttentionPlan(None, 0, 1, any_tile, hopper=hopper)
        return chosen | {"128 rows": AttentionPlan(None, 0, 1, AttentionTile(128, 4, 2))}

    def tokens(self, length: int, seed: int = 0, *, cancelling: bool = False) -> Tokens:
        generator = torch.Generator("cuda").manual_seed(seed)
        make = cancelling_tokens if cancelling else random_tokens
        return make(length, self.heads, self.kv_heads, self.head_dim, self.dtype, generator)

    def rising_tokens(self, length: int, rise: float) -> Tokens:
        """Random ones, and scores that rise with the position, by more for later query heads of a KV head."""
        tokens = self.tokens(length)
        q, k = tokens.q.clone(), tokens.k.clone()
        q[..., 0] = torch.linspace(4, 8, self.heads, device="cuda").to(self.dtype)
        each = rise / self.fold.key_tile * math.log(2) * self.head_dim**0.5 / 8
        k[..., 0] = (torch.arange(length, device="cuda") * each).to(self.dtype).unsqueeze(1)
        return replace(tokens, q=q, k=k)

    def attend(self, pieces: Sequence[Piece], plan: AttentionPlan | None = None, **options: Any) -> torch.Tensor:
        """The rows of all pieces."""
        tensors = paged(pieces, self.block_size, self.layout)
        return attention(
            *tensors, **({"plan": plan, "max_query_len": max(map(len, pieces))} | self.options() | options)
        )

    def options(self) -> dict[str, Any]:
        return {"scale": self.head_dim**-0.5, "fold": self.fold} | FEATURES[self.feature](self.heads)


HEADS = ((4, 4, 64), (5, 1, 128), (7, 1, 64), (71, 1, 64), (6, 2, 80), (4, 2, 96), (6, 2, 192), (4, 2, 256))
CASES = [
    *(Case(dtype) for dtype in DTYPES),
    *(Case(torch.bfloat16, *heads) for heads in HEADS),
    *(Case(torch.bfloat16, feature=feature) for feature in FEATURES if feature != "none"),
    *(Case(torch.bfloat16, block_size=size, layout=layout) for size in (16, 32, 128) for layout in LAYOUTS[:2]),
    Case(torch.bfloat16, layout=LAYOUTS[2]),
    *(Case(torch.bfloat16, fold=AttentionFold(*fold)) for fold in ((256, 64), (1024, 128))),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Warmup:
    """Compiles a kernel for each call, into Triton's cache on disk, without running it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def compile_part(part: int, parts: int) -> None:
    """Compile a part of the kernels."""
    attention_module.attention_kernel = Warmup(attention_module.attention_kernel)
    attention_module.fold_kernel = Warmup(attention_module.fold_kernel)
    calls = {}
    for case in CASES:
        for plan in case.plans().values():
            kernels = replace(plan, short_rows=min(plan.short_rows, 1), parts=min(plan.parts, 2))
            calls[case, kernels] = (case, plan)
    for case, plan in list(calls.values())[part::parts]:
        case.attend([whole(case.tokens(64))], plan)


@pytest.fixture(autouse=True, scope="module")
def compiled(device: torch.device) -> None:
    """Compile on all cores at once: one after the other the kernels take minutes."""
    parts = min(16, os.cpu_count() or 1)
    root = str(Path(__file__).parents[2])
    code = "import sys; sys.path.append(sys.argv.pop(1)); from tests.gpu.test_attention import compile_part; " + (
        "compile_part(*map(int, sys.argv[1:]))"
    )
    command = [sys.executable, "-P", "-c", code, root]
    for worker in [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]:
        assert worker.wait() == 0


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes, compared on the device."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@functools.lru_cache(maxsize=4)
def prefilled(case: Case, cancelling: bool) -> tuple[Tokens, torch.Tensor]:
    """A sequence and its rows, prefilled alone."""
    tokens = case.tokens(LENGTH, cancelling=cancelling)
    return tokens, case.attend([whole(tokens)])


def differing(
    case: Case, expected: torch.Tensor, schedules: dict[str, list[Piece]], plan: AttentionPlan | None, **options: Any
) -> list[str]:
    """The schedules in which a row of the first piece's sequence has other bytes than ``expected``."""
    found = []
    for name, pieces in schedules.items():
        tokens = pieces[0].tokens
        rows = case.attend(pieces, plan, **options).split([len(piece) for piece in pieces])
        for piece, own in zip(pieces, rows, strict=True):
            if piece.tokens is tokens and not same(own, expected[piece.start : piece.stop]):
                found.append(name)
                break
    return found


def schedules(case: Case, tokens: Tokens, longest: int = LENGTH) -> dict[str, list[Piece]]:
    """Ways of asking for rows of a sequence, those of at most ``longest`` tokens of a request at once."""
    split, length = case.fold.split, len(tokens)
    other = case.tokens(700, seed=1)
    ends = [*(end for end in (1, 2, 63, 64, 65, split - 1, split, split + 1, 2 * split + 1) if end < length), length]
    cuts = sorted({0, 1, 130, split, split + 99, length - 64, length})
    found = {
        "decode": [Piece(tokens, end - 1, end) for end in ends],
        "decode alone": [Piece(tokens, length - 1, length)],
        "k + 1 tokens": [Piece(tokens, max(0, end - 5), end) for end in ends],
        "decode among others": [
            Piece(tokens, length - 1, length),
            *(Piece(other, end - 1, end) for end in range(1, 700, 23)),
        ],
        "chunks": [Piece(tokens, start, stop) for start, stop in itertools.pairwise(cuts)],
        "chunks among decodes": [
            Piece(tokens, split // 2, length),
            Piece(other, 699, 700),
            Piece(tokens, length - 1, length),
            Piece(other, 0, 333),
            Piece(tokens, length - 5, length),
        ],
    }
    return {name: pieces for name, pieces in found.items() if max(map(len, pieces)) <= longest}


def assert_rows_keep_their_bytes(case: Case, tokens: Tokens, expected: torch.Tensor) -> None:
    """By every plan and schedule."""
    assert bool(expected.isfinite().all()), "an unused slot was read"
    for name, plan in {"by load": None, **case.plans()}.items():
        only_short = plan is not None and plan.long is None
        longest = plan.short_rows * case.kv_heads // case.heads if only_short else LENGTH
        assert differing(case, expected, schedules(case, tokens, longest), plan) == [], name


@each_case
def test_rows_keep_their_bytes(case: Case) -> None:
    for cancelling in (True, False):
        assert_rows_keep_their_bytes(case, *prefilled(case, cancelling))


@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("case", [*(Case(dtype) for dtype in DTYPES), Case(torch.bfloat16, 4, 4, 64)], ids=str)
def test_a_reference_that_is_raised_seldom_or_often(case: Case, rise: float) -> None:
    tokens = case.rising_tokens(LENGTH, rise)
    out = case.attend([whole(tokens)])
    assert_rows_keep_their_bytes(case, tokens, out)
    assert_close_to_float64(case, tokens, out)


@pytest.mark.parametrize("heads", [(8, 2, 128), (6, 2, 128), (6, 1, 128), (4, 2, 128), (8, 2, 64), (4, 2, 256)])
def test_chunks_behind_decodes(heads: tuple[int, int, int]) -> None:
    """Batches as vLLM sorts them; of some the tiles just fit, as when the last one was left out."""
    case = Case(torch.bfloat16, *heads)
    tokens, expected = prefilled(case, True)
    generator = random.Random(0)
    for _ in range(60):
        decodes = generator.randrange(40)
        pieces = [Piece(tokens, end - 1, end) for end in generator.sample(range(1, LENGTH), decodes)]
        for _ in range(generator.randrange(1, 5)):
            stop = generator.randrange(2, LENGTH)
            pieces.append(Piece(tokens, generator.randrange(max(0, stop - 300), stop - 1), stop))
        out = torch.full((sum(map(len, pieces)), *expected.shape[1:]), POISON, dtype=case.dtype, device="cuda")
        case.attend(pieces, decodes=decodes, out=out)
        assert same(out, torch.cat([expected[piece.start : piece.stop] for piece in pieces]))


@each_case
def test_close_to_float64(case: Case) -> None:
    assert_close_to_float64(case, *prefilled(case, False))


def assert_close_to_float64(case: Case, tokens: Tokens, out: torch.Tensor) -> None:
    options = case.options()
    mods = {}
    if case.feature == "score_mod":
        data = options["mod_data"]
        mods["score"] = lambda s, head, row, key: s + float(data[head]) * ((row - key) % 5)
    elif case.feature == "mask_mod":
        mods["mask"] = lambda head, row, key: (key // 700 == row // 700) | (key % 3 == 0)
    known = {name: options.get(name) for name in ("window", "softcap", "alibi_slopes", "sinks")}
    exact = attention_oracle(tokens, scale=options["scale"], **known, **mods)
    magnitude = attention_oracle(replace(tokens, v=tokens.v.abs()), scale=options["scale"], **known, **mods)
    excess = (out.double() - exact).abs() / magnitude
    assert bool((excess <= TOLERANCE[case.dtype]).all()), float(excess.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_are_seen(dtype: torch.dtype) -> None:
    """Splits whose size follows the number of requests, and splits merged in another order than they lie."""
    case = Case(dtype)
    tokens, expected = prefilled(case, True)
    asked = {name: pieces for name, pieces in schedules(case, tokens).items() if name.startswith("decode")}
    assert differing(case, expected, asked, None) == []
    for factor in (2, 0.5):
        by_batch = replace(case.fold, split=int(case.fold.split * factor))
        assert differing(case, expected, asked, None, fold=by_batch) == list(asked)
    real = attention_module.fold_kernel

    class Reversed:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def launch(*args: Any, **options: Any) -> None:
                slots, rows = args[11:13]
                states = [x.view(-1, slots, rows, *x.shape[1:]).flip(1).flatten(0, 2) for x in args[:3]]
                real[grid](*states, *args[3:], **options)

            return launch

    attention_module.fold_kernel = Reversed()
    try:
        # One row's rounding may hide the order; these see all the splits, so that each state is there to be reversed.
        last = [Piece(tokens, end - 1, end) for end in range(LENGTH - 30, LENGTH + 1)]
        assert differing(case, expected, {"last rows": last}, None) == ["last rows"]
    finally:
        attention_module.fold_kernel = real


def test_a_long_context() -> None:
    """The last rows of 128k tokens, decoded and as a chunk, by each road."""
    case = Case(torch.bfloat16, 4, 1, 128, block_size=128)
    tokens = case.tokens(131072)
    tensors = paged([Piece(tokens, len(tokens) - 70, len(tokens))], case.block_size)
    q, *cache, _, lengths = tensors
    outs = {"by load": attention(*tensors, scale=0.1)}
    for tile in (AttentionTile(64, 4, 3), AttentionTile(128, 8, 3)):
        outs[f"{tile}"] = attention(*tensors, scale=0.1, plan=AttentionPlan(None, 0, 1, tile))
    assert bool(outs["by load"].isfinite().all())
    for rows in (1, 5):
        starts = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
        outs[f"{rows}"] = attention(q[-rows:], *cache, starts, lengths, scale=0.1)
    for name, out in outs.items():
        assert same(out, outs["by load"][-len(out) :]), name


def test_a_captured_graph_serves_any_lengths() -> None:
    case = Case(torch.bfloat16)
    attend = functools.partial(attention, **case.options())
    assert_one_graph_serves_any_lengths(attend, *prefilled(case, True), case.block_size)


def test_nothing_is_written_but_the_output() -> None:
    case = Case(torch.bfloat16)
    tokens, expected = prefilled(case, False)
    for pieces in ([Piece(tokens, LENGTH - 1, LENGTH)], [Piece(tokens, 600, LENGTH)]):
        tensors = paged(pieces, case.block_size)
        rows = len(tensors[0])
        buffer = torch.full((rows + 64, case.heads + 2, case.head_dim + 16), POISON, dtype=case.dtype, device="cuda")
        inside = buffer[32:-32, 1:-1, 8:-8]
        attention(*tensors, **case.options(), max_query_len=rows, out=inside)
        assert same(inside, expected[-rows:])
        inside.fill_(POISON)
        assert bool((buffer == POISON).all())


def test_calls_in_a_row_do_not_disturb_each_other() -> None:
    """Each kernel is launched before the one ahead of it ends, and workspaces lie in the same memory."""
    case = Case(torch.bfloat16)
    tokens, expected = prefilled(case, True)
    asked = (LENGTH, 512, 1100, 64)
    tensors = [paged([Piece(tokens, end - 1, end)], case.block_size) for end in asked]
    torch.cuda.synchronize()
    outs = [attention(*tensors[number % 4], **case.options(), max_query_len=1) for number in range(200)]
    for number, out in enumerate(outs):
        end = asked[number % 4]
        assert same(out, expected[end - 1 : end]), f"repeat {number}"


def test_batches_of_both_kinds_in_a_row_do_not_disturb_each_other() -> None:
    """The kernel for decodes begins before the one for long requests ends: neither reads what the next call writes."""
    case = Case(torch.bfloat16)
    tokens, expected = prefilled(case, True)
    batches = []
    for number in range(4):
        pieces = [Piece(tokens, LENGTH - 1 - row, LENGTH - row) for row in range(3 + 40 * number)]
        pieces += [Piece(tokens, 37 * number, LENGTH - number), Piece(tokens, 600, 900)]
        rows = torch.cat([expected[piece.start : piece.stop] for piece in pieces])
        batches.append((paged(pieces, case.block_size), len(pieces) - 2, rows))
    q, k, v = (torch.full_like(max((batch[0][i] for batch in batches), key=len), POISON) for i in range(3))
    for number in range(100):
        (q_of, k_of, v_of, *indices), decodes, rows = batches[number % 4]
        for buffer, x in ((q, q_of), (k, k_of), (v, v_of)):
            buffer[: len(x)].copy_(x)
        out = attention(q[: len(q_of)], k, v, *indices, **case.options(), decodes=decodes, max_query_len=LENGTH)
        for buffer in (q, k, v):
            buffer.fill_(POISON)
        assert same(out, rows), f"repeat {number}"
