# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.cublaslt import Algorithm, allows, cublaslt
from vllm_deterministic.triton_kernels.matmul import matmul

from .interpreter import interpreting


def aligned(rows: int, columns: int, offset: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A matrix that begins ``offset`` elements past a multiple of 16 bytes."""
    memory = torch.zeros(rows * columns + offset + 16, dtype=dtype)
    begin = -memory.data_ptr() % 16 // dtype.itemsize + offset
    return memory[begin : begin + rows * columns].view(rows, columns)


def test_there_is_none_on_a_cpu() -> None:
    assert cublaslt(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        (lambda: aligned(4, 64), True),
        (lambda: aligned(4, 72)[:, :64], True),
        (lambda: aligned(1, 64).expand(1, -1), True),
        (lambda: aligned(4, 64, offset=1), False),
        (lambda: aligned(4, 65)[:, :64], False),
        (lambda: aligned(64, 4).t(), False),
        (lambda: aligned(1, 64).expand(4, -1), False),
        (lambda: torch.as_strided(aligned(8, 64), (4, 64), (32, 1)), False),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_rows_must_be_contiguous_apart_and_aligned(
    which: int, change: Callable[[], torch.Tensor], allowed: bool
) -> None:
    matrices = [aligned(4, 64), aligned(4, 64), aligned(4, 64)]
    matrices[which] = change()
    assert allows(*matrices) is allowed


def test_dtypes() -> None:
    for dtype, allowed in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        assert allows(*(aligned(4, 64, dtype=dtype) for _ in range(3))) is allowed


def test_an_algorithm_without_a_library_is_refused() -> None:
    x = torch.full((4, 64), math.pi)
    with interpreting(), pytest.raises(ValueError, match=r"of cuBLASLt cannot multiply x .* give a Tile"):
        matmul(x, x, tile=Algorithm(66, 1, 1, 1, 0, 0, 0))
