"""Every dense architecture at the width of a real model: the same bytes however its requests are served."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the extra 'cuda'")
from vllm import LLM

from .models import ARCHITECTURES, CROWD, EVERY_KIND, MODES, alone, counter, differing, streamed, together, write_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(architecture: str, tmp_path: Path, start: Callable[..., LLM]) -> None:
    """One engine serves whole prompts one by one, then all at once; another differs from it in every setting.

    What passes here is proven in ``engine/gpu_architectures.csv``.
    """
    settings = {
        "skip_tokenizer_init": False,
        "disable_log_stats": False,
        "max_model_len": 1536,
    }
    folder = write_model(tmp_path, architecture)

    llm = start(folder, **settings, **MODES["eager"], async_scheduling=False, max_num_batched_tokens=2048)
    expected = alone(llm, EVERY_KIND)
    assert len({str(answer) for answer in expected}) == len(expected), "the answers do not depend on the prompt"
    assert not differing(EVERY_KIND, together(llm, EVERY_KIND), expected), "in chunks, prefix cache warm"
    assert counter(llm, "prefix_cache_hits") > 0, "the cache was cold: the test proves nothing of it"
    assert llm.reset_prefix_cache()
    assert not differing(EVERY_KIND, together(llm, EVERY_KIND), expected), "in chunks, prefix cache cold"
    assert not differing(EVERY_KIND, streamed(llm, EVERY_KIND), expected), "streamed"
    in_a_crowd = together(llm, CROWD)
    assert counter(llm, "num_preemptions") == 0

    llm = start(
        folder,
        **settings,
        **MODES["compiled"],
        async_scheduling=True,
        max_num_batched_tokens=256,
        block_size=16,
        num_gpu_blocks_override=300,
    )
    assert not differing(EVERY_KIND, alone(llm, EVERY_KIND), expected), "compiled, CUDA graphs, chunks of 256"
    assert not differing(EVERY_KIND, together(llm, EVERY_KIND), expected), "the same among neighbours"
    assert not differing(CROWD, together(llm, CROWD), in_a_crowd), "preempted"
    assert counter(llm, "num_preemptions") > 0, "no request was preempted: the test proves nothing of it"
