import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vllm_deterministic.cli import app

from .test_shapes import model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["certify", *map(str, arguments)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A machine on which the first tile of a shape is outside the class, if `outside` holds that shape."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from vllm_deterministic.triton_kernels.tile_table import tile_plan

    from vllm_deterministic.certify import machine, plans
    from vllm_deterministic.certify.verdict import PlanVerdict, TileVerdict

    seen: dict[str, Any] = {"outside": ()}

    def certify(shapes: Any, dtype: Any, device: Any, **given: Any) -> list[Any]:
        seen.update(shapes=list(shapes), dtype=dtype, **given)
        given["progress"](1, 2, "compiling")
        certified = []
        for n, k in shapes:
            plan = tile_plan(dtype, (9, 0), n, k)
            verdicts = [TileVerdict(tile, "in class") for tile in plan.tiles]
            if (n, k) in seen["outside"]:
                verdicts[0] = TileVerdict(plan.tiles[0], "outside", "huge pair, M=1, element (0, 3): 1.0, not 2.0")
            name = str(dtype).removeprefix("torch.")
            certified.append((plan, PlanVerdict(n, k, name, plan.segments, True, 0.001, "", tuple(verdicts))))
        return certified

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "cuda_device", lambda: "cuda:0")
    monkeypatch.setattr(machine, "identity", lambda device: {"gpu": "a", "driver": "1"})
    monkeypatch.setattr(plans, "certify", certify)
    return seen


def test_certifies_the_shapes_given(gpu: dict[str, Any]) -> None:
    result = run("--shapes", "6144,4096", "4096,12288", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert gpu["shapes"] == [(6144, 4096), (4096, 12288)]
    assert str(gpu["dtype"]) == "torch.float16"
    assert gpu["every_m"]
    assert gpu["cache"] is not None
    assert "gpu a, driver 1" in result.stdout
    assert "6144" in result.stdout
    assert "in class" in result.stdout


def test_certifies_the_shapes_of_a_model(gpu: dict[str, Any], tmp_path: Path) -> None:
    result = run("--model", model(tmp_path), "--tensor-parallel", 2, "--no-cache")
    assert result.exit_code == 0, result.output
    assert gpu["shapes"][0] == (3072, 4096)
    assert str(gpu["dtype"]) == "torch.bfloat16"
    assert gpu["cache"] is None
    assert "gate_up" in result.stdout


def test_a_tile_outside_its_class_exits_with_1(gpu: dict[str, Any]) -> None:
    gpu["outside"] = [(64, 64)]
    result = run("--shapes", "64,64")
    assert result.exit_code == 1
    assert "huge pair, M=1, element (0, 3): 1.0, not 2.0" in result.stdout


def test_writes_json(gpu: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    result = run("--shapes", "64,64", "--output", f"kind=json,path={path}", "kind=console")
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert content["identity"] == {"gpu": "a", "driver": "1"}
    assert content["verdicts"][0]["tiles"][0]["status"] == "in class"
    assert "in class" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --model DIR, or --shapes N,K"),
        (("--shapes", "64"), "'64' is not of the form N,K"),
        (("--model", "/nope"), "cannot read /nope/config.json"),
        (("--shapes", "64,64", "--dtype", "int8"), "--dtype int8"),
        (("--shapes", "64,64", "--output", "kind=html,path=x"), "kind=console and kind=json"),
        (("--shapes", "64,64", "--output", "x"), "'x' is not of the form"),
    ],
)
def test_one_line_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_needs_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = run("--shapes", "64,64")
    assert result.exit_code == 2
    assert result.stderr == "Error: no CUDA device: certify runs on the GPU that is to serve\n"


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from vllm_deterministic.certify import machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(machine, "capability", lambda device: (7, 5))
    result = run("--shapes", "64,64")
    assert result.exit_code == 2
    assert result.stderr == "Error: Tesla T4 is sm_75; sm_80 or newer is needed\n"


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_without_torch_or_triton_one_line_says_what_to_install(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from vllm_deterministic.cli import app; app()"
    command = [sys.executable, "-c", program, "certify", "--shapes", "64,64"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: certify needs t")
    assert "pip install" in result.stderr
    assert result.stderr.count("\n") == 1
