"""What of the road on GPUs runs without one: the switch, the shapes compilers see, the layers, the order of ties."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm_deterministic.triton_kernels import reference
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan

from vllm_deterministic.engine import cuda_linear, cuda_ops, layers
from vllm_deterministic.engine.config import RefusalError
from vllm_deterministic.engine.cuda_linear import PlannedMatmul
from vllm_deterministic.engine.cuda_sampling import TorchWithOrderedTopk

ops = torch.ops.vllm_deterministic


def test_only_what_is_refused_reads_the_switch_on_import() -> None:
    """The worker switches on vLLM's batch-invariant mode, which is after many modules were imported."""
    package = Path(vllm.__file__).parent
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "VLLM_BATCH_INVARIANT" in (text := path.read_text()) and any(_reads_on_import(ast.parse(text)))
    }
    assert readers == {
        "lora/ops/triton_ops/utils.py",
        "v1/attention/ops/triton_unified_attention.py",
        "v1/attention/ops/triton_unified_attention_diffkv.py",
    }


def _reads_on_import(node: ast.AST) -> Iterator[bool]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield isinstance(child, ast.Attribute) and child.attr == "VLLM_BATCH_INVARIANT"
            yield from _reads_on_import(child)


_SWITCH = """
import os, vllm.envs
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import LLM
vllm.envs.enable_envs_cache()  # as after the start of an earlier engine
assert not vllm.envs.VLLM_BATCH_INVARIANT
from vllm_deterministic.engine.cuda import switch_on_guards
assert not vllm.envs.VLLM_BATCH_INVARIANT
switch_on_guards()
vllm.envs.enable_envs_cache()
assert vllm.envs.VLLM_BATCH_INVARIANT and not vllm.envs.VLLM_USE_FLASHINFER_SAMPLER
assert not vllm.envs.VLLM_USE_BREAKABLE_CUDAGRAPH
"""


def test_switch_in_a_process_that_has_served(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _SWITCH], check=True, cwd=tmp_path)


def test_shape_without_a_plan_names_the_way_out() -> None:
    with pytest.raises(RuntimeError, match=r"weight of shape \[96, 64\] in torch.bfloat16.*another process"):
        PlannedMatmul.run(torch.zeros(1, 64).bfloat16(), torch.zeros(96, 64).bfloat16(), None)


def test_a_product_follows_the_plan_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plans = {(dtype, 96, k): f"{dtype} {k}" for dtype in (torch.float32, torch.bfloat16) for k in (64, 128)}
    monkeypatch.setattr(PlannedMatmul, "plans", plans)
    monkeypatch.setattr(cuda_linear, "matmul", lambda x, w, bias, **given: calls.append((len(x), bias, given)))
    for (dtype, n, k), plan in plans.items():
        bias = torch.zeros(n, dtype=dtype)
        PlannedMatmul.run(torch.zeros(5, k, dtype=dtype), torch.zeros(n, k, dtype=dtype), bias)
        assert calls.pop() == (5, bias, {"plan": plan})


def _model() -> torch.nn.Module:
    """Two layers of one shape, one with a bias, and an embedding that is the LM head too."""

    def layer(method: type, n: int, k: int, bias: bool = False) -> torch.nn.Module:
        module = torch.nn.Linear(k, n, bias=bias).requires_grad_(False)
        module.quant_method = object.__new__(method)  # type: ignore[assignment]
        return module

    return torch.nn.Sequential(
        layer(UnquantizedLinearMethod, 96, 64),
        layer(UnquantizedLinearMethod, 96, 64),
        layer(UnquantizedLinearMethod, 96, 64, bias=True),
        layer(UnquantizedEmbeddingMethod, 500, 64),
        torch.nn.LayerNorm(64),
    )


def test_every_shape_is_certified_and_every_tile_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, launched = [], []

    def plans(shapes: list[tuple[int, int]], dtype: torch.dtype, device: object, progress: object) -> dict[Any, Any]:
        asked.append((shapes, dtype))
        return {
            (n, k): TilePlan(n, k, 1, ((16, Tile(16, 16, 16, 1, 1)), (64, Tile(32, 16, 16, 1, 1)))) for n, k in shapes
        }

    def run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, **settings: Any) -> None:
        launched.append((len(w), bias is not None, len(x), settings["plan"].tile(len(x)).block_m))

    monkeypatch.setattr(PlannedMatmul, "plans", {})
    monkeypatch.setattr(cuda_linear, "certified_plans", plans)
    monkeypatch.setattr(cuda_linear, "matmul", run)
    cuda_linear.certify(_model(), torch.device("cpu"), max_rows=1000)
    assert asked == [([(96, 64), (500, 64)], torch.float32)]
    variants = [(96, False), (96, True), (500, False)]
    assert launched == [(n, bias, m, block) for n, bias in variants for m, block in ((1, 16), (17, 32))]
    launched.clear()
    cuda_linear.certify(_model(), torch.device("cpu"), max_rows=16)
    assert {m for _, _, m, _ in launched} == {1}


def test_shape_without_a_tile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> None:
        raise ValueError("no tile is left for N=96, K=64")

    monkeypatch.setattr(cuda_linear, "certified_plans", none_left)
    with pytest.raises(RefusalError, match="linear layers: no tile is left for N=96, K=64"):
        cuda_linear.certify(_model(), torch.device("cpu"), max_rows=16)


def test_compilers_see_the_shapes_that_kernels_give() -> None:
    """Views of a packed projection go in, contiguous rows come out."""
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(3, 64), torch.empty(96, 64)
        qkv = ops.matmul(x, w, torch.empty(96))
        q, k, _ = qkv.split([64, 16, 16], dim=-1)
        positions, cache, weight = torch.empty(3, dtype=torch.int64), torch.empty(100, 16), torch.empty(16)
        rotated = (
            *ops.qk_rotary_embedding(positions, q, k, cache, 16, True),
            *ops.qk_norm_rotary_embedding(positions, q, k, weight, weight, 1e-6, cache, 16, True, 0.0),
        )
        assert qkv.shape == (3, 96)
        assert [(t.shape, t.stride()) for t in rotated] == [((3, 64), (64, 1)), ((3, 16), (16, 1))] * 2


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the GPU's operations here, on the reference."""

    def rotary(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
        return tuple(reference.rotary_embedding(positions, x.contiguous(), *settings) for x in (q, k))

    def norm_rotary(
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: Any,
        k_weight: Any,
        epsilon: float,
        cache: torch.Tensor,
        head_size: int,
        is_neox_style: bool,
        weight_offset: float,
    ) -> tuple[torch.Tensor, ...]:
        assert weight_offset == 0.0
        heads = [
            reference.rms_norm(x.unflatten(-1, (-1, len(weight))), weight, epsilon).flatten(-2)
            for x, weight in ((q, q_weight), (k, k_weight))
        ]
        return rotary(positions, *heads, cache, head_size, is_neox_style)

    library = torch.library.Library("vllm_deterministic", "IMPL")
    library.impl("qk_rotary_embedding", rotary, "CPU")
    library.impl("qk_norm_rotary_embedding", norm_rotary, "CPU")
    library.impl("matmul", torch.nn.functional.linear, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("on_cpu")
def test_layers_compute_what_those_of_the_cpu_do() -> None:
    """The replaced methods hand every argument to its place: same bytes as norm, norm, rotation one by one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    positions, cache = torch.tensor([3, 1, 4]), random(100, 16)
    rotary = SimpleNamespace(head_size=16, is_neox_style=True, _match_cos_sin_cache_dtype=lambda query: cache)
    norms = [SimpleNamespace(weight=torch.nn.Parameter(random(16)), variance_epsilon=1e-3) for _ in range(2)]
    packed = random(3, 96)
    attention = SimpleNamespace(
        qkv_proj=lambda x: (packed, None),
        q_size=64,
        kv_size=16,
        q_norm=norms[0],
        k_norm=norms[1],
        rotary_emb=rotary,
        attn=lambda *qkv: torch.cat(qkv, dim=-1),
        o_proj=lambda x: (x, None),
    )
    q, k, v = packed.split([64, 16, 16], dim=-1)
    normal = [
        reference.rms_norm(x.unflatten(-1, (-1, 16)), norm.weight.data, 1e-3).flatten(-2)
        for x, norm in zip((q, k), norms, strict=True)
    ]
    expected = torch.cat([*layers.rotary_embedding_forward(rotary, positions, *normal), v], dim=-1)  # type: ignore[list-item]
    assert torch.equal(layers.qk_norm_attention_forward(attention, positions, packed), expected)
    both = layers.fused_rotary_embedding_forward(rotary, positions, *normal)
    assert torch.equal(torch.cat([*both, v], dim=-1), expected)  # type: ignore[list-item]
    weight, bias = random(8, 96), random(8)
    applied = layers.linear_apply(None, SimpleNamespace(weight=weight), packed, bias)  # type: ignore[arg-type]
    assert torch.equal(applied, torch.nn.functional.linear(packed, weight, bias))


def test_ops_are_implemented_for_gpus() -> None:
    assert cuda_ops is not None
    for name in ("matmul", "rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding", "qk_rotary_embedding"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_deterministic::{name}", "CUDA"), name


@pytest.mark.parametrize("make", [torch.Tensor.bfloat16, torch.Tensor.float])
def test_ties_of_top_logprobs_go_to_the_lower_id(
    make: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = TorchWithOrderedTopk(torch)
    logits = make(torch.randint(-3, 3, (7, 500), generator=torch.Generator().manual_seed(0)))
    expected = logits.float().sort(dim=-1, descending=True, stable=True)
    for chunk in (1, 1000, 1 << 22):
        monkeypatch.setattr(TorchWithOrderedTopk, "CHUNK", chunk)
        for k in (1, 20, 500):
            top = ordered.topk(logits, k, dim=-1)
            assert torch.equal(top.indices, expected.indices[:, :k])
            assert torch.equal(top.values, expected.values[:, :k])
    assert ordered.cat is torch.cat
