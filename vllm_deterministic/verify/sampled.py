"""The arm ``sampled``: random sampling with a seed is a function of the seed.

24 requests (six settings of temperature, top-k, top-p, min-p and n, by four seeds) are sent alone, one by one, then
again and again shuffled under load. Each must give the same bytes every time; the four seeds of one setting must not
all give the same output, and neither must the n choices of one request. Seeds lie far apart, for vLLM's choice i uses
seed + i.
"""

import random

from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Ask, Planned, Site, Wave, Waves, words

SETTINGS: tuple[dict[str, float | int], ...] = (
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 1.0, "n": 4},
    {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "n": 4},
)
_SEEDS = 4
_SEED_STEP = 1000
CASES = len(SETTINGS) * _SEEDS


def _repeats(settings: Settings) -> int:
    return max(2, settings.sampled_prompts // _cases(settings))


def _cases(settings: Settings) -> int:
    return min(CASES, settings.sampled_prompts // 2)


def count(settings: Settings, site: Site) -> int:
    """How many requests the arm sends."""
    return _cases(settings) * _repeats(settings)


def waves(settings: Settings, site: Site) -> Waves:
    """Every case alone, then all cases together, shuffled, as often as ``--sampled-prompts`` allows."""
    rng = random.Random(f"sampled {settings.seed}")
    prompt = "Continue this list of words: " + words(rng, 24)
    first_seed = rng.randrange(2**20)

    def planned(case: int, suffix: str) -> Planned:
        setting = SETTINGS[case // _SEEDS]
        sampling = {**setting, "seed": first_seed + _SEED_STEP * case}
        ask = Ask(prompt, settings.max_tokens, settings.logprobs or None, sampling)
        family = " ".join(f"{name}={value}" for name, value in setting.items())
        return Planned(f"sampled-{case:02d}-{suffix}", ask, family=family)

    cases = range(_cases(settings))
    yield Wave("alone", [planned(case, "alone") for case in cases], 1)
    together = [planned(case, f"{repeat:03d}") for repeat in range(1, _repeats(settings)) for case in cases]
    rng.shuffle(together)
    yield Wave("together", together, settings.max_concurrency)
