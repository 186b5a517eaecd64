"""The arm ``prefix``: what the prefix cache, a split of the KV or a chunk of prefill may cut must not show in the
answer.

All prompts of a round start with the same tokens. For each length of that start (one less, equal and one more than the
block size, the split size and the chunk budget; and 1) there is a prompt that ends there and one that goes its own way
from there. Each is sent four times: ``cold`` (alone, nothing cached), ``growing`` (shortest first in one shared cache,
so that each finds the start the one before it left), ``warm`` (all together, all cached) and ``cold together``. Then
conversations that cross each boundary while decoding: each answer is appended to the prompt and asked again out of the
cache, and later all turns are sent ``afresh``.

Prompts are lists of token ids to ``/v1/completions``, whatever ``--endpoint`` says, so that lengths are exact. To a
server that does not tell token ids they are words, and the lengths are only near.
"""

import random

from vllm_deterministic.verify.completion import Completion
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Ask, Planned, Prompt, Site, Wave, Waves, words

_DEFAULT_BLOCK = 16
_TAIL = 5  # tokens after a shared start; also what a user says between two answers
_TURNS = 3

Pieces = tuple[int | str, ...]


def boundaries(settings: Settings, site: Site) -> dict[str, int]:
    """The boundaries that prompts are built around, by name, in tokens."""
    block = settings.block_size or site.block_size or _DEFAULT_BLOCK
    return {"block": block, "split": settings.kv_split, "chunk": settings.chunk_budget}


def lengths(settings: Settings, site: Site) -> list[int]:
    """The lengths of the shared start, ascending, as far as the model's context allows."""
    sizes = {1} | {size + step for size in boundaries(settings, site).values() for step in (-1, 0, 1)}
    return sorted(size for size in sizes if size >= 1 and _fits(size + _TAIL, 1, settings, site))


def untested(settings: Settings, site: Site) -> list[str]:
    """A sentence for each boundary that lies beyond the model's context."""
    return [
        f"prefix: the {name} boundary ({size} tokens) is beyond the model's context of {site.max_model_len}: untested."
        for name, size in boundaries(settings, site).items()
        if not _fits(size + 1 + _TAIL, 1, settings, site)
    ]


def count(settings: Settings, site: Site) -> int:
    """How many requests the arm sends."""
    prompts = 2 * len(lengths(settings, site))
    return settings.prefix_rounds * (4 * prompts + 2 * _TURNS * len(_openings(settings, site)))


def waves(settings: Settings, site: Site) -> Waves:
    """The rounds, each with its own shared start."""
    for number in range(settings.prefix_rounds):
        yield from _boundary_waves(number, settings, site)
        yield from _conversation_waves(number, settings, site)


def _boundary_waves(number: int, settings: Settings, site: Site) -> Waves:
    rng = random.Random(f"prefix {settings.seed} {number}")
    sizes = lengths(settings, site)
    if not sizes:
        return
    start = _pieces(rng, site, sizes[-1])
    prompts: dict[str, Pieces] = {}
    for size in sizes:
        prompts[f"{size}"] = start[:size]
        prompts[f"{size}-tail"] = start[:size] + _pieces(rng, site, _TAIL)
    asks = {name: _ask(pieces, settings) for name, pieces in prompts.items()}

    def planned(phase: str, *, own_cache: bool) -> list[Planned]:
        shared = f"prefix-{number}"
        return [
            Planned(f"prefix-{number}-{name}-{phase}", ask, f"{shared}-{name}-{phase}" if own_cache else shared)
            for name, ask in asks.items()
        ]

    yield Wave("cold", planned("cold", own_cache=True), 1)
    yield Wave("growing", planned("growing", own_cache=False), 1)
    yield Wave("warm", planned("warm", own_cache=False), settings.max_concurrency)
    yield Wave("cold together", planned("cold-together", own_cache=True), settings.max_concurrency)


def _conversation_waves(number: int, settings: Settings, site: Site) -> Waves:
    rng = random.Random(f"conversation {settings.seed} {number}")
    talks = {
        f"prefix-{number}-talk-{name}": _pieces(rng, site, size) for name, size in _openings(settings, site).items()
    }
    asked: dict[str, Ask] = {}
    for turn in range(1, _TURNS + 1):
        asks = {f"{name}-turn-{turn}": _ask(pieces, settings) for name, pieces in talks.items()}
        asked |= asks
        requests = [Planned(name, ask, f"talk-{number}") for name, ask in asks.items()]
        answers = yield Wave(f"turn {turn}", requests, settings.max_concurrency)
        talks = {
            name: pieces + _answer(answers[f"{name}-turn-{turn}"], site) + _pieces(rng, site, _TAIL)
            for name, pieces in talks.items()
        }
    afresh = [Planned(f"{name}-afresh", ask, f"{name}-afresh") for name, ask in asked.items()]
    yield Wave("afresh", afresh, settings.max_concurrency)


def _openings(settings: Settings, site: Site) -> dict[str, int]:
    """First prompts that end so shortly before each boundary that the answer crosses it."""
    sizes = {name: max(1, size - settings.max_tokens // 2) for name, size in boundaries(settings, site).items()}
    return {name: size for name, size in sizes.items() if _fits(size, _TURNS, settings, site)}


def _fits(size: int, turns: int, settings: Settings, site: Site) -> bool:
    needed = size + turns * settings.max_tokens + (turns - 1) * _TAIL
    return site.max_model_len is None or needed <= site.max_model_len


def _ask(pieces: Pieces, settings: Settings) -> Ask:
    return Ask(_prompt(pieces), settings.max_tokens, settings.logprobs or None, {"temperature": 0.0})


def _prompt(pieces: Pieces) -> Prompt:
    ids = tuple(piece for piece in pieces if isinstance(piece, int))
    return ids if ids else " ".join(str(piece) for piece in pieces)


def _pieces(rng: random.Random, site: Site, length: int) -> Pieces:
    """Tokens, or words where the server told no token ids."""
    if site.alphabet:
        return tuple(rng.choices(site.alphabet, k=length))
    return tuple(words(rng, length).split())


def _answer(completion: Completion, site: Site) -> Pieces:
    choice = completion.choices[0]
    return choice.token_ids if site.alphabet and choice.token_ids is not None else (choice.text,)
