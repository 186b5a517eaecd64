# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.mean import mean
from vllm_deterministic.triton_kernels.rows import RowTile

from .interpreter import INTERPRETED, ROUNDED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED


def _inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).mul(3).add(1).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", [1, 2, 17, 80, 1000, 2100])
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x = _inputs(19, width, dtype=dtype)
    assert mean(x, -1).dtype == dtype
    assert_close(mean(x, -1), x.double().mean(-1))
    assert_batch_invariant(lambda x: mean(x, -1), x[:4], sizes=(2, 17, 33))


def test_chunks_are_added_in_ascending_order() -> None:
    x = torch.zeros(1, 5 * 512)
    x[0, 7::512] = torch.tensor([1e8, 1.0, -1e8, 1.0, 0.5])
    assert mean(x, -1).item() == (torch.tensor(1.5) / 2560).item()


def test_fault_chunks_that_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_batch(x: torch.Tensor) -> torch.Tensor:
        tile = RowTile(1, 64 if len(x) < 5 else 128, 4)
        monkeypatch.setattr(sys.modules[mean.__module__], "row_tile", lambda width: tile)
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
