"""The ledger: every place where vLLM's code is replaced, with Why, How and Remove when.

``FRONTEND`` is applied in the process that takes requests, ``CPU_WORKER`` or ``CUDA_WORKER`` in the process that runs
the model, each once an engine asked for deterministic serving. The flag's own three hooks on ``EngineArgs`` are in
``plugin.py``.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import DeterministicConfig


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    ``target``: ``module:attribute.path``. ``make``: takes the original, gives the replacement. ``why``, ``how`` and
    ``remove_when`` are for the reader.
    """

    target: str
    make: Callable[[Any], Any]
    why: str
    how: str
    remove_when: str


def apply(patches: Sequence[Patch]) -> None:
    """Apply each patch that this process has not applied yet."""
    for patch in patches:
        owner, name = _place(patch)
        original = owner.__dict__.get(name, getattr(owner, name))
        if not getattr(original, "_deterministic_patch", False):
            replacement = patch.make(original)
            replacement._deterministic_patch = True
            setattr(owner, name, replacement)


def missing(patches: Sequence[Patch]) -> list[Patch]:
    """Those of the patches that are not in place in this process."""
    return [patch for patch in patches if not getattr(getattr(*_place(patch)), "_deterministic_patch", False)]


def _place(patch: Patch) -> tuple[Any, str]:
    module, _, path = patch.target.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def _admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .devices import current_device
        from .requests import check_request, refused_in_requests
        from .sampling import default_seed

        request = original(self, *args, **kwargs)
        deterministic = DeterministicConfig.of(self.vllm_config)
        params = request.sampling_params
        if deterministic is None or params is None:
            return request
        if not deterministic.allow_uncovered:
            check_request(params, refused_in_requests(self.vllm_config.model_config.architectures, current_device()))
        if params.seed is None and params.temperature > 0:
            params.seed = default_seed(deterministic.default_seed, request.prompt_token_ids)
            # vLLM caches how a request samples, and may have looked before there was a seed.
            params.__dict__.pop("sampling_type", None)
        return request

    return process_inputs


def _telling_fingerprint(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def init_generate_state(engine_client: Any, state: Any, args: Any, *rest: Any, **named: Any) -> Any:
        if DeterministicConfig.of(engine_client.vllm_config) is not None:
            from . import responses

            state.deterministic_coverage = await responses.ask_workers(engine_client)
            args = responses.with_fingerprint(args, state.deterministic_coverage)
        return await original(engine_client, state, args, *rest, **named)

    return init_generate_state


def _module_forward(method: str) -> Callable[[Any], Any]:
    def make(_original: Any) -> Any:
        from . import layers

        forward = getattr(layers, method)

        @functools.wraps(forward)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return replacement

    return make


def _cuda_sampling(name: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        from . import cuda_sampling

        return getattr(cuda_sampling, name)(original)

    return make


def _model_runner(_original: type) -> type:
    from .model_runner import DeterministicCPUModelRunner

    return DeterministicCPUModelRunner


FRONTEND = (
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        make=_admitting,
        why="vLLM draws the noise of a request without a seed from a generator that all requests share, and serves "
        "what is not proven of a model's architecture.",
        how="It gets a seed derived from --deterministic-default-seed and its prompt; n choices count up from there. "
        "A request for what is not proven is refused.",
        remove_when="vLLM lets a server set the rule by which unseeded requests are seeded, and check requests.",
    ),
    Patch(
        target="vllm.entrypoints.generate.api_router:init_generate_state",
        make=_telling_fingerprint,
        why="vLLM's system_fingerprint is a hash over its own configuration: weights, driver and tiles are not in it.",
        how="The workers are asked for theirs before the classes are built that answer requests.",
        remove_when="vLLM lets a plugin give the value of system_fingerprint.",
    ),
)

_LAYERS = "vllm.model_executor.layers"


def _layer(module: str, method: str, forward: str) -> Patch:
    return Patch(
        target=f"{_LAYERS}.{module}.{method}",
        make=_module_forward(forward),
        why="Compiled element-wise code keeps wider intermediates than eager code, and the bytes of a row depend on "
        "its batch: of SiLU on CPU, of RMSNorm on GPUs.",
        how="Every road of dispatch calls one opaque operation of triton_kernels, compiled or not.",
        remove_when="vLLM dispatches layers to registered batch-invariant implementations, compiled or not.",
    )


CPU_WORKER = (
    *(
        _layer(layer, method, forward)
        for layer, forward in (
            ("layernorm:RMSNorm", "rms_norm_forward"),
            ("activation:SiluAndMul", "silu_and_mul_forward"),
            ("rotary_embedding.base:RotaryEmbedding", "rotary_embedding_forward"),
        )
        for method in ("forward_native", "forward_cpu")
    ),
    Patch(
        target="vllm.v1.worker.cpu_worker:CPUModelRunner",
        make=_model_runner,
        why="The runner builds its sampler itself and rewinds torch generators, which a CPU generator does not allow.",
        how="A subclass with the deterministic sampler and noise keyed by (seed, position, vocabulary id).",
        remove_when="vLLM's CPU runner takes its sampler from the configuration.",
    ),
)

_SAMPLE = "vllm.v1.worker.gpu.sample"

CUDA_SAMPLING = (
    *(
        Patch(
            target=f"{_SAMPLE}.{kernel}",
            make=_cuda_sampling("WithoutFusion"),
            why="The kernel is compiled anew for the dtypes and strides of logits, which neighbours may change, and "
            "the compiler chooses which products and sums it rounds at once.",
            how="Every operation rounds by itself.",
            remove_when="vLLM compiles it so in its batch-invariant mode.",
        )
        for kernel in (
            "gumbel:_gumbel_sample_kernel",
            "gumbel:_temperature_kernel",
            "min_p:_min_p_kernel",
            "penalties:_penalties_kernel",
        )
    ),
    *(
        Patch(
            target=f"{_SAMPLE}.{module}:apply_top_k_top_p",
            make=_cuda_sampling("limiting"),
            why="Top-p takes another algorithm in batches of up to 64 rows and is compiled anew where a neighbour asks "
            "for top-k; rounding errors decide which of equal logits are cut off, and threads read from a buffer "
            "what others write, without a barrier between.",
            how="A row is cut at one element, by value and then by id, and all sums are of integers.",
            remove_when="vLLM cuts a row at the same element in every batch.",
        )
        for module in ("sampler", "states")
    ),
    *(
        Patch(
            target=f"{_SAMPLE}.{module}:compute_token_logprobs",
            make=_cuda_sampling("scoring"),
            why="The sum is compiled anew for the most logprobs that any neighbour asks for and, with processed "
            "logprobs, for another dtype where a neighbour needs processing.",
            how="The sum is one of integers, which is exact in any order.",
            remove_when="vLLM's logprobs are batch-invariant in its batch-invariant mode.",
        )
        for module in ("logprob", "prompt_logprob")
    ),
    Patch(
        target=f"{_SAMPLE}.logprob:torch",
        make=_cuda_sampling("TorchWithOrderedTopk"),
        why="torch.topk orders equal logits by an algorithm that changes with k, the most that any neighbour asks for.",
        how="The module sees a torch whose topk puts the lower id first.",
        remove_when="vLLM orders the ties of top_logprobs.",
    ),
    Patch(
        target=f"{_SAMPLE}.logit_bias:apply_logit_bias",
        make=_cuda_sampling("bias_in_turns"),
        why="Of one token, a thread may read the logit to add a bias, or forbid it, before another has restored it.",
        how="Allowed ids, biases and stop ids have a launch each.",
        remove_when="vLLM's kernel waits between them.",
    ),
)

CUDA_WORKER = (
    *(
        _layer(layer, method, forward)
        for layer, forward in (
            ("layernorm:RMSNorm", "rms_norm_forward"),
            ("layernorm:GemmaRMSNorm", "gemma_rms_norm_forward"),
            ("layernorm:LayerNorm", "layer_norm_forward"),
            ("activation:SiluAndMul", "silu_and_mul_forward"),
            ("activation:GeluAndMul", "gelu_and_mul_forward"),
            ("activation:NewGELU", "gelu_tanh_forward"),
            ("activation:FastGELU", "gelu_tanh_forward"),
            ("rotary_embedding.base:RotaryEmbedding", "fused_rotary_embedding_forward"),
        )
        for method in ("forward_native", "forward_cuda")
    ),
    *(
        Patch(
            target=f"{_LAYERS}.{method}.apply",
            make=_module_forward("linear_apply"),
            why="vLLM's batch-invariant product takes 1.3 to 4 times as long as the default's, and compiled code "
            "freezes one tile for every number of rows.",
            how="An opaque operation takes the fastest of the tiles that are certified to give the same bytes.",
            remove_when="vLLM's batch-invariant product is as fast as its default's.",
        )
        for method in ("linear:UnquantizedLinearMethod", "vocab_parallel_embedding:UnquantizedEmbeddingMethod")
    ),
    Patch(
        target=f"{_LAYERS}.rotary_embedding.phi3_long_rope_scaled_rope:Phi3LongRoPEScaledRotaryEmbedding.forward",
        make=_module_forward("long_rotary_embedding_forward"),
        why="It rotates by element-wise code of its own, of which compiled code keeps wider intermediates.",
        how="The rotation of every other model, with the part of its table that is in use.",
        remove_when="vLLM dispatches it as it does the other rotations.",
    ),
    *(
        Patch(
            target=f"vllm.model_executor.models.{attention}.forward",
            make=_module_forward("qk_norm_attention_forward"),
            why="Opaque norms and rotation of query and key are three launches a layer where compiled code has one.",
            how="One operation normalizes and rotates both.",
            remove_when="vLLM's model calls a layer that may fuse them.",
        )
        for attention in ("qwen3:Qwen3Attention", "gemma3:Gemma3Attention")
    ),
    Patch(
        target=f"{_LAYERS}.logits_processor:LogitsProcessor.forward",
        make=_module_forward("logits_processor_forward"),
        why="torch takes other kernels for the soft cap of one row than of several, whose padding makes them strided.",
        how="One operation caps a row, however many there are.",
        remove_when="vLLM caps logits in a batch-invariant operation.",
    ),
    *CUDA_SAMPLING,
)
