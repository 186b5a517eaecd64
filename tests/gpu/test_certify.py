# ruff: noqa: E402 (torch comes with the extras alone)
import logging
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.cancelling_inputs import FAMILIES
from vllm_deterministic.triton_kernels.cublaslt import Algorithm, cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.matmul import matmul
from vllm_deterministic.triton_kernels.tile_table import tile_plan
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan, class_reference

from vllm_deterministic.certify.machine import cuda_device, identity
from vllm_deterministic.certify.plan import certify_plan
from vllm_deterministic.certify.plans import NoTileError, certified_plans
from vllm_deterministic.certify.verdict import PlanVerdict

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QWEN3_8B = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))


def planned(dtype: torch.dtype, n: int, k: int, device: torch.device) -> TilePlan:
    """The plan as a server makes it, with the library."""
    return tile_plan(dtype, capability(device), n, k, cublaslt(device))


def findings(verdict: PlanVerdict) -> list[str]:
    return [verdict.refusal] * bool(verdict.refusal) + [
        str(tile) for tile in verdict.tiles if tile.status != "in class"
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (1100, 1032), (77, 333)])
def test_every_tile_of_the_table_is_in_class(dtype: torch.dtype, n: int, k: int, device: torch.device) -> None:
    verdict = certify_plan(planned(dtype, n, k, device), dtype, device, every_m=k > 2000)
    assert findings(verdict) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_a_tile_splits_k(dtype: torch.dtype, device: torch.device) -> None:
    """One tile of the plan, and one M of another, cut K in two."""
    plan = planned(dtype, 2048, 2048, device)

    faulty = {plan.tiles[0], plan.tiles[-1]}

    def by_tile(x: torch.Tensor, w: torch.Tensor, *, tile: Tile | Algorithm, segments: int) -> torch.Tensor:
        return matmul(x, w, tile=tile, segments=2 * segments if tile in faulty else segments)

    def by_rows(x: torch.Tensor, w: torch.Tensor, *, tile: Tile | Algorithm, segments: int) -> torch.Tensor:
        return matmul(x, w, tile=tile, segments=2 * segments if len(x) == 17 else segments)

    # The reference must not move with those that are to differ from it.
    if class_reference(dtype) not in faulty:
        assert dtype == torch.float32 or isinstance(plan.tiles[-1], Algorithm)
        verdict = certify_plan(plan, dtype, device, matmul=by_tile)
        assert [tile.status != "in class" for tile in verdict.tiles] == [tile in faulty for tile in plan.tiles]
    verdict = certify_plan(plan, dtype, device, matmul=by_rows)
    assert all(tile.status == "outside" and "M=17, " in tile.detail for tile in verdict.tiles), findings(verdict)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["mirrored halves", "wide exponents", "alternating signs", "huge pair"])
def test_another_order_shows_on_this_family_alone(family: str, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, w = FAMILIES[family](64, 512, 2048, dtype, generator)
    tile = class_reference(dtype)
    one, two = (matmul(x, w, tile=tile, segments=segments) for segments in (1, 2))
    assert (one != two).any()


def test_fault_tf32(device: torch.device) -> None:
    def tf32(x: torch.Tensor, w: torch.Tensor, **_: object) -> torch.Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return x @ w.T
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    verdict = certify_plan(tile_plan(torch.float32, (9, 0), 512, 512), torch.float32, device, matmul=tf32)
    assert "off by" in verdict.refusal


def test_a_model_is_certified_in_a_minute_and_read_back_in_two_seconds(tmp_path: Path, device: torch.device) -> None:
    lines: list[str] = []
    took = []
    for _ in range(2):
        start = time.perf_counter()
        plans = certified_plans(QWEN3_8B, torch.bfloat16, device, lines.append, cache_directory=tmp_path)
        took.append(time.perf_counter() - start)
        assert set(plans) == set(QWEN3_8B)
        assert plans[6144, 4096] == planned(torch.bfloat16, 6144, 4096, device)
    print(f"certified in {took[0]:.1f} s, read back in {took[1]:.3f} s")
    assert took[0] < 60
    assert took[1] < 2
    assert len(lines) == 1 + len(QWEN3_8B)


def test_a_server_leaves_out_the_fault_and_refuses_without_a_tile(
    tmp_path: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(torch.bfloat16, 2048, 2048, device)
    faulty = {plan.tiles[0]}

    def planted(x: torch.Tensor, w: torch.Tensor, *, tile: Tile, segments: int) -> torch.Tensor:
        return matmul(x, w, tile=tile, segments=2 * segments if tile in faulty else segments)

    def start() -> object:
        shapes = [(2048, 2048)]
        return certified_plans(shapes, torch.bfloat16, device, cache_directory=tmp_path / "x", matmul=planted)

    with caplog.at_level(logging.WARNING):
        assert start() == {(2048, 2048): plan.without(faulty)}
    assert "is left out, outside" in caplog.text
    faulty.update(plan.tiles)
    if class_reference(torch.bfloat16) not in faulty:
        (next((tmp_path / "x").iterdir())).unlink()
        with pytest.raises(NoTileError, match="N=2048, K=2048"):
            start()


def test_the_machine_is_named(device: torch.device) -> None:
    assert cuda_device() == device
    known = identity(device)
    assert known["gpu"] == torch.cuda.get_device_name(device)
    assert known["driver"] != "unknown"
