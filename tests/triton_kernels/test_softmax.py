# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.softmax import log_softmax, softmax

from . import oracles
from .interpreter import INTERPRETED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import DTYPES, assert_close

pytestmark = INTERPRETED


@pytest.fixture(params=["rows", "parts"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows summed whole or, by shorter parts, the road that real vocabularies take."""
    if request.param == "parts":
        monkeypatch.setattr(sys.modules[softmax.__module__], "_PART", 16)
    return request.param


def _inputs(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).mul(5).to(dtype)
    x[1, : width // 2] = -math.inf
    return x


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 17, 300])
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x = _inputs(3, width, dtype)
    assert log_softmax(x).dtype == softmax(x).dtype == torch.float32
    assert_close(log_softmax(x), oracles.log_softmax(x))
    assert_close(softmax(x), oracles.log_softmax(x).exp())


def test_a_vocabulary_is_cut_into_parts() -> None:
    x = _inputs(3, 20001, torch.float32)
    assert_close(log_softmax(x), oracles.log_softmax(x))
    assert_batch_invariant(log_softmax, x, sizes=(5,))


@pytest.mark.usefixtures("road")
def test_rows_without_a_distribution_are_nan_and_no_others() -> None:
    x = torch.zeros(5, 20)
    x[0] = -math.inf
    x[1, 3] = math.nan
    x[2, 19] = math.inf
    x[3, 1:] = -math.inf
    for op in (softmax, log_softmax):
        assert op(x).isnan().all(dim=1).tolist() == [True, True, True, False, False]
        assert not op(x)[3:].isnan().any()


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40])
def test_rows_keep_their_bytes(dtype: torch.dtype, width: int) -> None:
    x = _inputs(3, width, dtype)
    assert_batch_invariant(softmax, x, sizes=(2, 5))
    assert_batch_invariant(log_softmax, x, sizes=(2, 5))


@pytest.mark.usefixtures("road")
def test_views_are_rows_too() -> None:
    x = _inputs(6, 41, torch.float32)
    for view in (x[:, 1:], x[::2], x.view(2, 3, 41), x.t()):
        assert_same_bytes(softmax(view), softmax(view.contiguous()), "strided")
    assert softmax(x[:0]).shape == (0, 41)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        softmax(torch.zeros(3, 8).double())


def test_fault_parts_that_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_batch(x: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(sys.modules[softmax.__module__], "_PART", 64 if len(x) < 4 else 16)
        return softmax(x)

    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(by_batch, torch.randn(3, 500, generator=torch.Generator().manual_seed(0)), sizes=(2, 5))
