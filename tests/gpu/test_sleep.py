"""Sleep mode: what an engine answers and caches when it wakes up is what it was before, and other weights are refused.

vLLM's allocator for it serves one engine a process, so each engine has a process of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the extra 'cuda'")
from safetensors.torch import load_file, save_file

from .models import MODES, write_model

pytestmark = pytest.mark.gpu

CACHE_BYTES = 4 << 30
_SERVE = """
import hashlib, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
from vllm import LLM, SamplingParams
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.kv_cache_manager import KVCacheManager

model, other, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model, **settings)
layers = list(get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).values())
cached, free = {}, KVCacheManager.free

def take(self, request):
    if request.is_finished():
        (blocks,) = self.get_block_ids(request.request_id)
        # Block 0 stands for what a sliding window has left behind; the last token was sampled and never read.
        held = torch.tensor(blocks, device="cuda")
        size = layers[0].kv_cache.shape[2]
        positions = torch.arange(request.num_tokens - 1, device="cuda")
        positions = positions[held[positions // size] != 0]
        hashes = []
        for layer in layers:
            slots = layer.kv_cache.transpose(1, 2)[held[positions // size], positions % size]
            hashes.append(hashlib.sha256(slots.contiguous().view(torch.int16).cpu().numpy().tobytes()).hexdigest())
        cached[request.num_prompt_tokens] = hashes
    free(self, request)

KVCacheManager.free = take

def hits():
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")

def ask(*lengths):
    prompts = [{"prompt_token_ids": [(length * 7 + i * 131) % 8192 for i in range(length)]} for length in lengths]
    common = {"max_tokens": 24, "ignore_eos": True, "detokenize": False, "logprobs": 5}
    params = [SamplingParams(temperature=length % 2, seed=length, **common) for length in lengths]
    choices = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        [list(choice.token_ids), [[(i, p.logprob.hex()) for i, p in step.items()] for step in choice.logprobs]]
        for choice in choices
    ]

def serve():
    cached.clear()
    before = hits()
    first = [answer for length in (1, 65, 300, 701) for answer in ask(length)]
    cold = hits() == before
    again = ask(1, 65, 300, 701)
    warm = hits() > before
    together = ask(900, 333, 40, 1200, 17)
    return {"answers": first + together, "kv": cached.copy(), "again": again == first, "cold": cold, "warm": warm}

def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"

def free_bytes():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]

result = {"before": serve()}
awake = free_bytes()
llm.sleep(level=1)
asleep = free_bytes()
llm.wake_up()
result["freed"], result["taken again"] = asleep - awake, asleep - free_bytes()
result["clean"] = not any(bool(layer.kv_cache.any()) for layer in layers)
result["level 1"] = serve()

llm.sleep(level=2)
llm.wake_up(tags=["weights"])
reload = lambda path: llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
result["other weights"] = refusal(lambda: reload(other))
reload(model)
llm.wake_up(tags=["kv_cache"])
result["level 2"] = serve()

llm.sleep(level=2)
llm.wake_up()
llm.collective_rpc("reset_weights")  # lest the memory still holds them
result["no weights"] = refusal(lambda: ask(5))
print("RESULT" + json.dumps(result), flush=True)
os._exit(0)  # a step was refused within the engine, which is not to be taken down in order
"""
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "graphs stay": ("LlamaForCausalLM", MODES["compiled"]),
    "graphs sleep too": ("LlamaForCausalLM", {**MODES["compiled"], "sleep_mode_offload_cudagraph": True}),
    "window over blocks of 16": ("MistralForCausalLM", {**MODES["eager"], "block_size": 16}),
    "flex": ("LlamaForCausalLM", {**MODES["eager"], "additional_config": {"deterministic": {"attention": "flex"}}}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_wakes_up_as_it_was(name: str, tmp_path: Path) -> None:
    architecture, settings = ENGINES[name]
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    shutil.copytree(write_model(model, architecture), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "additional_config": {"deterministic": True},
        "enable_sleep_mode": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "gpu_memory_utilization": 0.2,
        **settings,
    }
    # Without -P the sources in this folder would hide the installed package.
    command = [sys.executable, "-P", "-c", _SERVE, str(model), str(other), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "RESULT" in done.stdout, done.stderr[-4000:]
    result = json.loads(done.stdout.rpartition("RESULT")[2])

    before = result["before"]
    assert before["cold"]
    assert before["warm"]
    assert before["again"]
    assert len({str(tokens) for tokens, _ in before["answers"]}) > 4, "the answers do not depend on the prompt"
    assert result["clean"]
    for level in ("level 1", "level 2"):
        for what in before:
            assert result[level][what] == before[what], f"{what} after {level}"
    for what in ("other weights", "no weights"):
        assert result[what].startswith("RefusalError: "), f"{what}: {result[what]}"
        assert "weights are not those that the fingerprint was taken of" in result[what]
    # Of the whole device: it fails where something else takes or frees memory at the same time.
    assert min(result["freed"], result["taken again"]) > 0.99 * CACHE_BYTES
