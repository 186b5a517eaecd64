"""The walk over a loaded engine: for each part the deterministic implementation that is in place, or the lack of it.

A name alone covers nothing: every rule looks at whether the implementation really took the place of vLLM's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.distributed import parallel_state
from vllm.model_executor.custom_op import CustomOp, PluggableLayer
from vllm.model_executor.layers import activation, layernorm, linear, logits_processor, vocab_parallel_embedding
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
    common,
)
from vllm.model_executor.models.mistral import MistralAttention
from vllm.utils.import_utils import resolve_obj_by_qualname

from . import patches
from .config import FLAG
from .coverage import Entry
from .devices import CUDA, Device
from .requests import refused_in_requests
from .sampling import DeterministicSampler

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_WITHOUT_FLAG = f"serve this model without {FLAG}"
_NO_IMPLEMENTATION = "it has no deterministic implementation"
# These compute their table of angles in their own way, once, and rotate as the base class does.
_ROTATIONS = (RotaryEmbedding, Llama3RotaryEmbedding, LinearScalingRotaryEmbedding, YaRNScalingRotaryEmbedding)
_LINEAR = (
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
    linear.ReplicatedLinear,
    linear.RowParallelLinear,
    vocab_parallel_embedding.ParallelLMHead,
)
_UNQUANTIZED = (linear.UnquantizedLinearMethod, vocab_parallel_embedding.UnquantizedEmbeddingMethod)
# Of the passes that vLLM can switch on, those that find nothing to change in an unquantized model on one rank.
_PASSES = {
    "eliminate_noops": "it removes what computes nothing",
    "fuse_norm_quant": "no quantized operation to fuse",
    "fuse_act_quant": "no quantized operation to fuse",
    "fuse_attn_quant": "no quantized operation to fuse",
}


@dataclass(frozen=True)
class Rule:
    """What covers a class of modules, and a check that gives what is not in place, empty where all is."""

    covered_by: str
    missing: Callable[[Any], str] = lambda module: ""


def walk(model: torch.nn.Module, config: "VllmConfig", sampler: type, device: Device) -> tuple[Entry, ...]:
    """Every part of an engine with what covers it.

    Args:
        model: as vLLM built it.
        config: of the engine.
        sampler: class of the sampler that the model runner uses.
        device: the kind of device.
    """
    return (
        *(_architecture(name, device) for name in config.model_config.architectures if name in device.architectures),
        *module_entries(model, device),
        sampler_entry(sampler, device),
        *collective_entries(),
        *compilation_entries(config.compilation_config),
    )


def _architecture(name: str, device: Device) -> Entry:
    # How a model calls its layers is code of its own, which no rule about layers can see.
    refused = refused_in_requests([name], device)
    but = f"; requests for {', '.join(refused)} are refused" if refused else ""
    return Entry("model", name, covered_by=f"byte tests of this architecture on {device.name}{but}")


def module_entries(model: torch.nn.Module, device: Device) -> tuple[Entry, ...]:
    """The modules that compute, by class and what covers them, in the order of the model."""
    rules = _rules(device)
    found: dict[tuple[str, str, str | None, str], list[str]] = {}
    for name, module in model.named_modules():
        rule = rules.get(type(module))
        if rule is None:
            # A module that only holds others is part of the architecture.
            if any(True for _ in module.children()) and not isinstance(module, CustomOp | PluggableLayer):
                continue
            rule = Rule("", lambda module: _NO_IMPLEMENTATION)
        missing = rule.missing(module)
        part, what = ("attention", type(module.impl)) if hasattr(module, "impl") else ("modules", type(module))
        key = (part, what.__name__, None if missing else rule.covered_by, missing)
        found.setdefault(key, []).append(name or "the model")
    return tuple(
        Entry(part, what, covered_by, tuple(names), why=missing, option=_WITHOUT_FLAG if missing else "")
        for (part, what, covered_by, missing), names in found.items()
    )


def _rules(device: Device) -> dict[type, Rule]:
    on_gpu = device is CUDA
    linear_rule = Rule(
        "vllm_deterministic::matmul, certified tiles" if on_gpu else "vllm_deterministic::linear, certified tiles",
        _linear_missing_on_gpu if on_gpu else _linear_missing,
    )
    replaced = _forward_missing("forward_native", "forward_cuda" if on_gpu else "forward_cpu")
    rotation = "vllm_deterministic::qk_rotary_embedding" if on_gpu else "vllm_deterministic::rotary_embedding"
    return {
        **dict.fromkeys(_LINEAR, linear_rule),
        vocab_parallel_embedding.VocabParallelEmbedding: replace(
            linear_rule, covered_by=f"computes nothing; as LM head {linear_rule.covered_by}"
        ),
        **dict.fromkeys(_ROTATIONS, Rule(rotation, replaced)),
        layernorm.RMSNorm: Rule("vllm_deterministic::rms_norm", replaced),
        activation.SiluAndMul: Rule("vllm_deterministic::silu_and_mul", replaced),
        Attention: Rule(
            "fixed-split KV, one fold" if on_gpu else "fixed-split KV, certified tiles", _attention_missing(device)
        ),
        common.ApplyRotaryEmb: Rule("not called: the embedding around it rotates"),
        logits_processor.LogitsProcessor: Rule("the LM head's product", _soft_cap_missing),
        MistralAttention: Rule("calls layers that are covered", _attention_scale),
        torch.nn.Identity: Rule("computes nothing"),
        **(_gpu_rules() if on_gpu else {}),
    }


def _gpu_rules() -> dict[type, Rule]:
    replaced = _forward_missing("forward_native", "forward_cuda")
    return {
        layernorm.GemmaRMSNorm: Rule("vllm_deterministic::gemma_rms_norm", replaced),
        layernorm.LayerNorm: Rule("vllm_deterministic::layer_norm", replaced),
        activation.GeluAndMul: Rule("vllm_deterministic::gelu_and_mul", replaced),
        activation.NewGELU: Rule("vllm_deterministic::gelu", replaced),
        activation.FastGELU: Rule("vllm_deterministic::gelu", replaced),
        Phi3LongRoPEScaledRotaryEmbedding: Rule("vllm_deterministic::qk_rotary_embedding", _forward_missing("forward")),
        torch.nn.Embedding: Rule("computes nothing"),
    }


def _soft_cap_missing(module: Any) -> str:
    if module.soft_cap is None or getattr(type(module).forward, "_deterministic_patch", False):
        return ""
    return "its soft cap is not the deterministic one"


def _attention_scale(module: Any) -> str:
    return "it scales queries by their position, which is not proven" if module.do_llama_4_scaling else ""


def _forward_missing(*methods: str) -> Callable[[Any], str]:
    def missing(module: Any) -> str:
        for method in methods:
            if not getattr(getattr(type(module), method), "_deterministic_patch", False):
                return f"its {method} is not the deterministic one"
        return ""

    return missing


def _linear_missing(module: Any) -> str:
    method = type(module.quant_method)
    return "" if method in _UNQUANTIZED else f"{method.__name__} has no deterministic implementation"


def _linear_missing_on_gpu(module: Any) -> str:
    if missing := _linear_missing(module):
        return missing
    replaced = getattr(type(module.quant_method).apply, "_deterministic_patch", False)
    return "" if replaced else "its product is not the deterministic one"


def _attention_missing(device: Device) -> Callable[[Any], str]:
    _, backend = device.attention_backend
    ours = resolve_obj_by_qualname(backend).get_impl_cls()

    def missing(module: Any) -> str:
        kind = type(module.impl)
        return "" if kind is ours else f"attention by {kind.__name__} is not the deterministic one"

    return missing


def sampler_entry(sampler: type, device: Device) -> Entry:
    """What covers the sampler that a model runner uses."""
    missing = _sampler_missing_on_gpu(sampler) if device is CUDA else ""
    if device is not CUDA and sampler is not DeterministicSampler:
        missing = "it is not the deterministic one"
    if missing:
        return Entry("sampler", sampler.__name__, why=missing, option=f"serve without {FLAG}")
    return Entry("sampler", sampler.__name__, covered_by="noise by (seed, position, vocabulary id), ties by lowest id")


def _sampler_missing_on_gpu(sampler: type) -> str:
    import vllm.envs
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    if sampler is not Sampler:
        return "proven is vLLM's own sampler of runner V2"
    for patch in patches.missing(patches.CUDA_SAMPLING):
        return f"{patch.target} is not the deterministic one"
    return "FlashInfer's sampler is switched on" if vllm.envs.VLLM_USE_FLASHINFER_SAMPLER else ""


def collective_entries() -> Iterator[Entry]:
    """One entry for each group of ranks that exchange data; one in all where there is none."""
    groups = {
        "tensor": parallel_state.get_tp_group(),
        "pipeline": parallel_state.get_pp_group(),
        "data": parallel_state.get_dp_group(),
    }
    several = {name: group.world_size for name, group in groups.items() if group.world_size > 1}
    for name, size in several.items():
        why = "the order in which ranks are added up is not proven"
        yield Entry("collectives", f"{name} parallel group of {size}", why=why, option="use one rank")
    if not several:
        yield Entry("collectives", "one rank", covered_by="nothing to exchange")


def compilation_entries(compilation: Any) -> Iterator[Entry]:
    """How the model's code is compiled, and each pass that may rewrite it."""
    if compilation.mode == CompilationMode.NONE:
        yield Entry("compilation", "eager", covered_by="every operation rounds by itself")
        return
    yield Entry("compilation", compilation.mode.name, covered_by="operations that the compiler cannot look into")
    passes = [name for name, on in vars(compilation.pass_config).items() if on is True]
    custom = [*compilation.inductor_passes, *(name for name in compilation.inductor_compile_config if "_pass" in name)]
    for name in passes:
        if name in _PASSES:
            yield Entry("compilation", name, covered_by=_PASSES[name])
        else:
            option = f'--compilation-config \'{{"pass_config": {{"{name}": false}}}}\''
            yield Entry("compilation", name, why="what it fuses is not proven", option=option)
    for name in custom:
        why = "what a pass of the user's rewrites is unknown"
        yield Entry("compilation", name, why=why, option="leave it out of --compilation-config")
