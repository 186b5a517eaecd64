# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional
from vllm_deterministic.triton_kernels.bit_class import cancelling, certified_row_tiles, mirrored, same_bytes

from .faults import ordered_matmul
from .oracles import DTYPES


def test_same_bytes_tells_apart_what_equality_does_not() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bytes(torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0])))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bytes(torch.zeros(2), torch.zeros(1, 2))
    assert same_bytes(torch.tensor(1.5), torch.tensor(1.5))
    assert same_bytes(torch.arange(6).view(2, 3).t(), torch.arange(6).view(2, 3).t().contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancelling_numbers_spread_along_one_dimension(dtype: torch.dtype) -> None:
    x = cancelling(300, 40, dim=0, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert x.dtype == dtype
    magnitudes = x.float().abs().mean(dim=1)
    assert magnitudes.max() / magnitudes.min() > 2**20
    across = x.float().abs().mean(dim=0)
    assert across.max() / across.min() < 2**5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 33, 64])
def test_a_mirrored_product_is_all_rounding_error(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = mirrored(5, columns, sign=-1, dtype=dtype, generator=generator)
    w = mirrored(7, columns, sign=1, dtype=dtype, generator=generator)
    assert (x.shape, x.dtype, w.shape) == ((5, columns), dtype, (7, columns))
    terms = x.double().unsqueeze(1) * w.double()
    half = columns // 2
    assert torch.equal(terms[..., :half], -terms[..., half : 2 * half])
    assert not terms[..., 2 * half :].any()


SEGMENTS = {2: 4, 4: 2}


def _library_of_two_classes(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ordered_matmul(x, w, SEGMENTS.get(len(x), 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_certifies_the_tiles_of_one_class_and_no_other(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = mirrored(9, 64, sign=1, dtype=dtype, generator=generator)
    x = mirrored(32, 64, sign=-1, dtype=dtype, generator=generator)
    tiles = certified_row_tiles(
        lambda rows: _library_of_two_classes(w, rows).to(dtype), x, base=16, candidates=(1, 2, 4, 8, 32)
    )
    assert tiles == (1, 8, 16, 32)


def test_refuses_a_library_whose_rows_depend_on_where_they_stand() -> None:
    generator = torch.Generator().manual_seed(0)
    w = mirrored(9, 64, sign=1, dtype=torch.float32, generator=generator)
    x = mirrored(32, 64, sign=-1, dtype=torch.float32, generator=generator)

    def by_place(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([ordered_matmul(rows[:1], w, 2), ordered_matmul(rows[1:], w, 1)])

    with pytest.raises(ValueError, match="16 rows of 64 columns"):
        certified_row_tiles(by_place, x, base=16, candidates=())


def test_leaves_out_a_tile_whose_rows_read_on_into_the_next_one() -> None:
    generator = torch.Generator().manual_seed(0)
    w = mirrored(9, 64, sign=1, dtype=torch.float32, generator=generator)
    x = mirrored(64, 64, sign=-1, dtype=torch.float32, generator=generator)

    def reading_on(rows: torch.Tensor) -> torch.Tensor:
        next_row = torch.cat([rows[1:, :1], torch.zeros(1, 1)])
        return ordered_matmul(rows, w, 1) + (0.0 * next_row if len(rows) in (4, 32) else 0.0)

    assert certified_row_tiles(reading_on, x, base=16, candidates=(1, 4, 8, 32, 64)) == (1, 8, 16, 64)
    with pytest.raises(ValueError, match=r"16 rows of 64 columns .* or on its neighbours"):
        certified_row_tiles(lambda rows: rows + 0.0 * rows.roll(1, dims=0), x, base=16, candidates=())


@pytest.mark.parametrize(("rows", "base", "candidates"), [(15, 16, ()), (40, 16, (40,)), (16, 16, (32,))])
def test_refuses_to_certify_a_tile_that_it_cannot_try(rows: int, base: int, candidates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows"):
        certified_row_tiles(lambda x: x, torch.zeros(rows, 4), base=base, candidates=candidates)


@pytest.mark.parametrize("dtype", DTYPES)
def test_certified_tiles_of_the_library_agree_on_fresh_inputs(dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = mirrored(48, 256, sign=1, dtype=dtype, generator=generator)
    tiles = certified_row_tiles(
        lambda rows: functional.linear(rows, w),
        mirrored(64, 256, sign=-1, dtype=dtype, generator=generator),
        base=16,
        candidates=(1, 2, 4, 8, 32, 64),
    )
    assert 16 in tiles
    x = mirrored(64, 256, sign=-1, dtype=dtype, generator=generator)
    expected = torch.cat([functional.linear(rows.clone(), w) for rows in x.split(16)])
    for tile in tiles:
        assert same_bytes(torch.cat([functional.linear(rows.clone(), w) for rows in x.split(tile)]), expected), tile
