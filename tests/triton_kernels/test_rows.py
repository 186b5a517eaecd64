import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.rows import WIDEST, fullest, row_tile


@pytest.mark.parametrize("width", [1536, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 12288, 14336, 16384, 32768])
def test_rows_of_models_leave_no_lane_idle(width: int) -> None:
    assert width % row_tile(width).columns == 0


def test_every_row_fits_in_registers() -> None:
    """A thread of 32 warps has 64: half of them for the row in fp32, half for all else."""
    for width in range(1, WIDEST + 1):
        tile = row_tile(width)
        taken = tile.rows * math.ceil(width / tile.columns) * tile.columns
        assert taken <= 32 * 32 * tile.warps, width


def test_fullest_takes_the_first_of_equals() -> None:
    assert fullest(5120, 2048, 1024) == 1024
    assert fullest(4096, 2048, 1024) == 2048
