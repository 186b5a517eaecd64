"""The table of architectures on a GPU: every row is tested there, and what is open is refused."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_deterministic.engine import architectures, covered_modules, covered_settings, requests
from vllm_deterministic.engine.architectures import open_cells
from vllm_deterministic.engine.config import DeterministicConfig
from vllm_deterministic.engine.devices import CPU, CUDA

from ..gpu.models import ARCHITECTURES

OPEN = ("chunks", "preemption", "compiled and CUDA graphs", "n", "structured output")


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
    for module in (covered_settings, requests):
        monkeypatch.setattr(module, "open_cells", lambda: {"Qwen3ForCausalLM": OPEN})
    config = EngineArgs(model=str(qwen3), dtype="bfloat16", enforce_eager=eager).create_engine_config()
    gaps = covered_settings.setting_gaps(config, DeterministicConfig(), CUDA)
    found = {gap.name: gap.option for gap in gaps if gap.name.startswith("architecture")}
    compiled = {"architecture Qwen3ForCausalLM with compiled and CUDA graphs": "start with --enforce-eager"}
    assert found == {
        "architecture Qwen3ForCausalLM with chunks": "start with --no-enable-chunked-prefill",
        "architecture Qwen3ForCausalLM with preemption": "serve it without --enable-deterministic",
    } | ({} if eager else compiled)
    assert covered_settings.setting_gaps(config, DeterministicConfig(), CPU) == ()


@pytest.mark.parametrize(
    ("params", "what"),
    [
        (SamplingParams(n=2, temperature=1.0), "n is not proven"),
        (SamplingParams(structured_outputs=StructuredOutputsParams(regex="a|b")), "structured output is not proven"),
        (SamplingParams(prompt_logprobs=1), None),
        (SamplingParams(), None),
    ],
)
def test_requests_for_what_is_open_are_refused(
    params: SamplingParams, what: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "open_cells", lambda: {"Qwen3ForCausalLM": OPEN})
    assert requests.refused_in_requests(["Qwen3ForCausalLM"], CPU) == ()
    refused = requests.refused_in_requests(["Qwen3ForCausalLM"], CUDA)
    assert refused == ("n", "structured output")
    entry = covered_modules._architecture("Qwen3ForCausalLM", CUDA)
    assert entry.covered_by == "byte tests of this architecture on cuda; requests for n, structured output are refused"
    with pytest.raises(VLLMValidationError, match=what) if what else contextlib.nullcontext():
        requests.check_request(params, refused)


def test_an_engine_refuses_one_request_and_serves_the_next(
    qwen3: Path, start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU, whose table is not asked: the cells are planted."""
    monkeypatch.setattr(requests, "refused_in_requests", lambda architectures, device: ("n",))
    llm, prompt = start(qwen3), {"prompt_token_ids": [3, 4, 5]}
    with pytest.raises(VLLMValidationError, match="n is not proven"):
        llm.generate(prompt, SamplingParams(n=2, temperature=1.0, max_tokens=1), use_tqdm=False)
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
