from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from ..verify.fake_server import FakeServer

Recorded = Callable[..., Awaitable[RunRecord]]


@pytest.fixture
def recorded() -> Recorded:
    """Record a small verification of a fake server with the given faults."""

    async def record(*, settings: dict[str, Any] | None = None, **faults: Any) -> RunRecord:
        small: dict[str, Any] = {"num_prompts": 12, "mixed_prompts": 6, "max_concurrency": 8, "sampled_prompts": 24}
        given = {"base_url": "http://fake", "kv_split": 32, "chunk_budget": 32, **small, **(settings or {})}
        return await verify(Settings.model_validate(given), transport=FakeServer(**faults).transport())

    return record
