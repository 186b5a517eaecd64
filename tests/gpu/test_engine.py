"""An engine on a GPU: a request gives the same bytes alone and among neighbours, eager, with CUDA graphs, compiled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the extra 'cuda'")
import torch
from vllm import LLM

from vllm_deterministic.engine.cuda_linear import PlannedMatmul

from .models import MODES, alone, together, write_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"), "Qwen3ForCausalLM")


def test_bytes_do_not_depend_on_neighbours_graphs_or_compilation(qwen3: Path, start: Callable[..., LLM]) -> None:
    expected: list[Any] = []
    for mode, settings in MODES.items():
        llm = start(qwen3, **settings)
        first = alone(llm)
        expected = expected or first
        assert first == expected, f"{mode}, alone"
        assert together(llm) == expected, f"{mode}, prefix cache warm"
        assert llm.reset_prefix_cache()
        assert together(llm) == expected, f"{mode}, prefix cache cold"
    assert len({tokens for ((tokens, _),) in expected}) == len(expected), "the answers do not depend on the prompt"


def test_planted_fault_is_seen(qwen3: Path, start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """K is cut in two where a step has more than 16 rows."""
    llm = start(qwen3, enforce_eager=True)
    assert alone(llm) == together(llm), "without the fault"
    original = PlannedMatmul.run.__func__  # type: ignore[attr-defined]

    def run(cls: type, x: Any, w: Any, bias: Any) -> Any:
        if x.shape[0] <= 16:
            return original(cls, x, w, bias)
        half = w.shape[1] // 2
        left, right = (torch.nn.functional.linear(x[:, part], w[:, part]) for part in (slice(half), slice(half, None)))
        return left + right if bias is None else left + right + bias

    monkeypatch.setattr(PlannedMatmul, "run", classmethod(run))
    assert llm.reset_prefix_cache()
    assert alone(llm) != together(llm)
