# ruff: noqa: E402 (torch comes with the extras alone)
"""Every row kernel at real widths and batch sizes: a row's bytes are those it has in any other batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.triton_kernels.activation import gelu, gelu_and_mul, quick_gelu, silu_and_mul
from vllm_deterministic.triton_kernels.layer_norm import layer_norm
from vllm_deterministic.triton_kernels.mean import mean
from vllm_deterministic.triton_kernels.rms_norm import fused_add_rms_norm, rms_norm
from vllm_deterministic.triton_kernels.rotary_embedding import (
    qk_norm_rotary_embedding,
    qk_rotary_embedding,
    rotary_embedding,
)
from vllm_deterministic.triton_kernels.soft_cap import soft_cap
from vllm_deterministic.triton_kernels.softmax import log_softmax, softmax
from vllm_deterministic.triton_kernels.top_k import top_k
from vllm_deterministic.triton_kernels.top_p import top_p_mass

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 1000, 4096, 8192)
# Elements of the largest batch.
LARGEST = 1 << 28
EPSILON = 1e-6
# Elements of poison before and after an output.
MARGIN = 4096
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Op:
    """An operation on rows ``x`` with a weight ``w``, and the widths that models bring it."""

    name: str
    widths: tuple[int, ...]
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | Outputs]
    largest: int = 8192

    def __call__(self, x: torch.Tensor) -> Outputs:
        weight = torch.linspace(-1.0, 2.0, x.shape[-1], device=x.device).to(x.dtype)
        result = self.call(x, weight)
        return result if isinstance(result, tuple) else (result,)


HIDDEN = (128, 1, 17, 1024, 2880, 4096, 5120, 16384, 32768)
VOCABULARY = (151936, 128, 14336, 16384, 32003)
OPS = (
    Op("rms_norm", HIDDEN, lambda x, w: rms_norm(x, w, EPSILON)),
    Op("gemma_rms_norm", (4096,), lambda x, w: rms_norm(x, w, EPSILON, weight_offset=1.0)),
    Op("fused_add_rms_norm", HIDDEN, lambda x, w: fused_add_rms_norm(x, x, w, EPSILON)),
    Op("layer_norm", (4096, 128, 1024, 5120, 32768), lambda x, w: layer_norm(x, w, w, EPSILON)),
    Op("silu_and_mul", (28672, 34, 256, 6144), lambda x, w: silu_and_mul(x)),
    Op("gelu_and_mul", (28672,), lambda x, w: gelu_and_mul(x)),
    Op("gelu_tanh", (4096,), lambda x, w: gelu(x, "tanh")),
    Op("quick_gelu", (4096,), lambda x, w: quick_gelu(x)),
    Op("soft_cap", (*VOCABULARY, 50257), lambda x, w: soft_cap(x, 30.0), 1000),
    Op("mean", (4096, 5120, 151936), lambda x, w: mean(x, -1), 1000),
    Op("softmax", VOCABULARY, lambda x, w: softmax(x), 1000),
    Op("log_softmax", VOCABULARY, lambda x, w: log_softmax(x), 1000),
    Op("top_p_mass", VOCABULARY[:2], lambda x, w: top_p_mass(x.float().softmax(-1)), 256),
    Op("top_20", VOCABULARY[:2], lambda x, w: top_k(x, 20), 256),
    Op("top_1000", VOCABULARY[:1], lambda x, w: top_k(x, 1000), 17),
)
# Every width in bf16, the first one in the other dtypes.
CASES = [
    pytest.param(op, width, dtype, id=f"{op.name}-{width}-{dtype}".replace("torch.", ""))
    for op in OPS
    for dtype in DTYPES
    for width in (op.widths if dtype == torch.bfloat16 else op.widths[:1])
]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes, compared on the device."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def spread(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random rows whose magnitudes lie far apart, so that another order of additions shows."""
    generator = torch.Generator(device).manual_seed(width)
    x = torch.randn(rows, width, device=device, generator=generator)
    return (x * torch.exp2(torch.rand(width, device=device, generator=generator) * 8 - 6)).to(dtype)


def mixture(size: int, kept: int, device: torch.device) -> torch.Tensor:
    """For each row of a batch which kept one it is, or -1 where it is hostile; at least one is kept."""
    generator = torch.Generator().manual_seed(size)
    index = torch.randint(kept, (size,), generator=generator)
    index[torch.rand(size, generator=generator) < 0.5] = -1
    index[int(torch.randint(size, (1,), generator=generator))] = size % kept
    return index.to(device)


def batch(kept: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of ``index``; the hostile ones are NaN, infinite, zero or huge."""
    x, hostile = kept[index], (index < 0).nonzero().flatten()
    contents = (math.nan, math.inf, 0.0, -math.inf, torch.finfo(kept.dtype).max)
    for number, content in enumerate(contents):
        x[hostile[number :: len(contents)]] = content
    return x


@pytest.mark.parametrize(("op", "width", "dtype"), CASES)
def test_rows_keep_their_bytes(op: Op, width: int, dtype: torch.dtype, device: torch.device) -> None:
    # A tile has up to 64 rows; more rows than that take every place in it.
    kept = spread(67 if width < 100000 else 5, width, dtype, device)
    alone = [torch.cat(parts) for parts in zip(*(op(row) for row in kept.split(1)), strict=True)]
    for size in (size for size in SIZES if size <= min(op.largest, LARGEST // width)):
        index = mixture(size, len(kept), device)
        places = (index >= 0).nonzero().flatten()
        for out, expected in zip(op(batch(kept, index)), alone, strict=True):
            assert same(out[places], expected[index[places]]), f"{size} rows"


@pytest.mark.parametrize("op", [op for op in OPS if op.name != "top_1000"], ids=lambda op: op.name)
def test_views_keep_their_bytes(op: Op, device: torch.device) -> None:
    for width in (128, 72, 34):
        x = spread(70, width, torch.bfloat16, device)
        expected = op(x)
        for before, after in ((0, 8), (8, 16), (3, 5), (1, 64)):
            packed = torch.full((70, before + width + after), math.nan, dtype=x.dtype, device=device)
            view = packed[:, before : before + width]
            view.copy_(x)
            for out, wanted in zip(op(view), expected, strict=True):
                assert same(out, wanted), f"{width} columns between {before} and {after} others"


@each_op
def test_nothing_is_written_but_the_output(op: Op, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = spread(33, op.widths[-1], torch.bfloat16, device)
    kept = x.clone()
    expected = op(x)
    buffers = []

    def between_poison(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffers.append(torch.full((math.prod(shape) + 2 * MARGIN,), 77, dtype=dtype, device=device))
        return buffers[-1][MARGIN:-MARGIN].view(shape)

    monkeypatch.setattr(torch, "empty", between_poison)
    for out, wanted in zip(op(x), expected, strict=True):
        assert same(out, wanted)
    assert buffers
    for buffer in buffers:
        assert bool((buffer[:MARGIN] == 77).all() & (buffer[-MARGIN:] == 77).all())
    assert same(x, kept)


@each_op
def test_a_captured_graph_gives_the_same_bytes(op: Op, device: torch.device) -> None:
    x = spread(17, op.widths[0], torch.bfloat16, device)
    expected = op(x)
    static = torch.zeros_like(x)
    op(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The second call starts while the first one ends.
        op(static)
        outs = op(static)
    for _ in range(3):
        static.copy_(x)
        graph.replay()
        for out, wanted in zip(outs, expected, strict=True):
            assert same(out, wanted)
        static.zero_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("size", "rotary_dim"), [(128, 128), (80, 80), (256, 64)])
def test_rotary_embedding(size: int, rotary_dim: int, neox: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Tokens keep their bytes, and the fused roads give those of the chain that they replace."""
    kept = spread(67, 16 * size, dtype, device)
    cache = torch.randn(100, rotary_dim, device=device).to(dtype)
    weights = torch.randn(2, size, device=device).to(dtype)

    def roads(x: torch.Tensor, positions: torch.Tensor) -> tuple[Outputs, ...]:
        q, k, _ = x.split([12 * size, 2 * size, 2 * size], dim=-1)
        return (
            qk_rotary_embedding(positions, q, k, cache, size, neox),
            *(
                qk_norm_rotary_embedding(positions, q, k, *weights, EPSILON, cache, size, neox, offset)
                for offset in (0.0, 1.0)
            ),
        )

    def chain(x: torch.Tensor, weight: torch.Tensor | None, offset: float, positions: torch.Tensor) -> torch.Tensor:
        if weight is not None:
            x = rms_norm(x.reshape(len(x), -1, size), weight, EPSILON, weight_offset=offset).flatten(1)
        return rotary_embedding(positions, x, cache, size, neox)

    rows = torch.arange(67, device=device)
    alone = [
        [torch.cat(x) for x in zip(*road, strict=True)]
        for road in zip(*(roads(kept[row : row + 1], rows[row : row + 1]) for row in range(67)), strict=True)
    ]
    q, k = kept[:, : 12 * size], kept[:, 12 * size : 14 * size]
    for road, scales, offset in zip(alone, ((None, None), weights, weights), (0.0, 0.0, 1.0), strict=True):
        for out, x, weight in zip(road, (q, k), scales, strict=True):
            assert same(out, chain(x, weight, offset, rows))
    for count in SIZES:
        index = mixture(count, 67, device)
        places = (index >= 0).nonzero().flatten()
        for road, expected in zip(roads(batch(kept, index), index.clamp(min=0)), alone, strict=True):
            for out, wanted in zip(road, expected, strict=True):
                assert same(out[places], wanted[index[places]]), f"{count} tokens"
