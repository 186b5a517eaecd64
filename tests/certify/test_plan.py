# ruff: noqa: E402 (torch comes with the extra "cpu" alone)
import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.matmul import matmul
from vllm_deterministic.triton_kernels.tile_table import tile_plan
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan, class_reference

from vllm_deterministic.certify.plan import ROWS, certify_plan, tried_columns, tried_rows
from vllm_deterministic.certify.verdict import PlanVerdict

from ..triton_kernels.faults import ordered_matmul
from ..triton_kernels.interpreter import interpreting
from ..triton_kernels.oracles import DTYPES

CPU = torch.device("cpu")
SMALL, LARGE = Tile(16, 16, 16, 4, 1, swapped=True, tma=False), Tile(32, 32, 16, 4, 1, tma=False)
PLAN = TilePlan(9, 64, 1, ((4, SMALL), (1 << 30, LARGE)))
TRIED = (1, 2, 5, 8)


def ordered(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
    return ordered_matmul(x, w, segments).to(x.dtype)


def certify(
    matmul: Callable[..., torch.Tensor], dtype: torch.dtype, *, every_m: bool = True, plan: TilePlan = PLAN
) -> PlanVerdict:
    return certify_plan(plan, dtype, CPU, every_m=every_m, rows=TRIED, matmul=matmul)


def statuses(verdict: PlanVerdict) -> list[str]:
    return [tile.status for tile in verdict.tiles]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [1, 2])
def test_one_order_is_in_class(dtype: torch.dtype, segments: int) -> None:
    plan = TilePlan(9, 64, segments, PLAN.ranges)
    verdict = certify(ordered, dtype, plan=plan)
    assert verdict.in_class
    assert (verdict.n, verdict.k, verdict.segments, verdict.every_m) == (9, 64, segments, True)
    assert [tile.tile for tile in verdict.tiles] == [SMALL, LARGE]
    assert 0 < verdict.error < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_a_tile_splits_k(dtype: torch.dtype) -> None:
    def split(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        return ordered(x, w, tile=tile, segments=4 if tile == SMALL else segments)

    verdict = certify(split, dtype)
    assert statuses(verdict) == ["outside", "in class"]
    assert verdict.dropped == (SMALL,)
    assert "M=1, element (0, " in verdict.tiles[0].detail


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every_m", [False, True])
def test_fault_the_order_follows_m(dtype: torch.dtype, every_m: bool) -> None:
    def by_rows(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        return ordered(x, w, tile=tile, segments=2 if len(x) < 4 else segments)

    verdict = certify(by_rows, dtype, every_m=every_m)
    # M of 4 and more alone may choose the larger tile, so at other M it does no harm.
    assert statuses(verdict) == ["outside", "outside" if every_m else "in class"]


def test_fault_the_order_follows_the_position() -> None:
    def by_place(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        halves = [ordered(rows, w, tile=tile, segments=1 + place) for place, rows in enumerate(x.split(4)[:2])]
        return torch.cat([*halves, ordered(x[8:], w, tile=tile, segments=2)])

    assert statuses(certify(by_place, torch.float32)) == ["outside", "outside"]


def test_fault_a_neighbour_leaks() -> None:
    def leaky(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        neighbours = x.roll(1, 0) * 0 if tile == SMALL else 0  # NaN where the neighbour is not finite
        return ordered(x + neighbours, w, tile=tile, segments=segments)

    verdict = certify(leaky, torch.float32)
    assert statuses(verdict) == ["outside", "in class"]
    assert verdict.tiles[0].detail.startswith("non-finite")


def test_nan_of_other_bits_is_no_fault() -> None:
    def negative_nan(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        out = ordered(x, w, tile=tile, segments=segments)
        return torch.where(out.isnan(), math.copysign(math.nan, -1 if tile == SMALL else 1), out)

    assert certify(negative_nan, torch.float32).in_class


def test_what_does_not_run_is_told() -> None:
    def failing(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        if tile == LARGE:
            raise RuntimeError("out of resource: shared memory\nmore")
        return ordered(x, w, tile=tile, segments=segments)

    verdict = certify(failing, torch.float16)
    assert statuses(verdict) == ["in class", "failed"]
    assert verdict.tiles[1].detail == "RuntimeError: out of resource: shared memory"


def test_memory_that_ran_out_is_no_verdict() -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        certify(full, torch.float16)


@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        (lambda out: out * 1.01, "off by 1.0e-02"),
        (lambda out: out.nan_to_num(), "does not pass infinities"),
        (lambda out: out[0, 0, 0], "did not run: IndexError"),
    ],
)
def test_a_wrong_reference_refuses_every_tile(wrong: Callable[[torch.Tensor], torch.Tensor], refusal: str) -> None:
    def reference(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        out = ordered(x, w, tile=tile, segments=segments)
        return wrong(out) if tile == class_reference(x.dtype) else out

    verdict = certify(reference, torch.float32)
    assert refusal in verdict.refusal
    assert not verdict.in_class


def test_tiles_are_tried_around_the_edges_of_their_ranges() -> None:
    persistent = Tile(64, 64, 64, 4, 4, persistent=True)
    plan = TilePlan(9, 64, 1, ((16, SMALL), (100, LARGE), (128, persistent), (1 << 30, SMALL)))
    assert tried_rows(plan, LARGE) == (16, 17, 63, 64, 65, 100, 101)
    assert tried_rows(plan, persistent) == (100, 101, 127, 128, 129, 8192)
    assert tried_rows(plan, SMALL) == (1, 2, 15, 16, 17, 128, 129, 255, 256, 1000, 4096, 8192)
    assert tried_rows(TilePlan(9, 64, 1, ((9000, SMALL), (1 << 30, LARGE))), LARGE) == (8192,)
    assert set(tried_rows(TilePlan(9, 64, 1, ((1 << 30, SMALL),)), SMALL)) == set(ROWS)


@pytest.mark.parametrize("n", [1, 33, 4095, 4096, 6144, 151936, 128257])
def test_fewer_columns_end_in_the_same_tile(n: int) -> None:
    columns = tried_columns(n)
    assert columns <= min(n, 4096)
    assert (n - columns) % 2048 == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_interpreted(dtype: torch.dtype) -> None:
    """The kernel is in class; split in two where there are few rows, it is caught."""

    def by_rows(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        return matmul(x, w, tile=tile, segments=2 if len(x) < 4 else segments)

    # The interpreter adds each BLOCK_K by NumPy, so only one BLOCK_K is a class there, and one M and N of a tile.
    plan = TilePlan(9, 400, 1, ((1 << 30, class_reference(dtype)),))
    with interpreting():
        assert certify(matmul, dtype, plan=plan).in_class
        assert statuses(certify(by_rows, dtype, plan=plan)) == ["outside"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 12288), (151936, 2048), (100, 100)])
def test_every_tile_of_the_table_is_tried(
    dtype: torch.dtype, capability: tuple[int, int], shape: tuple[int, int]
) -> None:
    plan = tile_plan(dtype, capability, *shape)
    before = 0
    for last, tile in plan.ranges:
        tried = tried_rows(plan, tile)
        assert any(before < m <= last for m in tried) or before >= max(ROWS)
        before = last
