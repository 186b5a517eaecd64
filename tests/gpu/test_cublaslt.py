# ruff: noqa: E402 (torch comes with the extras alone)
"""Algorithms of cuBLASLt that are named and kept: in the class of the tiles, whatever M is."""

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.bit_class import mirrored, same_bytes
from vllm_deterministic.triton_kernels.cublaslt import Algorithm, CublasLt, cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.matmul import matmul
from vllm_deterministic.triton_kernels.tile_table import tile_plan
from vllm_deterministic.triton_kernels.tiles import class_reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((6144, 4096), (4096, 12288), (768, 4096), (1000, 296))
MOST_ROWS = 2100


@pytest.fixture(scope="module")
def library(device: torch.device) -> CublasLt:
    found = cublaslt(device)
    assert found is not None
    return found


def inputs(
    dtype: torch.dtype, n: int, k: int, device: torch.device, segments: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and a weight whose products are rounding errors alone, and the bytes of the class reference."""
    generator = torch.Generator(device).manual_seed(0)
    x = mirrored(MOST_ROWS, k, sign=-1, dtype=dtype, generator=generator)
    w = mirrored(n, k, sign=1, dtype=dtype, generator=generator)
    return x, w, matmul(x, w, tile=class_reference(dtype), segments=segments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_what_the_library_suggests_is_in_class(
    n: int, k: int, dtype: torch.dtype, library: CublasLt, device: torch.device
) -> None:
    segments = tile_plan(dtype, (0, 0), n, k).segments
    x, w, expected = inputs(dtype, n, k, device, segments)
    suggested = {a for m in (16, 64, 100, 300, 1000, 8192) for a in library.suggest(dtype, m, n, k, segments, 8)}
    assert len(suggested) > 8
    for algorithm in sorted(suggested):
        for m in (1, 17, 129, 1000, MOST_ROWS):
            out = matmul(x[-m:], w, tile=algorithm, segments=segments)
            assert same_bytes(out, expected[-m:]), f"{algorithm} at {m} rows"
    if k % 512 == 0:
        assert not same_bytes(matmul(x, w, tile=min(suggested), segments=3 - segments), expected)


def test_one_algorithm_at_every_number_of_rows(library: CublasLt, device: torch.device) -> None:
    n, k = SHAPES[0]
    x, w, expected = inputs(torch.bfloat16, n, k, device, 1)
    plan = tile_plan(torch.bfloat16, capability(device), n, k, library)
    algorithm = plan.algorithm(512)
    assert algorithm is not None
    differing = [m for m in range(1, MOST_ROWS + 1) if not same_bytes(matmul(x[:m], w, tile=algorithm), expected[:m])]
    assert differing == []


def test_the_table_names_what_the_library_knows(library: CublasLt, device: torch.device) -> None:
    """Every algorithm runs, and takes no workspace, at the shape that it is listed for."""
    n, k = 4096, 4096
    plan = tile_plan(torch.float16, capability(device), n, k, library)
    x, w, expected = inputs(torch.float16, n, k, device, 1)
    algorithms = {algorithm for _, algorithm in plan.library if algorithm}
    assert len(algorithms) > 3
    for algorithm in algorithms:
        assert same_bytes(matmul(x, w, tile=algorithm), expected)


def test_an_algorithm_that_the_library_does_not_know(library: CublasLt, device: torch.device) -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match=r"cublasLt\w+ failed with cuBLAS status"):
        matmul(x, x, tile=Algorithm(9999, 0, 0, 0, 0, 0, 0))


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize(
    "changed",
    [
        {"bias": lambda: _zeros(64)},
        {"segments": lambda: 2},
        {"x": lambda: _zeros(64, 65)[:, 1:]},
        {"x": lambda: _zeros(64 * 64 + 1)[1:].view(64, 64)},
        {"x": lambda: _zeros(64, 64).t()},
        {"x": lambda: _zeros(1, 64).expand(64, 64)},
        {"w": lambda: _zeros(64, 68)[:, :64]},
        {"out": lambda: _zeros(64, 65)[:, :64]},
        {"x": lambda: _zeros(64, 64).float(), "w": lambda: _zeros(64, 64).float()},
    ],
    ids=lambda changed: ", ".join(changed),
)
def test_refuses_what_the_library_cannot_read(changed: dict[str, Callable[[], Any]], library: CublasLt) -> None:
    algorithm = library.suggest(torch.bfloat16, 64, 64, 64, 1)[0]
    good = {"x": lambda: _zeros(64, 64), "w": lambda: _zeros(64, 64)}
    arguments: dict[str, Any] = {name: make() for name, make in (good | changed).items()}
    with pytest.raises(ValueError, match="of cuBLASLt cannot multiply"):
        matmul(**arguments, tile=algorithm)
    matmul(**arguments)  # by a tile
