"""The command that shows coverage without a server."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMAND = Path(sys.executable).parent / "vllm-deterministic"


def coverage(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, "coverage", *arguments], capture_output=True, text=True, check=False, timeout=300)


def test_covered_model_without_weights(qwen3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(qwen3, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "coverage.json"
    done = coverage(str(model), "--dtype", "float32", "--deterministic-coverage-file", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"coverage of {model} on cpu: every part is covered\n")
    written = json.loads(file.read_text())
    assert written["deterministic"]
    assert written["fingerprint"] is None
    modules = {entry["name"] for entry in written["entries"] if entry["part"] == "modules"}
    assert modules >= {"QKVParallelLinear", "RMSNorm", "SiluAndMul", "ParallelLMHead"}


def test_every_gap_is_shown(model_folder: Callable[..., Path]) -> None:
    model = model_folder("qwen3", architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=128, n_head=4)
    done = coverage(str(model), "--dtype", "float32", "--enable-prompt-embeds")
    assert done.returncode == 1, done.stderr
    for gap in ("architecture GPT2LMHeadModel is", "prompt embeddings is", "LayerNorm (module transformer.h.0.ln_1,"):
        assert f"\n{gap}" in done.stdout, gap


def test_what_could_not_be_found_out(tmp_path: Path) -> None:
    for arguments, message in (
        ((str(tmp_path / "nothing"),), "is no folder"),
        ((str(tmp_path),), "Error: "),
    ):
        done = coverage(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stdout == ""
