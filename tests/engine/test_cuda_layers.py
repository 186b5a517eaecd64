"""The layers of the dense architectures on a GPU: what vLLM's compute, in our kernels, which run interpreted here."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import activation
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding, RotaryEmbedding
from vllm_deterministic.triton_kernels import activation as activation_kernels
from vllm_deterministic.triton_kernels.layer_norm import layer_norm
from vllm_deterministic.triton_kernels.rotary_embedding import qk_norm_rotary_embedding, qk_rotary_embedding
from vllm_deterministic.triton_kernels.soft_cap import soft_cap

from vllm_deterministic.engine import cuda_ops, layers

from ..gpu.models import ARCHITECTURES
from ..triton_kernels.interpreter import interpreting
from ..triton_kernels.invariance import assert_batch_invariant, assert_same_bytes

# The interpreter computes with numpy, which warns of the infinite neighbours.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ops = torch.ops.vllm_deterministic
WIDTH = 48
DTYPES = (torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """Run the GPU's operations here."""
    library = torch.library.Library("vllm_deterministic", "IMPL")
    for name, launcher in {
        "layer_norm": layer_norm,
        "gelu": activation_kernels.gelu,
        "gelu_and_mul": activation_kernels.gelu_and_mul,
        "gemma_rms_norm": cuda_ops._gemma_rms_norm,
        "fused_add_gemma_rms_norm": cuda_ops._fused_add_gemma_rms_norm,
        "soft_cap": soft_cap,
        "qk_rotary_embedding": qk_rotary_embedding,
        "qk_norm_rotary_embedding": qk_norm_rotary_embedding,
    }.items():
        library.impl(name, launcher, "CPU")
    with interpreting(), set_current_vllm_config(VllmConfig()):
        yield
    library._destroy()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _with_weights(layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = (_random(number + 1, WIDTH)[-1] + 1).to(dtype)
    return layer.requires_grad_(False)


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., Any], int]] = {
    "GemmaRMSNorm": (lambda: GemmaRMSNorm(WIDTH), layers.gemma_rms_norm_forward, 1),
    "GemmaRMSNorm with a residual": (lambda: GemmaRMSNorm(WIDTH), layers.gemma_rms_norm_forward, 2),
    "LayerNorm": (lambda: LayerNorm(WIDTH), layers.layer_norm_forward, 1),
    "LayerNorm without a bias": (lambda: LayerNorm(WIDTH, bias=False), layers.layer_norm_forward, 1),
    "GeluAndMul": (activation.GeluAndMul, layers.gelu_and_mul_forward, 1),
    "GeluAndMul by tanh": (lambda: activation.GeluAndMul("tanh"), layers.gelu_and_mul_forward, 1),
    "NewGELU": (activation.NewGELU, layers.gelu_tanh_forward, 1),
    "FastGELU": (activation.FastGELU, layers.gelu_tanh_forward, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to vLLM's own forward in fp32, and a row's bytes are its own."""
    # On CPU vLLM does not build what these are on a GPU.
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(gelu_new=None, gelu_fast=None))
    make, forward, inputs = LAYERS[name]
    layer = _with_weights(make(), dtype)
    rows = [_random(5 + i, WIDTH)[:5].to(dtype) for i in range(inputs)]
    actual = forward(layer, *rows)
    expected = _with_weights(layer, torch.float32).forward_native(*(x.float() for x in rows))
    _with_weights(layer, dtype)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    for out, wanted in zip(*((x if isinstance(x, tuple) else (x,)) for x in (actual, expected)), strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wanted, **tolerance)
    assert_batch_invariant(lambda *x: forward(layer, *x), *rows, sizes=(2, 7))


@pytest.mark.parametrize("max_model_len", [100, 1000])
def test_long_rope(max_model_len: int) -> None:
    """The short angles, and the long ones where the server's context is longer than the original one."""
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=max_model_len)  # type: ignore[assignment]
    factors = [1.0 + i for i in range(12)]
    with set_current_vllm_config(config):
        rotary = Phi3LongRoPEScaledRotaryEmbedding(
            32, 24, 1000, 100, 10000.0, True, torch.float32, factors, [5 * factor for factor in factors]
        )
    assert rotary.use_long_rope is (max_model_len == 1000)
    positions = torch.tensor([0, 7, 99])
    q, k, _ = _random(3, 128).split([64, 32, 32], dim=-1)
    expected = rotary(positions, q, k)
    for actual, wanted in zip(layers.long_rotary_embedding_forward(rotary, positions, q, k), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotImplementedError, match="offsets"):
        layers.long_rotary_embedding_forward(rotary, positions, q, k, torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_and_key_of_gemma(dtype: torch.dtype) -> None:
    """One launch gives the bytes of norm, norm, rotation."""
    norms = [GemmaRMSNorm(WIDTH, eps=1e-3) for _ in range(2)]
    for number, norm in enumerate(norms):
        norm.weight.data = _random(number + 1, WIDTH)[-1].to(dtype)
    rotary = RotaryEmbedding(WIDTH, WIDTH, 100, 10000.0, True, dtype)
    positions, packed = torch.tensor([3, 1, 4]), _random(3, 4 * WIDTH).to(dtype)
    attention = SimpleNamespace(
        qkv_proj=lambda x: (packed, None),
        q_size=2 * WIDTH,
        kv_size=WIDTH,
        q_norm=norms[0],
        k_norm=norms[1],
        rotary_emb=rotary,
        attn=lambda *qkv: torch.cat(qkv, dim=-1),
        o_proj=lambda x: (x, None),
    )
    q, k, v = packed.split([2 * WIDTH, WIDTH, WIDTH], dim=-1)
    normal = [
        layers.gemma_rms_norm_forward(norm, x.unflatten(-1, (-1, WIDTH))).flatten(-2)  # type: ignore[union-attr]
        for norm, x in zip(norms, (q, k), strict=True)
    ]
    rotated = layers.fused_rotary_embedding_forward(rotary, positions, *normal)
    actual = layers.qk_norm_attention_forward(attention, positions, packed, unused=None)
    assert_same_bytes(actual, torch.cat([*rotated, v], dim=-1), "query, key, value")  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap_of_a_padded_vocabulary(dtype: torch.dtype) -> None:
    """vLLM cuts the padding off, which leaves one row contiguous and several not."""
    processor = LogitsProcessor(61, scale=0.5, soft_cap=3.0)
    head = SimpleNamespace(
        quant_method=SimpleNamespace(apply=lambda lm_head, hidden, bias: 20 * hidden), tp_size=1, weight=None
    )
    hidden = _random(4, 64).to(dtype)
    actual = layers.logits_processor_forward(processor, head, hidden)  # type: ignore[arg-type]
    assert actual is not None
    torch.testing.assert_close(actual.float(), processor(head, hidden.float()), rtol=2e-3, atol=2e-3)
    for row in range(4):
        one = layers.logits_processor_forward(processor, head, hidden[row : row + 1])  # type: ignore[arg-type]
        assert one is not None
        assert_same_bytes(one[0], actual[row], f"row {row}")


def test_compilers_see_the_shapes_that_kernels_give() -> None:
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(3, 96)[:, :64], torch.empty(64)
        outs = (
            ops.layer_norm(x, w, w, 1e-5),
            ops.gelu(x, "tanh"),
            ops.soft_cap(x, 30.0),
            ops.gemma_rms_norm(x, w, 1e-5),
            *ops.fused_add_gemma_rms_norm(x, x, w, 1e-5),
        )
        assert [(t.shape, t.stride()) for t in outs] == [((3, 64), (64, 1))] * 6
        assert ops.gelu_and_mul(x, "tanh").shape == (3, 32)


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("gpt2", {"activation_function": "gelu"}),
    "MistralForCausalLM": ("mistral", {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16}}),
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """Of every architecture, then of the faults; see the script."""
    asked = [
        (name, kind, {"num_hidden_layers": 2, **settings})
        for name, (kind, settings) in (*ARCHITECTURES.items(), *FAULTS.items())
    ]
    command = [sys.executable, Path(__file__).with_name("walk_gpu_models.py"), json.dumps(asked)]
    result = subprocess.run(command, cwd=tmp_path_factory.mktemp("walk"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[dict[str, list[str]]] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_every_module_of_every_architecture_has_a_rule(walked: list[dict[str, list[str]]]) -> None:
    """But for the attention, which is that of the CPU here."""
    for architecture, found in zip(ARCHITECTURES, walked, strict=False):
        assert found["patched"] == ["CPUAttentionBackendImpl"], architecture


def test_a_compiler_has_nothing_to_fuse(walked: list[dict[str, list[str]]]) -> None:
    """Between the opaque operations lie sums and products that IEEE rounds in one way, each rounded before the next."""
    computed = {"GPT2LMHeadModel": ["add"] * 5, "Gemma3ForCausalLM": ["mul"], "Gemma2ForCausalLM": ["mul"]}
    for architecture, found in zip(ARCHITECTURES, walked, strict=False):
        assert found["computed"] == computed.get(architecture, []), architecture
        assert found["unrounded"] == [], architecture


def test_planted_faults_are_found(walked: list[dict[str, list[str]]]) -> None:
    gelu, scaled = walked[len(ARCHITECTURES) :]
    assert "GELU" in gelu["patched"]
    assert "gelu" in gelu["computed"]
    assert "MistralAttention" in scaled["patched"]
    assert {"log", "mul"} <= set(scaled["unrounded"])


def test_what_is_not_in_place_is_found(walked: list[dict[str, list[str]]]) -> None:
    plain = {architecture: set(found["plain"]) for architecture, found in zip(ARCHITECTURES, walked, strict=False)}
    assert {"GemmaRMSNorm", "GeluAndMul", "RotaryEmbedding", "LogitsProcessor"} <= plain["Gemma2ForCausalLM"]
    assert {"RMSNorm", "SiluAndMul", "Phi3LongRoPEScaledRotaryEmbedding"} <= plain["Phi3ForCausalLM"]
    assert {"LayerNorm", "NewGELU", "QKVParallelLinear", "ParallelLMHead"} <= plain["GPT2LMHeadModel"]
    assert "LogitsProcessor" not in plain["GPT2LMHeadModel"]
