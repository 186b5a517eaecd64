# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.mean import mean

from .interpreter import INTERPRETED, ROUNDED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED


def _inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).mul(3).add(1).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", [1, 2, 17, 80, 2100])
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x = _inputs(19, width, dtype=dtype)
    assert mean(x, -1).dtype == dtype
    assert_close(mean(x, -1), x.double().mean(-1))
    assert_batch_invariant(lambda x: mean(x, -1), x[:4], sizes=(2, 17, 33))


def test_a_long_row_is_walked_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[mean.__module__], "_LONGEST", 64)
    x = _inputs(40, 300)
    assert_close(mean(x, -1), x.double().mean(-1))
    assert_batch_invariant(lambda x: mean(x, -1), x[:4], sizes=(2, 40))


def test_fault_steps_that_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_batch(x: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(sys.modules[mean.__module__], "_LONGEST", 64 if len(x) < 5 else 128)
        return mean(x, -1)

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(by_batch, _inputs(4, 300))


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("keepdim", [False, True])
def test_any_dimension(dim: int, keepdim: bool) -> None:
    x = _inputs(3, 4, 5)
    out = mean(x, dim, keepdim)
    assert out.shape == x.mean(dim, keepdim).shape
    assert_close(out, x.double().mean(dim, keepdim))
    assert_same_bytes(mean(x[:, ::2], dim), mean(x[:, ::2].contiguous(), dim), "strided")


def test_refuses_what_it_cannot_do() -> None:
    assert mean(torch.zeros(0, 4), -1).shape == (0,)
    with pytest.raises(ValueError, match="dim is 2"):
        mean(torch.zeros(3, 4), 2)
    with pytest.raises(ValueError, match=r"x has shape \(3, 0\)"):
        mean(torch.zeros(3, 0), -1)
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        mean(torch.zeros(3, 4).long(), -1)
