"""What needs a CUDA device; on a machine without one everything here is skipped."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def device() -> object:
    """The device that tests compute on."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def engines_in_this_process() -> Iterator[None]:
    """Let vLLM run its worker here, where it is open to planted faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture
def start(engines_in_this_process: None) -> Iterator[Callable[..., Any]]:
    """Start a deterministic engine; it ends with the test or with the next start.

    What of an architecture is open may be: these tests are what proves it.
    """
    from ..engine.engines import starting

    settings = {
        "additional_config": {"deterministic": {"allow_uncovered": True}},
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 1 << 30,
        # What must be free at the start, beside the engines of other tests that run at once.
        "gpu_memory_utilization": 0.2,
    }
    with starting(**settings) as start:

        def start_covered(model: Path, **changes: Any) -> Any:
            engine = start(model, **changes)
            coverage = json.loads(engine.collective_rpc("deterministic_coverage")[0])
            gaps = [entry["name"] for entry in coverage["entries"] if entry["covered_by"] is None]
            assert not [gap for gap in gaps if not re.match(r"architecture \w+ with ", gap)]
            return engine

        yield start_covered
