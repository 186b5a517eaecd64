"""What needs a CUDA device; on a machine without one everything here is skipped."""

from collections.abc import Callable, Iterator
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
    """Start a deterministic engine; it ends with the test or with the next start."""
    from ..engine.engines import starting

    settings = {
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 1 << 30,
    }
    with starting(**settings) as start:
        yield start
