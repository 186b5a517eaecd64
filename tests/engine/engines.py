"""Deterministic engines in this process, one at a time, and the bytes of what they answer."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput
from vllm.distributed import cleanup_dist_env_and_memory


@contextlib.contextmanager
def starting(**settings: Any) -> Iterator[Callable[..., LLM]]:
    """Start engines by `start(model, **changes)`; each ends with the context or with the next start."""
    engines: list[LLM] = []

    def end() -> None:
        while engines:
            engines.pop().llm_engine.engine_core.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()

    def start(model: Path, **changes: Any) -> LLM:
        end()
        engine = LLM(str(model), **{"additional_config": {"deterministic": True}, **settings, **changes})
        engines.append(engine)
        return engine

    try:
        yield start
    finally:
        end()


def record(output: RequestOutput) -> list[tuple[Any, ...]]:
    """Token ids and logprobs of every choice, floats as they are: equal records are equal bytes."""
    return [
        (tuple(choice.token_ids), [[(i, p.logprob.hex()) for i, p in step.items()] for step in choice.logprobs or []])
        for choice in output.outputs
    ]
