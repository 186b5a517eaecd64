# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.soft_cap import soft_cap

from .interpreter import INTERPRETED, ROUNDED
from .invariance import assert_batch_invariant, assert_same_bytes

pytestmark = INTERPRETED

CAP = 30.0
WIDTHS = (1, 17, 2048, 3001)


def _inputs(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """From far below the cap to beyond it."""
    generator = torch.Generator().manual_seed(width)
    sizes = torch.exp2(torch.rand(rows, width, generator=generator) * 20 - 12)
    return (torch.randn(rows, width, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_close_to_tanh_in_double(dtype: torch.dtype, width: int) -> None:
    """Relative to each element: small logits must not drown in the cap."""
    x = _inputs(5, width, dtype)
    out = soft_cap(x, CAP)
    expected = CAP * torch.tanh(x.double() / CAP)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    relative = {torch.float16: 2.0**-10, torch.float32: 2.0**-21}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=relative, atol=2.0**-24)


def test_ends_and_order() -> None:
    ends = torch.tensor([-math.inf, -1e4, -0.0, 0.0, 1e4, math.inf, math.nan])
    assert soft_cap(ends, CAP)[:-1].tolist() == [-CAP, -CAP, 0.0, 0.0, CAP, CAP]
    assert soft_cap(ends, CAP)[-1].isnan()
    # Where the series meets the quotient, and everywhere else: the order of logits is kept.
    assert bool((soft_cap(torch.linspace(-60, 60, 20001), CAP).diff() >= 0).all())


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rows_keep_their_bytes(dtype: torch.dtype) -> None:
    assert_batch_invariant(lambda x: soft_cap(x, CAP), _inputs(3, 2100, dtype), sizes=(2, 9))


def test_padded_vocabulary() -> None:
    """A row of one is contiguous, one of several is not."""
    padded = _inputs(4, 128, torch.float32)
    for rows in (1, 4):
        assert_same_bytes(soft_cap(padded[:rows, :101], CAP), soft_cap(padded[:rows, :101].contiguous(), CAP), "view")
    assert soft_cap(padded[:0], CAP).shape == (0, 128)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"cap is 0\.0"):
        soft_cap(torch.zeros(1, 4), 0.0)
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        soft_cap(torch.zeros(1, 4).long(), CAP)
