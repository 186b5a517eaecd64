# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
import sys
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.top_k_top_p import top_k_top_p

from .interpreter import INTERPRETED, interpreting
from .invariance import assert_batch_invariant, assert_same_bytes

pytestmark = INTERPRETED
K = [1, 20, 1 << 30, 50, 5000, 290]
# No sum of equal masses is so close to p that rounding decides.
P = [1.0, 0.9013, 0.9513, 0.5013, 1.0, 0.9871]


def _limits(k: Sequence[int], p: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(k, dtype=torch.int32), torch.tensor(p, dtype=torch.float32)


def _kept(x: Sequence[float], k: int, p: float) -> list[int]:
    """The ids that a row keeps, from the definition, in exact sums of float64."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]
    weights = [math.exp(x[i] - x[order[0]]) if x[i] > -math.inf else 0.0 for i in order]
    total = math.fsum(weights)
    # As fp32 has it: 0.9 is a little less.
    p = float(torch.tensor(p, dtype=torch.float32))
    return sorted(
        i
        for place, i in enumerate(order)
        if x[i] > -math.inf and (place == 0 or p >= 1 or math.fsum(weights[:place]) < p * total)
    )


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.5, 0.5, 3.0, -9.0, -math.inf]), min_size=1, max_size=40),
    k=st.integers(1, 41),
    p=st.sampled_from([1.0, 0.9513, 0.5127, 0.0031]),
)
def test_equals_the_oracle(x: list[float], k: int, p: float) -> None:
    with interpreting():
        out = top_k_top_p(torch.tensor([x]), *_limits([k], [p]))
    kept = (out[0] > -math.inf).nonzero().flatten().tolist()
    assert kept == (_kept(x, k, p) if max(x) > -math.inf else [])
    assert_same_bytes(out[0, kept], torch.tensor(x)[kept], "what is kept")


@pytest.mark.parametrize("width", [300, 2300])
@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "few"])
@pytest.mark.parametrize("limits", ["k", "p", "k and p"])
def test_equals_the_reference(width: int, kind: str, limits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows of which all may be candidates, and in rows of three parts where they may not."""
    module = sys.modules[top_k_top_p.__module__]
    for name in ("_PART", "_CAPACITY", "_SEARCHED", "_SAMPLE"):
        monkeypatch.setattr(module, name, getattr(module, name) // 4)
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(width)) * 3
    x = {"spread": x, "ties": (2 * x).round() / 2, "equal": torch.zeros_like(x), "few": x}[kind]
    if kind == "few":
        x[:, 30:] = -math.inf
    k, p = _limits(K, P)
    k, p = (k if "k" in limits else None), (p if "p" in limits else None)
    assert_same_bytes(
        top_k_top_p(x.clone(), k, p),
        reference.top_k_top_p(x, None if k is None else k.clamp(max=width), p),
        "kept",
    )


@pytest.mark.parametrize(("capacity", "sample"), [(2048, 1024), (16, 8), (16, 64), (300, 2)])
def test_rows_keep_their_bytes(capacity: int, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With candidates that suffice, and where the search must look through the row, by its elements and without."""
    module = sys.modules[top_k_top_p.__module__]
    monkeypatch.setattr(module, "_CAPACITY", capacity)
    monkeypatch.setattr(module, "_SAMPLE", sample)
    x = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).mul(2).round(decimals=1)
    k, p = _limits(K, P)

    def op(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return top_k_top_p(x, k[rows], p[rows])

    assert_batch_invariant(op, x, torch.arange(6), sizes=(2, 9))
    assert_same_bytes(op(x.clone(), torch.arange(6)), reference.top_k_top_p(x, k.clamp(max=700), p), "kept")


def test_a_neighbour_that_asks_for_more_does_not_matter() -> None:
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    k, p = _limits([20, 300], [1.0, 0.9])
    both = top_k_top_p(x.clone(), k, p)
    assert_same_bytes(both[:1], top_k_top_p(x[:1].clone(), k[:1], None), "top-k alone")
    assert_same_bytes(both[1:], top_k_top_p(x[1:].clone(), None, p[1:]), "top-p alone")


def test_in_place_in_strided_rows() -> None:
    padded = torch.randn(3, 310, generator=torch.Generator().manual_seed(0))
    x, before = padded[:, :300], padded.clone()
    k, _ = _limits([5, 300, 1], [1.0] * 3)
    expected = reference.top_k_top_p(x, k, None)
    assert top_k_top_p(x, k, None) is x
    assert_same_bytes(x.contiguous(), expected, "kept")
    assert_same_bytes(padded[:, 300:].contiguous(), before[:, 300:].contiguous(), "beside the rows")
    assert top_k_top_p(x[:0], k[:0], None).shape == (0, 300)
    assert top_k_top_p(x, None, None) is x


def test_nan_and_infinity_end() -> None:
    x = torch.zeros(2, 100)
    x[0, 7], x[1, [3, 9]] = math.nan, math.inf
    out = top_k_top_p(x, *_limits([100, 100], [0.5, 0.4]))
    assert out[0, 7].isnan()
    assert (out[1] > -math.inf).nonzero().flatten().tolist() == [3]


def test_refuses_other_tensors() -> None:
    x = torch.zeros(2, 8)
    k, p = _limits([1, 1], [1.0, 1.0])
    for logits in (x.half(), x[0], x.t()):
        with pytest.raises(ValueError, match="logits is"):
            top_k_top_p(logits, k, p)
    with pytest.raises(ValueError, match=r"k is torch.int64 of shape \(2,\)"):
        top_k_top_p(x, k.long(), p)
    with pytest.raises(ValueError, match=r"p is torch.float32 of shape \(1,\)"):
        top_k_top_p(x, k, p[:1])
