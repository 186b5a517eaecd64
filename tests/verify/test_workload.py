"""The four arms as what they are: generators of waves, run here without any server."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from vllm_deterministic.verify import identical, mixed, prefix, sampled
from vllm_deterministic.verify.completion import Choice, Completion
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Ask, Planned, Site, Wave, Waves, request_body, request_key, target

SETTINGS = Settings(base_url="http://fake")
SITE = Site(max_model_len=4096, block_size=16, alphabet=tuple(range(100, 140)))
TEXT_SITE = Site(max_model_len=None, block_size=None, alphabet=(), extensions=False)
ARMS = [identical, mixed, prefix, sampled]


def _answer(planned: Planned) -> Completion:
    return Completion((Choice(" answer", (7, 8, 9), "length", None),))


def _all(waves: Waves, answer: Callable[[Planned], Completion] = _answer) -> list[Wave]:
    sent = []
    try:
        wave = next(waves)
        while True:
            sent.append(wave)
            wave = waves.send({planned.id: answer(planned) for planned in wave.requests})
    except StopIteration:
        return sent


def _requests(waves: list[Wave]) -> list[Planned]:
    return [planned for wave in waves for planned in wave.requests]


@pytest.mark.parametrize("site", [SITE, TEXT_SITE, Site(max_model_len=64), Site(max_model_len=8)])
@pytest.mark.parametrize("arm", ARMS)
def test_arms_send_what_they_announce_each_request_under_its_own_name(arm: Any, site: Site) -> None:
    requests = _requests(_all(arm.waves(SETTINGS, site)))
    assert len(requests) == arm.count(SETTINGS, site)
    assert len({planned.id for planned in requests}) == len(requests)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_follow_from_the_seed(arm: Any) -> None:
    def sent(seed: int) -> list[Wave]:
        return _all(arm.waves(SETTINGS.model_copy(update={"seed": seed}), SITE))

    assert sent(1) == sent(1)
    assert sent(1) != sent(2)


def test_identical_and_mixed_have_the_same_target() -> None:
    compared = [
        planned.ask
        for arm in (identical, mixed)
        for planned in _requests(_all(arm.waves(SETTINGS, SITE)))
        if planned.compared
    ]
    assert set(map(id, compared)) != {id(compared[0])}
    assert all(ask == target(SETTINGS) for ask in compared)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 14, 100, 101])
def test_mixed_sends_as_many_targets_as_asked(count: int) -> None:
    requests = _requests(_all(mixed.waves(SETTINGS.model_copy(update={"mixed_prompts": count}), SITE)))
    assert sum(planned.compared for planned in requests) == count


def test_mixed_climbs_the_ladder_of_neighbours() -> None:
    waves = _all(mixed.waves(SETTINGS, SITE))
    neighbours = [sum(not planned.compared for planned in wave.requests) for wave in waves]
    assert neighbours[:7] == [0, 1, 2, 5, 17, 64, 0]
    small = _all(mixed.waves(SETTINGS.model_copy(update={"max_concurrency": 4}), SITE))
    assert max(sum(not planned.compared for planned in wave.requests) for wave in small) == 2


def test_mixed_neighbours_are_a_varied_crowd() -> None:
    requests = _requests(_all(mixed.waves(SETTINGS, SITE)))
    strangers = [planned for planned in requests if not planned.compared]
    assert len({planned.ask.prompt for planned in strangers}) == len(strangers)
    assert len({planned.ask.logprobs for planned in strangers}) == 4
    for name in ("top_p", "top_k", "min_p", "presence_penalty"):
        assert 0.2 < sum(name in planned.ask.sampling for planned in strangers) / len(strangers) < 0.6
    assert len({planned.delay for planned in requests}) == len(requests)


def test_mixed_targets_take_turns_with_a_cache_of_their_own() -> None:
    targets = [planned for planned in _requests(_all(mixed.waves(SETTINGS, SITE))) if planned.compared]
    salts = [planned.salt for planned in targets if planned.salt]
    assert len(salts) == len(set(salts)) == len(targets) // 2


def test_prefix_lengths_lie_around_every_boundary() -> None:
    assert prefix.lengths(SETTINGS, SITE) == [1, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049]
    assert prefix.lengths(SETTINGS, TEXT_SITE) == prefix.lengths(SETTINGS, SITE)
    own = SETTINGS.model_copy(update={"block_size": 128, "kv_split": 64, "chunk_budget": 512})
    assert prefix.lengths(own, SITE) == [1, 63, 64, 65, 127, 128, 129, 511, 512, 513]


def test_prefix_stays_within_the_context_and_says_what_it_leaves_out() -> None:
    site = Site(max_model_len=300, block_size=16, alphabet=SITE.alphabet)
    for planned in _requests(_all(prefix.waves(SETTINGS, site))):
        assert len(planned.ask.prompt) + planned.ask.max_tokens <= 300
    (sentence,) = prefix.untested(SETTINGS, site)
    assert "chunk boundary (2048 tokens)" in sentence
    assert prefix.untested(SETTINGS, SITE) == []


def test_prefix_prompts_share_their_start_up_to_the_boundary_and_no_further() -> None:
    cold = {planned.id: planned.ask.prompt for planned in _all(prefix.waves(SETTINGS, SITE))[0].requests}
    longest = cold["prefix-0-2049-cold"]
    assert isinstance(longest, tuple)
    for length in prefix.lengths(SETTINGS, SITE):
        assert cold[f"prefix-0-{length}-cold"] == longest[:length]
        tail = cold[f"prefix-0-{length}-tail-cold"]
        assert tail[:length] == longest[:length]
        assert len(tail) == length + 5


def test_prefix_sends_every_prompt_cold_and_warm() -> None:
    waves = {wave.phase: wave for wave in _all(prefix.waves(SETTINGS, SITE))}
    prompts = {phase: {planned.ask.prompt for planned in wave.requests} for phase, wave in waves.items()}
    assert prompts["cold"] == prompts["growing"] == prompts["warm"] == prompts["cold together"]
    for phase in ("cold", "cold together", "afresh"):
        salts = {planned.salt for planned in waves[phase].requests}
        assert len(salts) == len(waves[phase].requests)
    assert {planned.salt for phase in ("growing", "warm") for planned in waves[phase].requests} == {"prefix-0"}
    assert waves["growing"].concurrency == waves["cold"].concurrency == 1


@pytest.mark.parametrize("site", [SITE, TEXT_SITE])
def test_prefix_conversations_grow_by_the_answer_and_are_asked_afresh(site: Site) -> None:
    waves = {wave.phase: wave for wave in _all(prefix.waves(SETTINGS, site))}
    turns = [[planned.ask.prompt for planned in waves[f"turn {turn}"].requests] for turn in (1, 2, 3)]
    for earlier, later in pairwise(turns):
        for before, after in zip(earlier, later, strict=True):
            answered = f"{before}  answer" if isinstance(before, str) else (*before, 7, 8, 9)
            assert after[: len(answered)] == answered
            assert len(after) > len(answered)
    assert {prompt for turn in turns for prompt in turn} == {planned.ask.prompt for planned in waves["afresh"].requests}


def test_prefix_conversations_start_where_the_answer_crosses_a_boundary() -> None:
    first = next(wave for wave in _all(prefix.waves(SETTINGS, SITE)) if wave.phase == "turn 1")
    lengths = [len(planned.ask.prompt) for planned in first.requests]
    assert lengths == [8, 248, 2040]


def test_sampled_repeats_every_seed_and_keeps_seeds_apart() -> None:
    alone, together = _all(sampled.waves(SETTINGS, SITE))
    assert alone.concurrency == 1
    assert len(together.requests) == 3 * len(alone.requests)
    seeds = sorted(planned.ask.sampling["seed"] for planned in alone.requests)
    most_choices = max(planned.ask.sampling.get("n", 1) for planned in alone.requests)
    assert most_choices == 4
    assert min(b - a for a, b in pairwise(seeds)) >= most_choices
    temperatures = {planned.ask.sampling["temperature"] for planned in alone.requests}
    assert (min(temperatures), max(temperatures)) == (0.7, 1.3)
    families = [planned.family for planned in alone.requests]
    assert all(families.count(family) == 4 for family in families)


def test_a_body_for_vllm_asks_for_token_ids() -> None:
    ask = Ask((1, 2), 8, 5, {"temperature": 0.0, "top_k": 3})
    body = request_body(ask, "m", SETTINGS, chat=False, extensions=True)
    assert body == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 8,
        "stream": False,
        "temperature": 0.0,
        "top_k": 3,
        "logprobs": 5,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def test_a_body_for_another_server_keeps_to_openais_fields() -> None:
    ask = Ask("hello", 8, 5, {"temperature": 0.0, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1})
    settings = SETTINGS.model_copy(update={"extra_body": {"user": "me"}})
    assert request_body(ask, "m", settings, chat=True, extensions=False) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "stream": False,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 5,
        "user": "me",
    }


def test_the_key_of_a_request_leaves_out_the_cache_salt_alone() -> None:
    body = {"prompt": "a", "seed": 1}
    assert request_key(body) == request_key(body | {"cache_salt": "x"}) == request_key({"seed": 1, "prompt": "a"})
    assert request_key(body) != request_key(body | {"seed": 2})
