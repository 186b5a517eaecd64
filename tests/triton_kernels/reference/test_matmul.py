# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from vllm_deterministic.triton_kernels.bit_class import certified_row_tiles, mirrored
from vllm_deterministic.triton_kernels.reference.matmul import matmul, row_tiles

from .. import oracles
from ..faults import ordered_matmul
from ..invariance import assert_batch_invariant
from ..oracles import DTYPES, assert_close

SIZES = (2, 3, 4, 5, 7, 11, 16, 33, 70)


def _mirrored_pair(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return mirrored(64, k, sign=-1, dtype=dtype, generator=generator), mirrored(
        n, k, sign=1, dtype=dtype, generator=generator
    )


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2000), st.sets(st.integers(1, 256), min_size=1))
def test_row_tiles_cover_each_row_once(num_rows: int, tiles: set[int]) -> None:
    end = 0
    for start, tile in row_tiles(num_rows, sorted(tiles)):
        assert start == end < num_rows
        assert tile in tiles
        end = start + tile
        # Only the smallest tile may be mostly padding.
        assert end - num_rows <= tile // 2 or tile == min(tiles)
    assert end >= num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_close_to_the_oracle(dtype: torch.dtype, rows: int, with_bias: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 300, generator=generator).to(dtype) for n in (rows, 70))
    bias = torch.randn(70, generator=generator).to(dtype) if with_bias else None
    out = matmul(x, lambda tile: functional.linear(tile, w, bias), (4, 16))
    assert out.dtype == dtype
    assert_close(out, oracles.matmul(x, w, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(96, 512), (33, 101)])
def test_rows_keep_their_bytes_on_certified_tiles(dtype: torch.dtype, n: int, k: int, threads: int) -> None:
    x, w = _mirrored_pair(n, k, dtype)

    def library(rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, w)

    tiles = certified_row_tiles(library, x, base=16, candidates=(1, 2, 4, 8, 32, 64))
    assert_batch_invariant(lambda rows: matmul(rows, library, tiles), x[:7], sizes=SIZES)


def _library_by_rows(w: torch.Tensor, dtype: torch.dtype, rows: torch.Tensor) -> torch.Tensor:
    """K in two segments for few rows, as libraries do to occupy all threads."""
    return ordered_matmul(rows, w, 2 if len(rows) < 4 else 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_their_bytes_where_the_library_changes_its_order(dtype: torch.dtype) -> None:
    x, w = _mirrored_pair(9, 64, dtype)
    tiles = certified_row_tiles(lambda rows: _library_by_rows(w, dtype, rows), x, base=16, candidates=(1, 2, 4, 32))
    assert tiles == (4, 16, 32)
    assert_batch_invariant(
        lambda rows: matmul(rows, lambda tile: _library_by_rows(w, dtype, tile), tiles), x[:7], sizes=SIZES
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_tile_follows_the_batch(dtype: torch.dtype) -> None:
    x, w = _mirrored_pair(9, 64, dtype)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(lambda rows: _library_by_rows(w, dtype, rows), x[:7], sizes=SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_uncertified_tile(dtype: torch.dtype) -> None:
    x, w = _mirrored_pair(9, 64, dtype)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_batch_invariant(
            lambda rows: matmul(rows, lambda tile: _library_by_rows(w, dtype, tile), (2, 16)), x[:7], sizes=SIZES
        )


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 6, 16, 21])
def test_calls_the_library_at_its_tiles_alone(rows: int) -> None:
    called = []

    def library(tile: torch.Tensor) -> torch.Tensor:
        assert tile.is_contiguous()
        called.append(len(tile))
        return tile + 1

    x = torch.arange(1.0, rows * 6 + 1).view(rows, 6)[:, ::2]
    assert torch.equal(matmul(x, library, (4, 16)), x + 1)
    assert called
    assert set(called) <= {4, 16}


def test_fills_the_last_tile_with_zeros() -> None:
    seen = []
    matmul(torch.ones(5, 2), lambda tile: seen.append(tile) or tile, (4,))
    assert torch.cat(seen)[:, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_refuses_what_is_no_matrix_and_no_tiles() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        matmul(torch.zeros(2, 3, 4), lambda x: x, (4,))
    with pytest.raises(ValueError, match="tiles"):
        matmul(torch.zeros(2, 3), lambda x: x, ())
