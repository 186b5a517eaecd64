import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_deterministic.cli import app
from vllm_deterministic.lab.record import FloatRecord, ReductionRecord

SMALL = ("--device", "cpu", "--batch-sizes", "1,16", "--hidden", "512", "--repeats", "2")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lab", *map(str, arguments)])


def test_a_study_is_printed() -> None:
    pytest.importorskip("torch")
    result = run("matmul", *SMALL)
    assert result.exit_code == 0, result.output
    assert "batches of 1, 16, then 2 times in a batch of 16; hidden 512" in result.stdout
    assert "batch-invariant" in result.stdout


def test_all_outputs_at_once(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    kinds = [f"kind={kind},path={tmp_path / kind}" for kind in ("json", "html", "png", "console")]
    result = run("rmsnorm", *SMALL, "--output", *kinds)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    record = ReductionRecord.model_validate_json((tmp_path / "json").read_text())
    assert (record.batch_sizes, record.hidden, record.repeats) == ([1, 16], [512], 2)
    assert (tmp_path / "html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "png").read_bytes().startswith(b"\x89PNG")
    assert "RMSNorm" in (tmp_path / "console").read_text()


def test_json_goes_to_standard_output() -> None:
    result = run("float", "--output", "kind=json")
    assert result.exit_code == 0, result.output
    assert FloatRecord.model_validate(json.loads(result.stdout)).shuffles == 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("softmax",), "'softmax' is not a study; choose one of rmsnorm, matmul, attention, float"),
        (("float", "--device", "tpu"), "--device tpu: choose one of auto, cpu, cuda, mps"),
        (("float", "--batch-sizes", "1,,2"), "--batch-sizes '1,,2': numbers from 1 up"),
        (("float", "--batch-sizes", "0"), "--batch-sizes '0': numbers from 1 up"),
        (("float", "--hidden", "1e3"), "--hidden '1e3': numbers from 1 up"),
        (("float", "--hidden", "512,100"), "--hidden 512,100: multiples of 64"),
        (("float", "--repeats", "0"), "--repeats 0: at least 1"),
        (("float", "--output", "kind=pdf"), "'pdf' is not a kind of output; choose one of console, json, html, png"),
        (("float", "--output", "kind=png"), "kind=png needs a path, for example kind=png,path=lab.png"),
        (("float", "--output", "kind=png,path=/nope/x.png"), "the directory /nope does not exist"),
        (("float", "--output", "kind=png,file=x"), "'kind=png,file=x' is not of the form kind=KIND,path=PATH"),
        (("float", "--output", "png"), "'png' is not of the form kind=KIND,path=PATH"),
    ],
)
def test_one_line_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_absent_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    result = run("rmsnorm", "--device", device)
    assert result.exit_code == 2
    assert result.stderr == f"Error: --device {device}: this machine has none that torch can use\n"


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from vllm_deterministic.lab import study

    def fail(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(study, "run_family", fail)
    result = run("rmsnorm", *SMALL)
    assert result.exit_code == 2
    assert result.stderr == "Error: rmsnorm needs more memory than there is: smaller --batch-sizes or --hidden\n"


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("torch", ["rmsnorm"]), ("matplotlib", ["float", "--output", "kind=png,path=x.png"])],
)
def test_what_is_not_installed(missing: str, arguments: list[str], tmp_path: Path) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from vllm_deterministic.cli import app; app()"
    command = [sys.executable, "-c", program, "lab", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"Error: lab needs {missing}")
    assert result.stderr.endswith("pip install 'vllm-deterministic[lab]'\n")
    assert result.stderr.count("\n") == 1


def test_the_study_float_needs_neither_torch_nor_matplotlib() -> None:
    blocked = "sys.modules['torch'] = sys.modules['matplotlib'] = None"
    program = f"import sys; {blocked}; from vllm_deterministic.cli import app; app()"
    result = subprocess.run([sys.executable, "-c", program, "lab", "float"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "10000 shuffles" in result.stdout
