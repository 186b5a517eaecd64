"""What ``bench_engine.py`` runs in a process of its own for each mode: a model of random weights, probes, a profile."""

import hashlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}
_COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
# Settings of the environment and of the engine.
MODES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "default": ({}, {}),
    "deterministic": ({}, {"additional_config": {"deterministic": True}}),
    "vllm-batch-invariant": ({"VLLM_BATCH_INVARIANT": "1"}, {}),
    "vllm-batch-invariant-compiled": ({"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}, {}),
}
PROFILED_STEPS = 20


def configuration(shape: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The ``config.json`` of a Qwen3 model of a shape, of fewer layers if asked."""
    return _COMMON | shape | ({"num_hidden_layers": layers} if layers else {})


class Engine:
    """An engine of one mode in this process, with the prompts that every mode gets in the same order."""

    def __init__(self, model: str, layers: int | None, mode: str, kv_gib: int) -> None:
        start = time.perf_counter()
        from vllm import LLM

        _fill_dummy_weights()
        config = configuration(MODELS[model], layers)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=8192,
                max_num_seqs=512,
                # The same cache in every mode, so that what else is on the device can be compared.
                kv_cache_memory_bytes=kv_gib << 30,
                # What must be free at the start, beside the other modes' engines; the size of the cache is given.
                gpu_memory_utilization=0.35,
                seed=0,
                **MODES[mode][1],
            )
        self.startup_s = time.perf_counter() - start
        self._random = random.Random(0)
        self.target = self.prompt(200)
        # The target's pages stay in the prefix cache, so that no round is the first to fill them.
        self.run([self.target] * 8, 16)

    def number(self, low: int, high: int) -> int:
        return self._random.randrange(low, high)

    def prompt(self, length: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [self.number(1000, 150000) for _ in range(length)]}

    def run(self, prompts: list[Any], tokens: int | list[int], logprobs: int | None = None) -> tuple[list[Any], float]:
        """Outputs of greedy requests, and seconds. ``logprobs`` is asked for by all of them."""
        import torch
        from vllm import SamplingParams

        each = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=logprobs)
            for n in each
        ]
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return outputs, time.perf_counter() - start


def _fill_dummy_weights() -> None:
    """Let vLLM's dummy loader write random matrices of standard deviation 0.02 and unit norms."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    generator = torch.Generator("cuda").manual_seed(1234)

    def fill(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        if not torch.is_floating_point(tensor):
            return
        if tensor.dim() == 1:
            tensor.data.fill_(1.0)
        else:
            values = torch.randn(tensor.shape, generator=generator, device="cuda")
            tensor.data.copy_(values.mul_(0.02))

    dummy_loader.initialize_single_dummy_weight = fill


def one_request(engine: Engine) -> dict[str, Any]:
    return {"one_request_s": engine.run([engine.prompt(200)], 256)[1]}


def identical(engine: Engine) -> dict[str, Any]:
    outputs, seconds = engine.run([engine.target] * 1000, 128)
    return {"identical_s": seconds, "identical_tokens": [_record(output) for output in outputs]}


def identical_logprobs(engine: Engine) -> dict[str, Any]:
    """Untimed: logprobs cost a pass over the vocabulary for every row, and a record of every token."""
    outputs, _ = engine.run([engine.target] * 1000, 64, logprobs=1)
    return {"identical_logprobs": [_record(output) for output in outputs]}


def mixed(engine: Engine) -> dict[str, Any]:
    """The target among 1 to 200 strangers, one of which shares the beginning of its prompt."""
    records, total = [], 0.0
    for strangers in (1, 5, 60, 200):
        prompts = [engine.prompt(engine.number(4, 1600)) for _ in range(strangers)]
        place = engine.number(0, strangers + 1)
        prompts.insert(place, engine.target)
        beginning = engine.target["prompt_token_ids"][:130]
        prompts.append({"prompt_token_ids": beginning + engine.prompt(30)["prompt_token_ids"]})
        tokens = [engine.number(1, 200) for _ in prompts]
        tokens[place] = 200
        outputs, seconds = engine.run(prompts, tokens, logprobs=1)
        records.append(_record(outputs[place]))
        total += seconds
    return {"mixed_rounds_s": total, "target_outputs": records}


def throughput(engine: Engine) -> dict[str, Any]:
    prompts = [engine.prompt(engine.number(128, 512)) for _ in range(512)]
    return {"throughput_tok_s": 512 * 128 / engine.run(prompts, 128)[1]}


def prefill(engine: Engine) -> dict[str, Any]:
    return {"prefill_tok_s": 32 * 4096 / engine.run([engine.prompt(4096) for _ in range(32)], 1)[1]}


def long_context(engine: Engine) -> dict[str, Any]:
    return {"long_context_s": engine.run([engine.prompt(6000) for _ in range(32)], 128)[1]}


PROBES: dict[str, Callable[[Engine], dict[str, Any]]] = {
    "one": one_request,
    "identical": identical,
    "throughput": throughput,
    "prefill": prefill,
    "long": long_context,
    "logprobs": identical_logprobs,
    "mixed": mixed,
}
# What is for its bytes first, and for its time at most besides.
ONCE = ("logprobs", "mixed")


def _record(output: Any) -> str:
    """A digest of token ids and logprobs, floats as they are."""
    choice = output.outputs[0]
    logprobs = [[(i, p.logprob.hex()) for i, p in sorted(step.items())] for step in choice.logprobs or []]
    return hashlib.sha256(json.dumps([list(choice.token_ids), logprobs]).encode()).hexdigest()


def measure(engine: Engine, probe: str) -> dict[str, Any]:
    """One run of a probe: values, different outputs, and bytes of the device that the process took meanwhile."""
    import torch

    free = torch.cuda.mem_get_info()[0]
    found = PROBES[probe](engine)
    return {
        "values": {name: value for name, value in found.items() if not isinstance(value, list)},
        "outputs": {name: set(value) for name, value in found.items() if isinstance(value, list)},
        "device_bytes": free - torch.cuda.mem_get_info()[0],
    }


def profile(engine: Engine, requests: int) -> dict[str, Any]:
    """Kernels of a decode step of identical requests: those of long answers less those of answers of one token."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    def run(tokens: int) -> float:
        return engine.run([engine.prompt(200)] * requests, tokens)[1]

    def kernels(tokens: int) -> dict[str, tuple[int, float]]:
        with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
            run(tokens)
        events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
        return {event.key: (event.count, event.self_device_time_total) for event in events}

    run(1 + PROFILED_STEPS)
    many, one = (statistics.median(run(tokens) for _ in range(5)) for tokens in (1 + PROFILED_STEPS, 1))
    first, all_steps = kernels(1), kernels(1 + PROFILED_STEPS)
    rows = []
    for name, (count, us) in all_steps.items():
        count_once, us_once = first.get(name, (0, 0.0))
        row = {"us": (us - us_once) / PROFILED_STEPS, "count": (count - count_once) / PROFILED_STEPS, "kernel": name}
        if row["count"] > 0:
            rows.append(row)
    rows.sort(key=lambda row: -row["us"])
    return {
        "requests": requests,
        "step_us": (many - one) / PROFILED_STEPS * 1e6,
        "kernels_us": sum(row["us"] for row in rows),
        "kernels": rows,
    }


def environment(mode: str) -> dict[str, str]:
    """Variables of a mode's process: nothing of the caller's shell that would change what is measured."""
    changed = ("VLLM_BATCH_INVARIANT", "VLLM_DETERMINISTIC", "VLLM_USE_BREAKABLE_CUDAGRAPH")
    inherited = {name: value for name, value in os.environ.items() if name not in changed}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return inherited | quiet | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | MODES[mode][0]
