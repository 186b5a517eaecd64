"""The arm ``identical``: one request, N times, as many at once as allowed."""

from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Planned, Site, Wave, Waves, target


def count(settings: Settings, site: Site) -> int:
    """How many requests the arm sends."""
    return settings.num_prompts


def waves(settings: Settings, site: Site) -> Waves:
    """One wave of ``--num-prompts`` copies."""
    ask = target(settings)
    requests = [Planned(f"identical-{index:05d}", ask) for index in range(settings.num_prompts)]
    yield Wave("together", requests, settings.max_concurrency)
