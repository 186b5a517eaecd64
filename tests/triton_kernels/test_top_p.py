# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.top_p import top_p_mass

from .interpreter import INTERPRETED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import DTYPES, assert_close

pytestmark = INTERPRETED


def _inputs(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).mul(3)
    return x.softmax(-1).sort(dim=-1, descending=True).values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [16, 4096])
def test_close_to_the_oracle(dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[top_p_mass.__module__], "_PART", part)
    for width in (1, 2, 16, 17, 80):
        probs = _inputs(3, width, dtype)
        assert_close(top_p_mass(probs), probs.double().cumsum(-1))
        assert_batch_invariant(top_p_mass, probs, sizes=(2, 5))


def test_views_are_rows_too() -> None:
    probs = _inputs(6, 41)
    for view in (probs[:, 1:], probs[::2], probs.view(2, 3, 41)):
        assert_same_bytes(top_p_mass(view), top_p_mass(view.contiguous()), "strided")
    assert top_p_mass(probs[:0]).shape == (0, 41)
    with pytest.raises(ValueError, match=r"probs is torch.float64"):
        top_p_mass(probs.double())


def test_fault_parts_that_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_batch(x: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(sys.modules[top_p_mass.__module__], "_PART", 64 if len(x) < 4 else 16)
        return top_p_mass(x)

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(by_batch, _inputs(3, 300), sizes=(2, 5))
