# ruff: noqa: E402 (torch comes with the extras alone)
"""The matrix product at real sizes: a row's bytes are those it has in any other batch, by whichever tile."""

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels import matmul as matmul_module
from vllm_deterministic.triton_kernels import tiles
from vllm_deterministic.triton_kernels.activation import silu_and_mul
from vllm_deterministic.triton_kernels.cancelling_inputs import alternating_signs, normal
from vllm_deterministic.triton_kernels.cublaslt import cublaslt
from vllm_deterministic.triton_kernels.launch import capability
from vllm_deterministic.triton_kernels.matmul import batched_matmul, matmul
from vllm_deterministic.triton_kernels.rms_norm import rms_norm
from vllm_deterministic.triton_kernels.tile_table import tile_plan

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
ROADS = ("tiles", "with the library")
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 1000, 4096, 8192)
# One and two segments, odd sizes, and rows that are not aligned to 16 bytes.
WIDE, TWO_SEGMENTS = (6144, 4096), (768, 4096)
SHAPES = (WIDE, (4096, 12288), TWO_SEGMENTS, (1000, 300), (77, 1001))
BIAS_SHAPES = (WIDE, TWO_SEGMENTS, (77, 1001))
POISON = 77.0
# Unit in the last place of a result, and error of a sum by the sum of its terms' magnitudes.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SUMMING = {torch.bfloat16: 2.0**-18, torch.float16: 2.0**-18, torch.float32: 2.0**-20}
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def embedded(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """``x`` as a view with NaN before and after each row."""
    rows = torch.full((x.shape[0], before + x.shape[1] + after), math.nan, dtype=x.dtype, device=x.device)
    return rows[:, before : before + x.shape[1]].copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "rows apart": lambda x: embedded(x, 8, 8),
    "misaligned": lambda x: embedded(x, 1, 0),
    "misaligned base": lambda x: embedded(x, 1, 7),
    "transposed": lambda x: x.t().contiguous().t(),
    "transposed, misaligned": lambda x: embedded(x.t(), 1, 0).t(),
}
LAYOUT_PAIRS = [
    *(("contiguous", w) for w in LAYOUTS if w != "contiguous"),
    *((x, "contiguous") for x in LAYOUTS if x != "contiguous"),
    ("misaligned", "transposed"),
]


def between_poison(
    m: int, n: int, margin: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned buffer, and the ``[M, N]`` within it that a product may write to."""
    buffer = torch.full((m + 64, n + 2 * margin), POISON, dtype=dtype, device=device)
    return buffer, buffer[32:-32, margin:-margin]


@dataclass(frozen=True)
class Case:
    """One product, with all that its kernel is compiled for."""

    dtype: torch.dtype
    n: int
    k: int
    m: int
    x_layout: str = "contiguous"
    w_layout: str = "contiguous"
    bias: bool = False
    segments: int | None = None
    margin: int | None = None
    batch: int | None = None
    tile: tiles.Tile | None = None

    def planned(self, device: torch.device) -> tiles.Tile:
        """The tile of the case, or what the table says."""
        plan = tile_plan(self.dtype, capability(device), self.n, self.k)
        return plan.tile(self.m) if self.tile is None else self.tile

    def call(self, device: torch.device) -> None:
        """Compute on whatever lies in memory."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device=device)

        if self.batch is not None:
            b = empty(self.batch, self.k, self.n) if self.w_layout == "transposed" else None
            b = empty(self.batch, self.n, self.k).transpose(1, 2) if b is None else b
            batched_matmul(empty(self.batch, self.m, self.k), b)
            return
        x, w = LAYOUTS[self.x_layout](empty(self.m, self.k)), LAYOUTS[self.w_layout](empty(self.n, self.k))
        out = None if self.margin is None else between_poison(self.m, self.n, self.margin, self.dtype, device)[1]
        bias = empty(self.n) if self.bias else None
        matmul(x, w, bias, tile=self.planned(device), segments=self.segments, out=out)


# Small and large M of one shape and of the one with two segments.
LAYOUT_CASES = [
    Case(torch.bfloat16, n, k, m, x_layout, w_layout)
    for n, k, m in ((*WIDE, 64), (*WIDE, 2048), (*TWO_SEGMENTS, 1), (*TWO_SEGMENTS, 300))
    for x_layout, w_layout in LAYOUT_PAIRS
]
# With a margin of 16 elements the result may go by descriptor, with 3 it may not.
MARGIN_CASES = [
    Case(torch.bfloat16, n, k, m, margin=margin)
    for (n, k), margin in ((WIDE, 16), (WIDE, 3), (TWO_SEGMENTS, 16), ((77, 1001), 3))
    for m in (1, 129, 4099)
] + [
    Case(torch.bfloat16, 1000, 296, 1001, margin=16, tile=tile)
    for tile in (
        tiles.Tile(128, 256, 64, warps=8, stages=3, persistent=True, tma_store=True),
        tiles.Tile(128, 128, 64, warps=8, stages=4, tma_store=True, side_n=64),
    )
]
BATCHED_CASES = [
    Case(dtype, n, k, m, batch=batch, w_layout=w_layout)
    for dtype in (torch.bfloat16, torch.float32)
    for batch, m, n, k in ((5, 33, 100, 257), (2, 130, 256, 64), (3, 5, 200, 4096))
    for w_layout in ("contiguous", "transposed")
]
# Ways of a tile that the table has for few shapes, or none: loads that run ahead, and totals that fill the registers.
FLAT = tiles.Tile(128, 128, 64, warps=8, stages=5, persistent=True, flatten=True)
WAYS = {
    "flattened": FLAT,
    "flattened, stored by descriptor": replace(FLAT, block_n=256, stages=3, tma_store=True),
    "flattened, few rows": tiles.Tile(64, 128, 128, warps=4, stages=4, persistent=True, flatten=True),
    "flattened, tall": replace(FLAT, block_m=256, stages=3),
    "flattened, swapped": replace(FLAT, block_n=256, stages=3, swapped=True),
    "tall": tiles.Tile(256, 128, 64, warps=8, stages=4),
    "two products": tiles.Tile(128, 128, 64, warps=8, stages=4, side_n=64),
    "two products, four warps": tiles.Tile(64, 128, 64, warps=4, stages=5, side_n=64),
    "two products, persistent": tiles.Tile(128, 128, 64, warps=8, stages=4, side_n=64, persistent=True),
}
WAY_SHAPES, WAY_SIZES = ((1280, 5120), (3000, 1048)), (1, 127, 129, 1000, 4000)
BIAS_SIZES = (1, 129, 4096)
BLOCK_SIZES, HIDDEN, INNER = (1, 17, 300), 2048, 6144
FP32_SHAPES, FP32_SIZES = ((130, 257), (256, 512), (64, 4096)), (1, 2, 16, 17, 64, 65, 300)


def all_cases(device: torch.device) -> list[Case]:
    """What the tests compute, one case for each kernel."""
    cases = [Case(dtype, *shape, m) for dtype in DTYPES for shape in SHAPES for m in SIZES]
    cases += [Case(dtype, *shape, 1024, tile=tiles.class_reference(dtype)) for dtype in DTYPES for shape in SHAPES]
    cases += [Case(dtype, *shape, m, bias=True) for dtype in DTYPES for shape in BIAS_SHAPES for m in BIAS_SIZES]
    cases += [
        Case(dtype, *shape, 4000, tile=tile) for dtype in DTYPES for shape in WAY_SHAPES for tile in WAYS.values()
    ]
    cases += [*LAYOUT_CASES, *MARGIN_CASES, *BATCHED_CASES, *(replace(case, batch=None) for case in BATCHED_CASES)]
    cases += [Case(torch.bfloat16, n, k, m) for m in BLOCK_SIZES for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER))]
    cases += [Case(torch.bfloat16, *WIDE, m, segments=2) for m in (1, 2, 15, 16)]
    for shape in FP32_SHAPES:
        reference = tiles.class_reference(torch.float32)
        cases += [Case(torch.float32, *shape, m, tile=tile) for m in FP32_SIZES for tile in (None, reference)]
    return list({(case.planned(device), replace(case, m=0)): case for case in cases}.values())


def compile_part(part: int, parts: int) -> None:
    """Compile a part of the kernels into Triton's cache on disk, without running them."""

    class Warmup:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)

    matmul_module.matmul_kernel = Warmup(matmul_module.matmul_kernel)
    device = torch.device("cuda", torch.cuda.current_device())
    for case in all_cases(device)[part::parts]:
        case.call(device)


@pytest.fixture(autouse=True, scope="module")
def compiled(device: torch.device) -> None:
    """Compile on all cores at once: one after the other the kernels take minutes."""
    parts = min(16, os.cpu_count() or 1)
    command = [sys.executable, "-P", __file__]
    for worker in [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]:
        assert worker.wait() == 0


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes, compared on the device."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@functools.lru_cache(maxsize=2)
def inputs(dtype: torch.dtype, n: int, k: int, m: int = SIZES[-1]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and a weight whose products show the order of additions, and the bytes of the class reference."""
    x, w = alternating_signs(m, n, k, dtype, torch.Generator("cuda").manual_seed(n))
    return x, w, matmul(x, w, tile=tiles.class_reference(dtype))


def differing(product: Product, x: torch.Tensor, w: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """The numbers of rows at which a row has other bytes than expected, alone or among hostile neighbours."""
    generator = torch.Generator(x.device).manual_seed(0)
    contents = (math.nan, math.inf, -math.inf, torch.finfo(x.dtype).max, 0.0)
    found = []
    for m in SIZES:
        for start in sorted({0, (len(x) - m) // 2, len(x) - m}):
            hostile = torch.rand(m, generator=generator, device=x.device) < 0.5
            hostile[(start + 5) % m] = False
            rows, places = x[start : start + m].clone(), hostile.nonzero().flatten()
            for number, content in enumerate(contents):
                rows[places[number :: len(contents)]] = content
            if not same(product(rows, w)[~hostile], expected[start : start + m][~hostile]):
                found.append(m)
    return sorted(set(found))


def assert_close(
    out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 1.0
) -> None:
    """One rounding of a sum in fp32 away from float64."""
    exact, magnitude = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    error = (out.double() - exact).abs() - ROUNDING[out.dtype] * exact.abs()
    assert bool((error <= factor * SUMMING[out.dtype] * magnitude).all()), f"error {float(error.max())}"


def planned(n: int, k: int, dtype: torch.dtype, road: str, device: torch.device) -> tiles.TilePlan:
    """The tiles alone, or with cuBLASLt where it is faster."""
    library = cublaslt(device) if road == "with the library" else None
    return tile_plan(dtype, capability(device), n, k, library)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_keep_their_bytes(shape: tuple[int, int], dtype: torch.dtype, road: str, device: torch.device) -> None:
    x, w, expected = inputs(dtype, *shape)
    assert float((expected != 0).float().mean()) > 0.25, "the order of additions does not show"
    plan = planned(*shape, dtype, road, device)
    assert differing(lambda x, w: matmul(x, w, plan=plan), x, w, expected) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WAY_SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_a_tile_is_in_class(
    way: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, w, expected = inputs(dtype, *shape)
    for m in WAY_SIZES:
        assert same(matmul(x[-m:], w, tile=WAYS[way]), expected[-m:]), f"{m} rows"


@pytest.mark.parametrize("road", ROADS)
def test_whole_waves_leave_the_last_rows_to_the_plan(road: str, device: torch.device) -> None:
    """At 132 programs a wave is 1664 rows; 2048 and 4000 rows leave less than half of one, 3000 more."""
    n, k = WAY_SHAPES[0]
    x, w, expected = inputs(torch.bfloat16, n, k)
    tile = replace(FLAT, whole_waves=True)
    plan = planned(n, k, x.dtype, road, device)
    for m in (1000, 2048, 3000, 4000):
        assert same(matmul(x[:m], w, plan=plan, tile=tile), expected[:m]), f"{m} rows"


def test_planted_fault_is_seen(device: torch.device) -> None:
    """K is cut in two where there are few rows."""
    fault = differing(lambda x, w: matmul(x, w, segments=2 if len(x) <= 16 else 1), *inputs(torch.bfloat16, *WIDE))
    assert fault == [1, 2, 15, 16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_float64(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, w = normal(4096, *shape, dtype, generator)
    w /= shape[1] ** 0.5
    for m in (1, 129, 4096):
        assert_close(matmul(x[:m], w)[:300], x[: min(m, 300)], w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_bias_is_added_before_the_one_rounding(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, w = normal(BIAS_SIZES[-1], *shape, dtype, generator)
    bias = torch.randn(2 * shape[0], generator=generator, device=device).to(dtype)[::2]
    outs = {m: matmul(x[:m], w, bias) for m in BIAS_SIZES}
    assert_close(outs[129], x[:129], w, bias)
    for m, out in outs.items():
        assert same(out, outs[BIAS_SIZES[-1]][:m]), f"{m} rows"


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda c: f"{c.n}x{c.k}-{c.m}-x {c.x_layout}-w {c.w_layout}")
def test_layouts_keep_their_bytes(case: Case, device: torch.device) -> None:
    x, w, expected = inputs(case.dtype, case.n, case.k)
    out = matmul(LAYOUTS[case.x_layout](x[: case.m]), LAYOUTS[case.w_layout](w))
    assert same(out, expected[: case.m])


def test_overlapping_rows_and_more_dimensions(device: torch.device) -> None:
    x, w, expected = inputs(torch.bfloat16, *WIDE)
    assert same(matmul(x[:1].expand(64, -1), w), expected[:1].expand(64, -1))
    assert same(matmul(x[0], w), expected[0])
    assert same(matmul(x[:60].view(3, 4, 5, -1), w), expected[:60].view(3, 4, 5, -1))
    assert same(matmul(x[:60].view(3, 20, -1).transpose(0, 1), w), expected[:60].view(3, 20, -1).transpose(0, 1))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", MARGIN_CASES, ids=lambda c: f"{c.n}x{c.k}-{c.m}-margin {c.margin}")
def test_nothing_is_written_but_the_output(case: Case, road: str, device: torch.device) -> None:
    x, w, expected = inputs(case.dtype, case.n, case.k)
    plan = planned(case.n, case.k, case.dtype, road, device)
    buffer, inside = between_poison(case.m, case.n, case.margin, case.dtype, device)
    assert matmul(x[: case.m], w, plan=plan, tile=case.tile, out=inside).data_ptr() == inside.data_ptr()
    assert same(inside, expected[: case.m])
    inside.fill_(POISON)
    assert bool((buffer == POISON).all())


@pytest.mark.parametrize(("n", "k", "m"), [(*WIDE, 1), (*WIDE, 4096), (*TWO_SEGMENTS, 17)])
def test_a_captured_graph_gives_the_same_bytes(n: int, k: int, m: int, device: torch.device) -> None:
    x, w, expected = inputs(torch.bfloat16, n, k)
    static = torch.zeros_like(x[:m])
    matmul(static, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The second call starts while the first one ends.
        matmul(static, w)
        out = matmul(static, w)
    for start in (0, 7, 1000):
        static.copy_(x[start : start + m])
        graph.replay()
        assert same(out, expected[start : start + m])


@pytest.mark.parametrize("m", BLOCK_SIZES)
def test_kernels_that_start_early_see_what_is_ahead(m: int, device: torch.device) -> None:
    """Norm, product, activation and product in one stream, each launched before the one ahead of it ends."""
    generator = torch.Generator(device).manual_seed(m)
    batches = [torch.randn(m, HIDDEN, generator=generator, device=device).bfloat16() for _ in range(5)]
    gate_up = torch.randn(2 * INNER, HIDDEN, generator=generator, device=device).bfloat16() / HIDDEN**0.5
    down = torch.randn(HIDDEN, INNER, generator=generator, device=device).bfloat16() / INNER**0.5
    scale = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)

    def block(x: torch.Tensor, pause: Callable[[], object]) -> torch.Tensor:
        for step in (
            lambda x: rms_norm(x, scale, 1e-6),
            lambda x: matmul(x, gate_up),
            silu_and_mul,
            lambda x: matmul(x, down),
        ):
            x = step(x)
            pause()
        return x

    expected = [block(x, torch.cuda.synchronize) for x in batches]
    outs = [block(batches[number % 5], lambda: None) for number in range(200)]
    for number, out in enumerate(outs):
        assert same(out, expected[number % 5]), f"repeat {number}"


def test_weights_written_by_the_kernel_ahead_are_seen(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, factor = (torch.randn(m, HIDDEN, generator=generator, device=device).bfloat16() for m in (16, 64))
    sources = [torch.randn(2 * INNER, 64, generator=generator, device=device).bfloat16() for _ in range(3)]
    factor = factor.t().contiguous()
    live = torch.zeros(2 * INNER, HIDDEN, dtype=x.dtype, device=device)
    users = (lambda: matmul(x, live), lambda: rms_norm(x, live[-1], 1e-6))

    def update_and_use(number: int, pause: Callable[[], object]) -> torch.Tensor:
        matmul(sources[number % 3], factor, out=live)
        pause()
        return users[number % 2]()

    expected = [update_and_use(number, torch.cuda.synchronize) for number in range(6)]
    outs = [update_and_use(number, lambda: None) for number in range(200)]
    for number, out in enumerate(outs):
        assert same(out, expected[number % 6]), f"repeat {number}"


@torch.library.custom_op("vllm_deterministic_test::linear", mutates_args=())
def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return matmul(x, w)


@linear.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


def test_compiled_around_it_the_bytes_are_the_same(device: torch.device) -> None:
    x, w, expected = inputs(torch.bfloat16, *WIDE)
    forward = torch.compile(lambda x: linear(x.neg(), w).relu(), fullgraph=True, dynamic=True)
    eager = matmul(-x, w).relu()
    assert not same(eager, expected)
    for m in (2, 17, 4096):
        assert same(forward(x[:m]), eager[:m]), f"{m} rows"


@pytest.mark.parametrize("case", BATCHED_CASES, ids=lambda c: f"{c.dtype}-{c.batch}x{c.m}x{c.n}x{c.k}-{c.w_layout}")
def test_batched(case: Case, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, w = alternating_signs(case.batch * case.m, case.n, case.k, case.dtype, generator)
    a, w = x.view(case.batch, case.m, case.k), torch.stack([w * (number + 1) for number in range(case.batch)])
    b = w.transpose(1, 2).contiguous() if case.w_layout == "transposed" else w.transpose(1, 2)
    out = batched_matmul(a, b)
    for number in range(case.batch):
        assert same(out[number], matmul(a[number], b[number].t())), f"matrix {number}"


def test_more_matrices_than_a_grid_has(device: torch.device) -> None:
    x, w, expected = inputs(torch.bfloat16, 16, 64, 2 * 65535 + 1)
    assert same(batched_matmul(x.unsqueeze(1), w.t().expand(len(x), -1, -1)).squeeze(1), expected)


def test_fp32_is_ieee(device: torch.device) -> None:
    for n, k in FP32_SHAPES:
        generator = torch.Generator(device).manual_seed(0)
        x, w = normal(300, n, k, torch.float32, generator)
        assert_close(matmul(x, w), x, w)
        tf32 = x.view(torch.int32).bitwise_and(-(1 << 13)).view(torch.float32)
        with pytest.raises(AssertionError, match="error"):
            assert_close(matmul(tf32, w), x, w)
        x, w, expected = inputs(torch.float32, n, k, 300)
        for m in FP32_SIZES:
            assert same(matmul(x[-m:], w), expected[-m:]), f"{m} rows"


def test_nothing_of_something(device: torch.device) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    assert matmul(zeros(0, 64), zeros(32, 64)).shape == (0, 32)
    assert matmul(zeros(4, 64), zeros(0, 64)).shape == (4, 0)
    bias = torch.arange(32, device=device).bfloat16()
    assert same(matmul(zeros(4, 0), zeros(32, 0), bias), bias.expand(4, -1))
    assert same(matmul(zeros(2, 3, 0), zeros(32, 0)), zeros(2, 3, 32))
    assert batched_matmul(zeros(0, 4, 8), zeros(0, 8, 5)).shape == (0, 4, 5)
    assert same(batched_matmul(zeros(2, 4, 0), zeros(2, 0, 5)), zeros(2, 4, 5))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 64, dtype=torch.int8)}, "x is torch.int8"),
    ({"x": torch.zeros(4, 64, dtype=torch.float64)}, "x is torch.float64"),
    ({"x": torch.tensor(1.0).half()}, r"x \(\) and w \(32, 64\) do not agree on K"),
    ({"x": torch.zeros(4, 63).half()}, r"x \(4, 63\) and w \(32, 64\) do not agree on K"),
    ({"w": torch.zeros(64).half()}, r"w \(64,\) do not agree on K"),
    ({"w": torch.zeros(1, 32, 64).half()}, r"w \(1, 32, 64\) do not agree on K"),
    ({"w": torch.zeros(32, 64)}, "w is torch.float32 on cuda:0, but x is torch.float16"),
    ({"bias": torch.zeros(31).half()}, r"bias has shape \(31,\); it must be \[32\]"),
    ({"bias": torch.zeros(1, 32).half()}, r"bias has shape \(1, 32\)"),
    ({"bias": torch.zeros(32)}, "bias is torch.float32"),
    ({"out": torch.zeros(4, 31).half()}, r"out is torch.float16 \(4, 31\).* must be torch.float16 \[4, 32\]"),
    ({"out": torch.zeros(4, 32)}, r"out is torch.float32"),
    ({"out": torch.zeros(32, 4).half().t()}, "contiguous along N"),
    ({"segments": 0}, "segments is 0"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_refuses_what_it_cannot_do(changed: dict[str, Any], message: str, device: torch.device) -> None:
    arguments = {"x": torch.zeros(4, 64).half(), "w": torch.zeros(32, 64).half()} | changed
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        matmul(**moved)


def test_refuses_other_devices(device: torch.device) -> None:
    x, w = torch.zeros(4, 64).half(), torch.zeros(32, 64).half()
    for arguments in ((x, w.to(device)), (x.to(device), w), (x.to(device), w.to(device), torch.zeros(32).half())):
        with pytest.raises(ValueError, match="on cpu"):
            matmul(*arguments)
    with pytest.raises(ValueError, match="x is on cpu"):
        matmul(x, w)
    with pytest.raises(ValueError, match=r"out is .* on cpu"):
        matmul(x.to(device), w.to(device), out=torch.zeros(4, 32).half())
    for a, b in ((x, w), (x[None], w), (x.expand(2, 4, 64), w.t().expand(3, 64, 32)), (x[None], w[None])):
        with pytest.raises(ValueError, match=r"a and b must be|a .* and b .* do not agree on K"):
            batched_matmul(a.to(device), b.to(device))


if __name__ == "__main__":
    compile_part(int(sys.argv[1]), int(sys.argv[2]))
