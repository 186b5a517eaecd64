"""The ledger of patches, and a vLLM that the installed plugin leaves alone."""

import functools
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vllm_deterministic.engine import patches


@pytest.mark.parametrize(
    "patch", [*patches.FRONTEND, *patches.CPU_WORKER, *patches.CUDA_WORKER], ids=lambda patch: patch.target
)
def test_ledger_entry(patch: patches.Patch) -> None:
    module, _, path = patch.target.partition(":")
    assert functools.reduce(getattr, path.split("."), importlib.import_module(module)) is not None
    for text in (patch.why, patch.how, patch.remove_when):
        assert text.endswith(".")


def test_applying_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        def method(self) -> str:
            return "original"

    module = types.ModuleType("patched_by_this_test")
    module.Owner = Owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = []

    def make(original: object) -> object:
        made.append(original)
        return lambda self: "patched"

    patch = patches.Patch(f"{module.__name__}:Owner.method", make, "Why.", "How.", "Never.")
    patches.apply([patch])
    patches.apply([patch])
    assert len(made) == 1
    assert Owner().method() == "patched"


_DESCRIBE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, dtype="bfloat16", max_model_len=512, kv_cache_memory_bytes=1 << 27)
greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
prompts = [{"prompt_token_ids": list(range(100, 105 + 40 * i))} for i in range(6)]
outputs = [
    [[(i, p.logprob.hex()) for i, p in step.items()] for step in output.outputs[0].logprobs]
    for output in llm.generate(prompts, greedy, use_tqdm=False)
]
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
classes = {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in runner.model.named_modules()}
methods = {
    f"{type(m).__qualname__}.{method}": getattr(type(m), method).__module__
    for m in runner.model.modules() for method in ("forward", "forward_native", "forward_cpu") if hasattr(m, method)
}
attention = {name: type(m.impl).__qualname__ for name, m in runner.model.named_modules() if hasattr(m, "impl")}
print("RESULT" + json.dumps({
    "outputs": outputs, "classes": classes, "methods": methods, "attention": attention,
    "sampler": type(runner.sampler).__qualname__, "runner": type(runner).__qualname__,
    "config": llm.llm_engine.vllm_config.compute_hash(),
}))
"""


def _describe(model: Path, plugins: str | None) -> dict[str, object]:
    env = {name: value for name, value in os.environ.items() if name != "VLLM_DETERMINISTIC"}
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    done = subprocess.run([sys.executable, "-c", _DESCRIBE, str(model)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout.rpartition("RESULT")[2])
    return result


def test_without_the_flag_nothing_changes(qwen3: Path) -> None:
    """Same bytes, same classes, same compile key as a vLLM that does not load the plugin."""
    assert _describe(qwen3, None) == _describe(qwen3, "none")
