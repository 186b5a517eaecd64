"""The table of architectures on a GPU: every row is tested there, and what is open is refused."""

from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_deterministic.engine import architectures, covered_settings
from vllm_deterministic.engine.architectures import open_cells
from vllm_deterministic.engine.config import DeterministicConfig
from vllm_deterministic.engine.devices import CPU, CUDA

from ..gpu.models import ARCHITECTURES

OPEN = ("chunks", "preemption", "compiled and CUDA graphs", "n")


def test_every_row_is_tested_on_a_gpu() -> None:
    assert set(open_cells()) == set(CUDA.architectures) == set(ARCHITECTURES)


def test_a_cell_is_proven_or_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_architectures.csv").write_text("architecture,chunks,n\nA,proven,proven\nB,open,proven\n")
    monkeypatch.setattr(architectures.resources, "files", lambda package: tmp_path)
    assert open_cells.__wrapped__() == {"A": (), "B": ("chunks",)}
    (tmp_path / "gpu_architectures.csv").write_text("architecture,chunks,n\nA,yes,proven\n")
    with pytest.raises(ValueError, match=r"A has \{'chunks': 'yes'\}"):
        open_cells.__wrapped__()


@pytest.mark.parametrize("eager", [False, True])
def test_open_cells_are_refused(eager: bool, qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covered_settings, "open_cells", lambda: {"Qwen3ForCausalLM": OPEN})
    config = EngineArgs(model=str(qwen3), dtype="bfloat16", enforce_eager=eager).create_engine_config()
    gaps = covered_settings.setting_gaps(config, DeterministicConfig(), CUDA)
    found = {gap.name: gap.option for gap in gaps if gap.name.startswith("architecture")}
    compiled = {"architecture Qwen3ForCausalLM with compiled and CUDA graphs": "start with --enforce-eager"}
    assert found == {
        "architecture Qwen3ForCausalLM with chunks": "start with --no-enable-chunked-prefill",
        "architecture Qwen3ForCausalLM with preemption, n": "serve it without --enable-deterministic",
    } | ({} if eager else compiled)
    assert covered_settings.setting_gaps(config, DeterministicConfig(), CPU) == ()
