# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.layer_norm import layer_norm

from . import oracles
from .interpreter import INTERPRETED, ROUNDED
from .invariance import assert_batch_invariant, assert_same_bytes
from .oracles import assert_close

pytestmark = INTERPRETED

WIDTHS = (1, 2, 17, 80, 1024, 1500)
EPSILON = 1e-5


def _inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator).mul(3).add(5).to(dtype)
    weight, bias = torch.randn(2, width, generator=generator).to(dtype)
    return x, weight, bias


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_close_to_the_oracle(dtype: torch.dtype, width: int) -> None:
    x, weight, bias = _inputs(19, width, dtype)
    for w, b in ((weight, bias), (weight, None), (None, bias.float()), (None, None)):
        out = layer_norm(x, w, b, EPSILON)
        assert (out.shape, out.dtype) == (x.shape, dtype)
        assert_close(out, oracles.layer_norm(x, w, b, EPSILON))


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    x = torch.tensor([[10000.0, 10001.0, 10002.0]])
    assert_close(layer_norm(x, None, None, 0.0), oracles.layer_norm(x, None, None, 0.0))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_keep_their_bytes(dtype: torch.dtype, width: int) -> None:
    x, weight, bias = _inputs(4, width, dtype)
    assert_batch_invariant(lambda x: layer_norm(x, weight, bias, EPSILON), x, sizes=(2, 17, 33))


def test_views_are_rows_too() -> None:
    x, weight, bias = _inputs(6, 41, torch.float32)
    for view, w, b in ((x[:, 1:], weight[1:], bias[1:]), (x[::2], weight, bias), (x.view(2, 3, 41), weight, bias)):
        expected = layer_norm(view.contiguous(), w.clone(), b.clone(), EPSILON)
        assert_same_bytes(layer_norm(view, w, b, EPSILON), expected, "strided")
    assert layer_norm(x[:0], weight, bias, EPSILON).shape == (0, 41)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 8).long(), torch.zeros(8), "x is torch.int64"),
        (torch.zeros(1, 40000), torch.zeros(40000), "40000 columns; up to 32768"),
        (torch.zeros(3, 8), torch.zeros(9), r"bias has shape \(9,\)"),
    ],
)
def test_refuses_what_it_cannot_do(x: torch.Tensor, bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_norm(x, None, bias, EPSILON)
