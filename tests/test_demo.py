"""The demo measures both servers, tells it in a table and one line of JSON, and cleans up."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from vllm_deterministic import demo
from vllm_deterministic.cli import app

from .conftest import FakeVllm

ARGS = ["--num-prompts", "12", "--default-prompts", "9", "--mixed-prompts", "4"]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "write_or_exit", lambda directory, config: directory.mkdir(parents=True))
    return tmp_path / "demo"


def run(directory: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setenv("FAKE_VLLM_BEHAVIOUR", behaviour)
    return CliRunner().invoke(app, ["demo", str(directory), *ARGS])


def measured(result: Result) -> dict[str, Any]:
    """The JSON line, which is all of standard output."""
    (line,) = result.stdout.splitlines()
    summary: dict[str, Any] = json.loads(line)
    return summary


def test_measures_both_servers(directory: Path, fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(directory, "as-flagged", monkeypatch)
    assert result.exit_code == 0, result.output
    summary = measured(result)
    assert list(summary) == ["deterministic", "default"]
    assert summary["deterministic"].items() >= {"requests": 12, "unique_outputs": 1, "unique_logprobs": 1}.items()
    assert summary["default"].items() >= {"requests": 9, "unique_outputs": 1, "unique_logprobs": 2}.items()
    assert summary["deterministic"]["mixed"].items() >= {"requests": 4, "unique_logprobs": 1, "divergent": 0}.items()
    assert summary["default"]["mixed"].items() >= {"requests": 4, "unique_logprobs": 2}.items()
    assert "unique logprob records" in result.stderr
    assert json.loads((directory / "default.json").read_text())["status"] == "diverged"
    assert "default against deterministic" in (directory / "compared.html").read_text()
    fake_vllm.assert_gone()


def test_tells_where_the_default_is_unique_too(
    directory: Path, fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(directory, "serves", monkeypatch)
    assert result.exit_code == 0
    assert measured(result)["default"]["unique_logprobs"] == 1


def test_a_broken_promise_is_exit_1(directory: Path, fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(directory, "varies", monkeypatch)
    assert result.exit_code == 1
    assert measured(result)["deterministic"]["unique_logprobs"] == 2


@pytest.mark.parametrize(("behaviour", "reason"), [("dies", "no such model"), ("breaks", "answered 500")])
def test_a_server_that_fails_is_exit_2(
    directory: Path, fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, behaviour: str, reason: str
) -> None:
    result = run(directory, behaviour, monkeypatch)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stdout == ""
    if behaviour == "breaks":
        fake_vllm.assert_gone()


def test_another_dtype_is_refused(directory: Path, fake_vllm: FakeVllm) -> None:
    result = CliRunner().invoke(app, ["demo", str(directory), "--dtype", "int8"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: --dtype: dtype 'int8' is none of float32, bfloat16, float16\n"


@pytest.mark.parametrize(
    ("behaviour", "number", "status"), [("hangs", signal.SIGTERM, 143), ("slow", signal.SIGINT, 130)]
)
def test_a_signal_leaves_no_process(
    tmp_path: Path,
    fake_vllm: FakeVllm,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    number: signal.Signals,
    status: int,
) -> None:
    monkeypatch.setenv("FAKE_VLLM_BEHAVIOUR", behaviour)
    program = f"""
        import sys
        from pathlib import Path
        from vllm_deterministic import demo, local_server
        from vllm_deterministic.cli import main
        demo.write_or_exit = lambda directory, config: directory.mkdir(parents=True)
        local_server._vllm = lambda: Path({str(fake_vllm.command)!r})
        sys.argv = ["vllm-deterministic", "demo", {str(tmp_path / "demo")!r}]
        main()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE, text=True)
    fake_vllm.wait_until_started()
    if behaviour == "slow":
        assert process.stderr is not None
        while "identical: 1000 requests" not in process.stderr.readline():
            pass
    process.send_signal(number)
    assert process.wait(30) == status
    fake_vllm.assert_gone()
