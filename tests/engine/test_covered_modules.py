"""The walk over a built model: every part is named with what covers it, and each planted fault is found."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models import qwen3 as qwen3_model
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.sample.sampler import Sampler

from vllm_deterministic.engine import covered_modules, plugin, show_coverage
from vllm_deterministic.engine.attention import DeterministicCPUAttentionImpl
from vllm_deterministic.engine.config import RefusalError
from vllm_deterministic.engine.coverage import Entry
from vllm_deterministic.engine.cpu import DeterministicCPUWorker
from vllm_deterministic.engine.cuda_attention import DeterministicCUDAAttentionImpl
from vllm_deterministic.engine.devices import CPU, CUDA
from vllm_deterministic.engine.sampling import DeterministicSampler

plugin.register()


class Built:
    """A model as a deterministic engine builds it, without weights."""

    def __init__(self, model: torch.nn.Module, config: VllmConfig) -> None:
        self.model, self.config = model, config

    def gaps(self, sampler: type = DeterministicSampler) -> list[str]:
        entries = covered_modules.walk(self.model, self.config, sampler, CPU)
        return [entry.refusal for entry in entries if entry.covered_by is None]


@pytest.fixture
def built(qwen3: Path) -> Iterator[Built]:
    arguments = EngineArgs(model=str(qwen3), dtype="float32", additional_config={"deterministic": True})
    config = arguments.create_engine_config()
    DeterministicCPUWorker.prepare()
    with show_coverage._one_rank(config):
        yield Built(show_coverage._on_meta_device(config), config)


def test_every_part_is_named(built: Built) -> None:
    assert built.gaps() == []
    entries = covered_modules.walk(built.model, built.config, DeterministicSampler, CPU)
    assert {entry.part for entry in entries} == {
        "model",
        "modules",
        "attention",
        "sampler",
        "collectives",
        "compilation",
    }
    named = {name for entry in entries for name in entry.modules}
    leaves = {name for name, module in built.model.named_modules() if not any(True for _ in module.children())}
    assert leaves <= named
    assert "model.layers.1.mlp.act_fn" in named


class UnprovenRotation(RotaryEmbedding):
    """A rotation that nobody has looked at; it holds another module."""


def _unknown_layer(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.model.model.norm = torch.nn.LayerNorm(128)


def _unknown_operation_around_others(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = built.model.model.layers[0].self_attn
    # vLLM keeps the original for all models of the process.
    attention.rotary_emb = copy.copy(attention.rotary_emb)
    attention.rotary_emb.__class__ = UnprovenRotation


def _norm_of_vllm(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "forward_native", lambda self, x, residual=None: x)


def _quantized_linear(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.model.model.layers[1].mlp.down_proj.quant_method = SimpleNamespace()


def _other_attention(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.model.model.layers[1].self_attn.attn.impl = SimpleNamespace()


def _two_ranks(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(world_size=2))


def _unproven_pass(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.config.compilation_config.pass_config.enable_qk_norm_rope_fusion = True


def _pass_of_the_user(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.config.compilation_config.inductor_passes["mine"] = "a.b"


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (_unknown_layer, "LayerNorm (module model.norm, 1 in all) is not covered: it has no deterministic"),
        (_unknown_operation_around_others, "UnprovenRotation (module model.layers.0.self_attn.rotary_emb, 1 in all)"),
        (
            _norm_of_vllm,
            "RMSNorm (module model.layers.0.self_attn.q_norm, 9 in all) is not covered: its forward_native",
        ),
        (_quantized_linear, "RowParallelLinear (module model.layers.1.mlp.down_proj, 1 in all)"),
        (_other_attention, "SimpleNamespace (module model.layers.1.self_attn.attn, 1 in all)"),
        (_two_ranks, "tensor parallel group of 2 is not covered"),
        (_unproven_pass, '--compilation-config \'{"pass_config": {"enable_qk_norm_rope_fusion": false}}\''),
        (_pass_of_the_user, "mine is not covered"),
    ],
)
def test_planted_fault_is_found(
    plant: Callable[[Built, pytest.MonkeyPatch], None], what: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(built, monkeypatch)
    (gap,) = built.gaps()
    assert what in gap


def test_sampler_of_vllm_is_found(built: Built) -> None:
    (gap,) = built.gaps(sampler=Sampler)
    assert gap.startswith("Sampler is not covered: it is not the deterministic one")


_ON_A_GPU = """
import os
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
from types import SimpleNamespace
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm_deterministic.engine import covered_modules, patches
from vllm_deterministic.engine.devices import CUDA

def gaps():
    rules = covered_modules._rules(CUDA)
    replaced = (*covered_modules._ROTATIONS, covered_modules.layernorm.RMSNorm, covered_modules.activation.SiluAndMul)
    found = [kind.__name__ for kind in replaced if rules[kind].missing(object.__new__(kind))]
    methods = [SimpleNamespace(quant_method=object.__new__(kind)) for kind in covered_modules._UNQUANTIZED]
    found += [type(m.quant_method).__name__ for m in methods if covered_modules._linear_missing_on_gpu(m)]
    return found + [covered_modules.sampler_entry(Sampler, CUDA).why]

assert len(gaps()) == 9, gaps()
patches.apply(patches.CUDA_WORKER)
assert gaps() == [""], gaps()
for patch in patches.CUDA_SAMPLING:
    owner, name = patches._place(patch)
    patched = getattr(owner, name)
    setattr(owner, name, object())
    assert gaps() == [f"{patch.target} is not the deterministic one"], gaps()
    setattr(owner, name, patched)
assert gaps() == [""], gaps()
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "1"
patches.apply(patches.CUDA_WORKER)
assert gaps() == ["FlashInfer's sampler is switched on"]
"""


def test_what_is_not_in_place_on_a_gpu_is_found(tmp_path: Path) -> None:
    """In a process of its own, whose vLLM gets the patches of the other device."""
    subprocess.run([sys.executable, "-c", _ON_A_GPU], check=True, cwd=tmp_path)


def _attention_entry(impl: Any) -> Entry:
    layer = object.__new__(covered_modules.Attention)
    torch.nn.Module.__init__(layer)
    layer.impl = impl
    (entry,) = covered_modules.module_entries(torch.nn.Sequential(layer), CUDA)
    return entry


@pytest.mark.parametrize("other", [DeterministicCPUAttentionImpl, FlashAttentionImpl])
def test_attention_of_another_backend_is_found(other: type) -> None:
    ours = object.__new__(DeterministicCUDAAttentionImpl)
    assert _attention_entry(ours).covered_by is not None
    assert f"attention by {other.__name__} is not the deterministic one" in _attention_entry(object.__new__(other)).why


class UnprovenNorm(RMSNorm):
    """A norm that nobody has looked at."""


def test_engine_with_an_uncovered_layer(
    qwen3: Path, start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(qwen3_model, "RMSNorm", UnprovenNorm)
    with pytest.raises(RefusalError, match=r"UnprovenNorm .* is not covered: it has no deterministic implementation"):
        start(qwen3)
    accepted = {"allow_uncovered": True, "coverage_file": str(tmp_path / "coverage.json")}
    engine = start(qwen3, additional_config={"deterministic": accepted})
    coverage = json.loads(engine.collective_rpc("deterministic_coverage")[0])
    assert not coverage["deterministic"]
    assert [entry["name"] for entry in coverage["entries"] if entry["covered_by"] is None] == ["UnprovenNorm"]
    assert coverage["fingerprint"]["value"].startswith("not-deterministic-")
    assert json.loads((tmp_path / "coverage.json").read_text()) == coverage
