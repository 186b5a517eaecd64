# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.bit_class import first_difference, same_bytes
from vllm_deterministic.triton_kernels.cancelling_inputs import FAMILIES

from .faults import ordered_matmul
from .oracles import DTYPES

SHOWS_ORDER = ("mirrored halves", "wide exponents", "alternating signs", "huge pair")


def inputs(family: str, dtype: torch.dtype, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return FAMILIES[family](24, 16, k, dtype, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 33, 96])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_finite_results(family: str, k: int, dtype: torch.dtype) -> None:
    x, w = inputs(family, dtype, k)
    assert (x.shape, x.dtype, w.shape, w.dtype) == ((24, k), dtype, (16, k), dtype)
    out = (x.double() @ w.double().T).to(dtype)
    assert out.isfinite().all() == (family != "non-finite")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", SHOWS_ORDER)
def test_another_order_shows_in_most_elements(family: str, dtype: torch.dtype) -> None:
    x, w = inputs(family, dtype, 256)
    one, three = (ordered_matmul(x, w, segments).to(dtype) for segments in (1, 3))
    differing = (one != three).float().mean()
    assert differing > 0.5, f"{differing:.0%}"
    assert first_difference(one, three) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["mirrored halves", "wide exponents", "alternating signs"])
def test_all_of_it_is_rounding_error(family: str, dtype: torch.dtype) -> None:
    x, w = inputs(family, dtype, 65)
    terms = x.double().unsqueeze(1) * w.double()
    sorted_terms = terms.sort(dim=-1).values
    assert torch.equal(sorted_terms, -sorted_terms.flip(-1))
    assert (terms != 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_among_inputs_and_results(dtype: torch.dtype) -> None:
    x, w = inputs("subnormal", dtype, 64)
    tiny = torch.finfo(dtype).tiny
    assert ((x != 0) & (x.float().abs() < tiny)).float().mean() > 0.3
    out = x.double() @ w.double().T
    assert out[:, ::2].abs().median() > 0.01
    assert 0 < out[:, 1::2].abs().median() < tiny


def test_infinities_and_nan_leave_clean_rows() -> None:
    x, w = inputs("non-finite", torch.float32, 64)
    out = x.double() @ w.double().T
    assert out[::2, :8].isfinite().all()
    assert not out[1::2].isfinite().any()
    assert out.isnan().any()
    assert out.isposinf().any()
    assert out.isneginf().any()


def test_the_first_difference_is_named() -> None:
    a = torch.zeros(3, 4)
    a[0, 1] = float("nan")
    assert first_difference(a, a.clone()) is None
    b = a.clone()
    b[1, 2] = -0.0
    b[2, 0] = 5
    assert first_difference(a, b) == (1, 2)
    assert not same_bytes(a, b)
    b = a.clone()
    b[0, 1] = 1
    assert first_difference(b, a) == (0, 1)
