# ruff: noqa: E402 (torch comes with the extras alone)
"""The lab's strategies on a GPU: what is said to have a fixed order gives one row the same bytes in every batch."""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.lab import attention, matmul, rms_norm

pytestmark = pytest.mark.gpu

BATCHES = (1, 2, 4, 8, 16, 32)


def results(family: ModuleType, order: str, device: torch.device) -> dict[str, int]:
    """The number of distinct byte patterns of one row over all batches, by strategy."""
    with ThreadPoolExecutor(4) as pool:
        made = family.family(device, pool)
        inputs = made.inputs("adversarial", 512, max(BATCHES), torch.Generator().manual_seed(0)).to(device)
        return {
            strategy.name: len(
                {strategy.run(*inputs.batch(size))[size // 2].cpu().numpy().tobytes() for size in BATCHES}
            )
            for strategy in made.strategies
            if strategy.order == order
        }


@pytest.mark.parametrize("family", [rms_norm, matmul, attention], ids=lambda family: family.__name__.split(".")[-1])
def test_a_fixed_order_gives_one_result(family: ModuleType, device: torch.device) -> None:
    counts = results(family, "fixed", device)
    assert any("this project's" in name for name in counts)
    assert set(counts.values()) == {1}, counts
    assert max(results(family, "batch", device).values()) > 1
