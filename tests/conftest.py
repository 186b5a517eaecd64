"""A `vllm` that is none, so that starting servers is tested in seconds."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class FakeVllm:
    """The command, an interpreter beside it, and the file in which it notes its process ids."""

    command: Path
    pids: Path

    def wait_until_started(self) -> None:
        """Wait until a server and its child run."""
        deadline = time.monotonic() + 30
        while not self.pids.exists() or not self.pids.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def assert_gone(self) -> None:
        """Every process that ever ran is dead."""
        for pid in map(int, self.pids.read_text().split()):
            stat = Path(f"/proc/{pid}/stat")
            # A dead child stays as a zombie where nobody adopts it.
            assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", f"{pid} runs"


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    """Put tests/fake_vllm.py in the place of vllm, in this process."""
    bin_directory, pids = tmp_path / "bin", tmp_path / "pids"
    bin_directory.mkdir()
    command = bin_directory / "vllm"
    command.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("fake_vllm.py").read_text())
    command.chmod(0o755)
    monkeypatch.setattr("vllm_deterministic.local_server._vllm", lambda: command)
    monkeypatch.setenv("FAKE_VLLM_PIDS", str(pids))
    return FakeVllm(command, pids)
