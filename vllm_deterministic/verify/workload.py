"""What an arm sends: requests gathered in waves, free of any server or endpoint.

An arm is a generator. It yields a `Wave`, gets back the answers of its compared requests by id, and may build the next
wave from them. The runner alone does the sending.
"""

import hashlib
import json
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_deterministic.verify.completion import TOKEN_IDS, Completion
from vllm_deterministic.verify.settings import Settings

Prompt = str | tuple[int, ...]

_VOCABULARY = """
river stone window garden letter silver engine market bridge candle forest harbor island jacket kettle ladder mirror
needle orange pencil quarry ribbon saddle tunnel velvet walnut yellow anchor basket copper desert ember feather
glacier hammer insect journal kitchen lantern meadow number ocean paper quiet road salt timber under valley winter
year zero about before between could every found great hand idea just know light make never often people question
right small three until voice water young because through
"""
_WORDS = tuple(_VOCABULARY.split())


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``sampling`` holds OpenAI and vLLM field names; ``logprobs`` None asks for none."""

    prompt: Prompt
    max_tokens: int
    logprobs: int | None
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Planned:
    """A request in its place.

    ``salt`` names the prefix cache it may share: requests with different salts share nothing. ``delay`` counts from
    the start of the wave in answer times: 1.0 is as long as the server takes for a compared answer at its fastest, so
    that requests overlap on slow and fast servers alike. Requests of one ``family`` differ in the seed alone and must
    not all have the same output. An uncompared request is there for its neighbours' sake alone.
    """

    id: str
    ask: Ask
    salt: str | None = None
    delay: float = 0.0
    family: str | None = None
    compared: bool = True


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests sent together, at most ``concurrency`` at a time; the next wave waits for the last of them."""

    phase: str
    requests: Sequence[Planned]
    concurrency: int


Answers = Mapping[str, Completion]
Waves = Generator[Wave, Answers, None]


@dataclass(frozen=True, slots=True)
class Site:
    """What an arm must know of the server: its limits, and the token ids that prompts may be made of (none: text)."""

    max_model_len: int | None = None
    block_size: int | None = None
    alphabet: tuple[int, ...] = ()
    extensions: bool = True


def words(rng: random.Random, count: int) -> str:
    """A text of ``count`` common English words: one or two tokens each, and next to nothing to foresee."""
    return " ".join(rng.choice(_WORDS) for _ in range(count))


def target(settings: Settings) -> Ask:
    """The request that the arms identical and mixed repeat: greedy, so that only arithmetic can change its answer."""
    rng = random.Random(f"target {settings.seed}")
    prompt = "Continue this list of words: " + words(rng, 24)
    return Ask(prompt, settings.max_tokens, settings.logprobs or None, {"temperature": 0.0})


def request_body(ask: Ask, model: str, settings: Settings, *, chat: bool, extensions: bool) -> dict[str, Any]:
    """The JSON body of a request.

    With ``extensions``, vLLM's fields are used: token ids are asked for, and logprobs name tokens by id, since several
    ids can have the same text and would hide one another. Without them, sampling fields that OpenAI does not know are
    left out.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": ask.max_tokens, "stream": False, **ask.sampling}
    if chat:
        body["messages"] = [{"role": "user", "content": ask.prompt}]
        if ask.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": ask.logprobs}
    else:
        body["prompt"] = list(ask.prompt) if isinstance(ask.prompt, tuple) else ask.prompt
        if ask.logprobs is not None:
            body["logprobs"] = ask.logprobs
    if extensions:
        body |= TOKEN_IDS
    else:
        body = {name: value for name, value in body.items() if name not in ("top_k", "min_p", "repetition_penalty")}
    if settings.ignore_eos:
        body["ignore_eos"] = True
    return body | settings.extra_body


def request_key(body: Mapping[str, Any]) -> str:
    """The identity of a request: equal keys must give equal answers, whatever cache they may share."""
    kept = {name: value for name, value in body.items() if name != "cache_salt"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
