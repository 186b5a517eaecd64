# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
import sys
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.triton_kernels.reference import log_softmax, softmax

from .. import oracles
from ..faults import row_sum_by_batch
from ..invariance import assert_batch_invariant, assert_same_bytes
from ..oracles import DTYPES, assert_close

WIDTHS = (1, 17, 1023, 50257)


def _logits(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """One token stands out, so that the logarithm of the sum is small and shows the sum's last bits."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 2
    x[:, width // 2] = 12
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_close_to_the_oracle(dtype: torch.dtype, width: int, rows: int) -> None:
    x = _logits(rows, width, dtype)
    assert log_softmax(x).dtype == softmax(x).dtype == torch.float32
    assert_close(log_softmax(x), oracles.log_softmax(x))
    assert_close(softmax(x), oracles.log_softmax(x).exp())
    assert_same_bytes(log_softmax(x.view(rows, 1, width)).view(rows, width), log_softmax(x), "three dimensions")


def test_far_from_zero_and_masked() -> None:
    x = torch.tensor([[-math.inf, 3e4, 3e4, -3e4], [-1e4, -math.inf, -math.inf, -math.inf]])
    assert_close(log_softmax(x), oracles.log_softmax(x))
    assert softmax(x).tolist() == [[0, 0.5, 0.5, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("op", [log_softmax, softmax])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_keep_their_bytes(
    op: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, width: int, threads: int
) -> None:
    sizes = (2, 3, 5, 17) if width < 30000 else (2, 5)
    assert_batch_invariant(op, _logits(4, width, dtype), sizes=sizes)


@pytest.mark.parametrize("op", [log_softmax, softmax])
@pytest.mark.parametrize("width", [1023, 50257])
def test_fault_chunks_follow_the_batch(
    op: Callable[[torch.Tensor], torch.Tensor], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[log_softmax.__module__], "row_sum", row_sum_by_batch)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(op, _logits(4, width, torch.float32), sizes=(2, 5))
