"""The command as a user runs it: a process, its exit code, what it prints and writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_deterministic.cli import app

from .fake_server import FakeServer

COMMAND = Path(sys.executable).with_name("vllm-deterministic")
SMALL = [
    "--num-prompts",
    "40",
    "--mixed-prompts",
    "6",
    "--max-concurrency",
    "8",
    "--sampled-prompts",
    "48",
    "--chunk-budget",
    "128",
]


def _environment() -> dict[str, str]:
    hidden = ("OPENAI_API_KEY", "VLLM_DETERMINISTIC_API_KEY", "VLLM_DETERMINISTIC_URL")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "verify", *words], capture_output=True, text=True, timeout=60, env=_environment() | environment
    )


def test_exit_0_and_three_reports_for_a_pure_server(tmp_path: Path) -> None:
    with FakeServer().listen() as url:
        outputs = ["kind=console", f"kind=json,path={tmp_path}/run.json", f"kind=html,path={tmp_path}/run.html"]
        done = _run("--base-url", url, *SMALL, "--output", *outputs, "--metadata", "gpu=none", "note=a b")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "Verdict: identical." in done.stdout
    assert "identical: 40 requests" in done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "identical"
    assert record["metadata"] == {"gpu": "none", "note": "a b"}
    assert [arm["name"] for arm in record["arms"]] == ["identical", "mixed", "prefix", "sampled"]
    assert "<!doctype html>" in (tmp_path / "run.html").read_text()


def test_exit_1_for_a_server_that_varies() -> None:
    with FakeServer(swap_token_beyond=2).listen() as url:
        done = _run("--base-url", url, *SMALL, "--arms", "identical,mixed")
    assert done.returncode == 1, done.stderr
    assert "Verdict: diverged." in done.stdout
    assert "mixed: the request got different outputs" in done.stdout


def test_json_alone_goes_to_standard_output() -> None:
    with FakeServer().listen() as url:
        done = _run("--base-url", url, *SMALL, "--arms", "identical", "--output", "kind=json")
    assert json.loads(done.stdout)["status"] == "identical"


def test_exit_2_and_the_results_so_far_when_the_server_dies(tmp_path: Path) -> None:
    with FakeServer(answers_before_death=20).listen() as url:
        done = _run("--base-url", url, *SMALL, "--output", f"kind=json,path={tmp_path}/run.json")
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(error) == 1
    assert "broke the connection" in error[0]
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["arms"][0]["status"] == "incomplete"


def test_exit_2_when_nothing_listens() -> None:
    done = _run("--base-url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "Error: Cannot connect to http://127.0.0.1:9 (Connection refused)." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_what_there_is(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "run.json"
    server = FakeServer(latency_s=0.1)
    with server.listen() as url:
        process = subprocess.Popen(
            [COMMAND, "verify", "--base-url", url, "--max-concurrency", "2", "--output", f"kind=json,path={path}"],
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        deadline = time.monotonic() + 20
        while len(server.seen) < 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "Interrupted: Stopped before the end. So far" in errors
    assert "Traceback" not in errors
    record = json.loads(path.read_text())
    assert record["status"] == "interrupted"
    assert record["arms"][0]["compared"] >= 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-promts", "3"], "No such option: --num-promts"),
        (["--num-prompts", "many"], "'--num-prompts': Input should be a valid integer"),
        (["--num-prompts", "1"], "--num-prompts: input should be greater than or equal to 2, not 1"),
        (["--arms", "identical", "mixd"], "--arms: 'mixd' is not an arm"),
        (["--output", "kind=pdf,path=x"], "--output: 'pdf' is not a kind of output"),
        (["--output", "kind=json,path=/no/such/dir/x"], "--output: the directory /no/such/dir does not exist"),
        (["--extra-body", "{"], "--extra-body: it is not valid JSON"),
        (["stray"], "unexpected extra argument"),
    ],
)
def test_exit_2_for_a_users_mistake_before_anything_is_sent(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["verify", "--base-url", "http://127.0.0.1:9", *words])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_the_address_is_required() -> None:
    done = CliRunner(env={"VLLM_DETERMINISTIC_URL": None}).invoke(app, ["verify"])
    assert done.exit_code == 2
    assert "--base-url" in done.stderr


def test_the_key_comes_from_the_environment_and_stays_out_of_the_record() -> None:
    with FakeServer(key="sk-secret").listen() as url:
        done = _run(
            *SMALL,
            "--arms",
            "identical",
            "--output",
            "kind=json",
            OPENAI_API_KEY="sk-secret",
            VLLM_DETERMINISTIC_URL=url,
        )
    assert done.returncode == 0, done.stderr
    assert "sk-secret" not in done.stdout + done.stderr


def test_it_needs_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; import vllm_deterministic.verify.command, vllm_deterministic.report.command; "
        "print({'vllm', 'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
