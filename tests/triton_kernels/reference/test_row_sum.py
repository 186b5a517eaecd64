# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.bit_class import cancelling
from vllm_deterministic.triton_kernels.reference.row_sum import row_sum

from ..faults import row_sum_by_batch
from ..invariance import assert_batch_invariant, assert_same_bytes
from ..oracles import assert_close

WIDTHS = (1, 2, 7, 16, 17, 33, 63, 513, 1000, 4097, 32768, 40000, 50257)


def _rows(count: int, width: int) -> torch.Tensor:
    return cancelling(count, width, dim=1, dtype=torch.float32, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 3])
def test_close_to_the_oracle(width: int, count: int, threads: int) -> None:
    x = _rows(count, width).abs()
    expected = torch.tensor([math.fsum(row) for row in x.tolist()], dtype=torch.float64)
    assert_close(row_sum(x), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_keep_their_bytes(width: int, threads: int) -> None:
    assert_batch_invariant(row_sum, _rows(5, width))


def test_shapes_and_strides_do_not_matter(threads: int) -> None:
    x = _rows(12, 1000)
    expected = row_sum(x)
    assert_same_bytes(row_sum(x.view(2, 3, 2, 1000)).flatten(), expected, "four dimensions")
    assert_same_bytes(row_sum(x.t().contiguous().t()), expected, "columns first")
    assert_same_bytes(row_sum(x[3]), expected[3], "one dimension")
    assert row_sum(x[:0]).shape == (0,)


def test_fault_one_row_without_a_copy() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(AssertionError, match="elements differ"):
            assert_batch_invariant(lambda x: x.sum(-1), _rows(5, 40000))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [33, 1000, 40000])
def test_fault_chunks_follow_the_batch(width: int) -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(row_sum_by_batch, _rows(5, width))
