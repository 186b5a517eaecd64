# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.rms_norm import rms_norm
from vllm_deterministic.triton_kernels.rotary_embedding import (
    qk_norm_rotary_embedding,
    qk_rotary_embedding,
    rotary_embedding,
)

from . import oracles
from .interpreter import INTERPRETED, ROUNDED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED

EPSILON = 1e-6
# Head size and rotated part of it.
SHAPES = ((2, 2), (6, 4), (16, 16), (80, 80), (80, 24))


def _cache(rotary_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(20).unsqueeze(1) * 0.3 ** torch.arange(rotary_dim // 2)
    return angles, torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _inputs(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, and 3 query heads and 2 KV heads as views of a packed projection."""
    generator = torch.Generator().manual_seed(size)
    q, k, _ = torch.randn(tokens, 7 * size, generator=generator).to(dtype).split([3 * size, 2 * size, 2 * size], dim=-1)
    return torch.randint(20, (tokens,), generator=generator), q, k


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("size", "rotary_dim"), SHAPES)
def test_close_to_the_oracle(size: int, rotary_dim: int, neox: bool) -> None:
    angles, cache = _cache(rotary_dim, torch.float32)
    positions, q, _ = _inputs(5, size, torch.float32)
    out = rotary_embedding(positions, q, cache, size, neox)
    assert_close(out, oracles.rotary_embedding(positions, q, angles, size, neox))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("size", "rotary_dim"), SHAPES)
def test_bytes_of_the_reference(dtype: torch.dtype, size: int, rotary_dim: int, neox: bool) -> None:
    cache = _cache(rotary_dim, dtype)[1]
    positions, q, k = _inputs(5, size, dtype)
    expected = [reference.rotary_embedding(positions, x.contiguous(), cache, size, neox) for x in (q, k)]
    assert_same_bytes(rotary_embedding(positions, q, cache, size, neox), expected[0], "alone")
    together = qk_rotary_embedding(positions.int(), q, k, cache, size, neox)
    for name, actual, wanted in zip("qk", together, expected, strict=True):
        assert_same_bytes(actual, wanted, name)


def _unfused(positions, q, k, q_weight, k_weight, cache, size, neox, weight_offset=0.0):
    def rotated_norm(x, w):
        x = rms_norm(x.reshape(len(x), -1, size), w, EPSILON, weight_offset=weight_offset).flatten(1)
        return rotary_embedding(positions, x, cache, size, neox)

    return rotated_norm(q, q_weight), rotated_norm(k, k_weight)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("size", "rotary_dim"), [(16, 16), (80, 80), (80, 24)])
def test_fused_with_the_norm_bytes_of_the_chain(dtype: torch.dtype, size: int, rotary_dim: int, neox: bool) -> None:
    cache = _cache(rotary_dim, dtype)[1]
    positions, q, k = _inputs(5, size, dtype)
    weights = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    for offset in (0.0, 1.0):
        fused = qk_norm_rotary_embedding(positions, q, k, *weights, EPSILON, cache, size, neox, offset)
        chain = _unfused(positions, q, k, *weights, cache, size, neox, offset)
        for name, actual, wanted in zip("qk", fused, chain, strict=True):
            assert_same_bytes(actual, wanted, f"{name}, offset {offset}")


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rows_keep_their_bytes(dtype: torch.dtype) -> None:
    cache, weight = _cache(24, dtype)[1], torch.linspace(0.5, 2, 40).to(dtype)
    positions, q, k = _inputs(4, 40, dtype)
    assert_batch_invariant(
        lambda positions, q, k: qk_norm_rotary_embedding(positions, q, k, weight, weight, EPSILON, cache, 40, True),
        positions,
        q,
        k,
        sizes=(2, 9),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(4, 16)}, r"k is \(4, 16\)"),
        ({"k": torch.zeros(3, 16).half()}, "k is .* torch.float16"),
        ({"q": torch.zeros(3, 20)}, r"q is \(3, 20\)"),
        ({"positions": torch.zeros(2).long()}, r"positions is \(2,\)"),
        ({"positions": torch.zeros(3)}, "torch.float32; .* in int64 or int32"),
        ({"cos_sin_cache": torch.zeros(20, 10)}, r"cos_sin_cache is \(20, 10\)"),
        ({"cos_sin_cache": torch.zeros(20, 3)}, r"cos_sin_cache is \(20, 3\)"),
        ({"q_weight": torch.zeros(7)}, r"q_weight has shape \(7,\)"),
    ],
)
def test_refuses_what_it_cannot_do(changed: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "positions": torch.zeros(3).long(),
        "q": torch.zeros(3, 16),
        "k": torch.zeros(3, 8),
        "q_weight": torch.zeros(8),
        "k_weight": torch.zeros(8),
        "cos_sin_cache": torch.zeros(20, 8),
    } | changed
    with pytest.raises(ValueError, match=message):
        qk_norm_rotary_embedding(**arguments, epsilon=EPSILON, head_size=8, is_neox_style=True)


def test_no_tokens_and_odd_heads() -> None:
    positions, q, k = _inputs(0, 16, torch.float32)
    outs = qk_rotary_embedding(positions, q, k, _cache(16, q.dtype)[1], 16, True)
    assert [x.shape for x in outs] == [(0, 48), (0, 32)]
    positions, q, k = _inputs(2, 6, torch.float32)
    with pytest.raises(ValueError, match="head_size is 6; a multiple of 8"):
        qk_norm_rotary_embedding(positions, q, k, torch.ones(6), torch.ones(6), EPSILON, _cache(6, q.dtype)[1], 6, True)


def _rms_of_halves(squares, epsilon, width):
    total = tl.sum(tl.sum(tl.reshape(squares, [squares.shape[0], 2, squares.shape[1] // 2]), axis=2), axis=1)
    return tl.rsqrt(total / width + epsilon)[:, None]


def test_fault_a_norm_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, weight = _cache(80, torch.float32)[1], torch.ones(80)
    positions, q, k = _inputs(9, 80, torch.float32)
    expected = _unfused(positions, q, k, weight, weight, cache, 80, True)
    faulty = InterpretedFunction(_rms_of_halves)
    monkeypatch.setattr(sys.modules[rotary_embedding.__module__], "reciprocal_rms", faulty)
    actual = qk_norm_rotary_embedding(positions, q, k, weight, weight, EPSILON, cache, 80, True)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bytes(actual[0], expected[0], "q")
