"""Whole verifications against the fake server: clean, and with each fault that an arm is there to find."""

from typing import Any

import pytest

from vllm_deterministic.verify.record import ArmRecord, RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import ArmName, Settings

from .fake_server import FakeServer, Incoming


async def _verify(server: FakeServer, *arms: ArmName, **given: Any) -> RunRecord:
    small: dict[str, Any] = {"num_prompts": 40, "mixed_prompts": 8, "max_concurrency": 8, "sampled_prompts": 48}
    small |= {"kv_split": 64, "chunk_budget": 128}
    settings = Settings.model_validate({"base_url": "http://fake", **small, "arms": arms or None, **given})
    return await verify(settings, transport=server.transport())


def _kinds(arm: ArmRecord) -> list[str]:
    return [failure.kind for failure in arm.failures]


def _differences(arm: ArmRecord) -> list[Any]:
    return [v.difference for group in arm.groups for v in group.variants if v.difference is not None]


ALL: tuple[ArmName, ...] = ("identical", "mixed", "prefix", "sampled")


async def test_a_pure_server_is_identical_in_every_arm() -> None:
    server = FakeServer()
    record = await _verify(server, *ALL)
    assert (record.status, record.exit_code) == ("identical", 0)
    assert [arm.name for arm in record.arms] == list(ALL)
    for arm in record.arms:
        assert (arm.status, arm.failures, arm.divergent) == ("identical", [], 0)
        assert (arm.unique_outputs, arm.unique_logprobs) == (1, 1)
        assert arm.answered == arm.planned
    assert record.arm("identical").compared == 40
    assert record.arm("mixed").compared == 8
    assert server.most_in_flight <= 8
    assert record.notes == []


async def test_the_record_tells_what_was_asked_of_whom() -> None:
    record = await _verify(FakeServer(), "identical", metadata={"gpu": "none"})
    assert record.server.model == "fake"
    assert record.server.version == "0.32.0+fake"
    assert (record.server.max_model_len, record.server.block_size) == (4096, 16)
    assert record.server.system_fingerprints == ["fp-0"]
    assert record.metadata == {"gpu": "none"}
    assert "--arms identical" in record.command
    arm = record.arm("identical")
    assert arm.output_tokens == 40 * 16
    assert arm.latency is not None
    assert 0 < arm.latency.p50 <= arm.latency.p99 <= arm.latency.max
    (group,) = arm.groups
    (variant,) = group.variants
    assert (group.count, variant.count, variant.requests) == (40, 40, [])
    assert variant.choices[0].token_ids is not None
    assert variant.choices[0].logprobs is not None
    assert len(variant.choices[0].token_ids) == len(variant.choices[0].logprobs) == 16


async def test_cache_hits_are_counted_phase_by_phase() -> None:
    record = await _verify(FakeServer(), "prefix")
    phases = {phase.name: phase for phase in record.arm("prefix").phases}
    for name in ("cold", "cold together", "afresh"):
        assert phases[name].prefix_cache_hits == phases[name].cached_tokens == 0
    for name in ("growing", "warm", "turn 2", "turn 3"):
        hits, queries = phases[name].prefix_cache_hits, phases[name].prefix_cache_queries
        assert hits is not None
        assert queries is not None
        assert 0.6 < hits / queries < 1
        assert phases[name].cached_tokens == hits


async def test_one_bit_of_one_logprob_under_load_is_found() -> None:
    record = await _verify(FakeServer(vary_logprob_beyond=1), "mixed")
    arm = record.arm("mixed")
    assert record.exit_code == 1
    assert _kinds(arm) == ["logprobs_differ"]
    assert (arm.unique_outputs, arm.unique_logprobs) == (1, 2)
    (difference,) = _differences(arm)
    assert (difference.position, difference.logprob_position) == (None, 1)
    assert 0 < difference.logprob_delta < 1e-6


async def test_a_token_swapped_under_load_is_found_with_its_place_gap_and_neighbours() -> None:
    record = await _verify(FakeServer(swap_token_beyond=3), "mixed")
    arm = record.arm("mixed")
    assert _kinds(arm) == ["outputs_differ"]
    assert arm.unique_outputs == 2
    (difference,) = _differences(arm)
    assert difference.position == 8
    assert difference.gap == pytest.approx(1 / 8)
    (variant,) = [variant for variant in arm.groups[0].variants if variant.requests]
    assert variant.count == len(variant.requests) == arm.divergent
    times = {request.id: request for request in arm.requests}
    for divergent in variant.requests:
        assert len(divergent.beside) >= 3
        assert divergent.id not in divergent.beside
        assert any(name.startswith("mixed-neighbour") for name in divergent.beside)
        for name in divergent.beside:
            assert times[name].sent_s < times[divergent.id].finished_s
            assert times[name].finished_s > times[divergent.id].sent_s


async def test_one_bad_answer_of_many_is_named() -> None:
    server = FakeServer(swap_token_of=lambda incoming: incoming.number == 30)
    arm = (await _verify(server, "identical")).arm("identical")
    assert (arm.unique_outputs, arm.divergent) == (2, 1)
    assert arm.failures[0].message == "the request got different outputs: 1 of 40 answers differ"


async def test_a_token_swapped_on_a_cache_hit_is_found() -> None:
    record = await _verify(FakeServer(swap_token_on_cache_hit=True), "prefix")
    arm = record.arm("prefix")
    assert _kinds(arm) == ["outputs_differ"]
    divergent = {request.id for group in arm.groups for v in group.variants for request in v.requests}
    assert {"prefix-0-17-growing", "prefix-0-129-warm"} <= divergent
    assert not any(name.endswith("-cold") for name in divergent)


async def test_a_fault_at_one_boundary_length_alone_is_found() -> None:
    def at_chunk(incoming: Incoming) -> bool:
        return len(incoming.body["prompt"]) == 129 and incoming.cached_tokens > 0

    arm = (await _verify(FakeServer(swap_token_of=at_chunk), "prefix")).arm("prefix")
    divergent = {request.id for group in arm.groups for v in group.variants for request in v.requests}
    assert divergent == {"prefix-0-129-growing", "prefix-0-129-warm"}


async def test_a_conversation_that_reads_what_decoding_wrote_is_held_against_a_fresh_one() -> None:
    def second_turn(incoming: Incoming) -> bool:
        return "talk" in incoming.body.get("cache_salt", "") and incoming.cached_tokens > 0

    arm = (await _verify(FakeServer(swap_token_of=second_turn), "prefix")).arm("prefix")
    assert _kinds(arm) == ["outputs_differ"]
    assert all("talk" in request.id for group in arm.groups for v in group.variants for request in v.requests)


async def test_the_same_request_is_compared_across_arms() -> None:
    server = FakeServer(swap_token_of=lambda incoming: incoming.number > 40)  # the probe and 40 identical ones
    record = await _verify(server, "identical", "mixed")
    assert record.arm("identical").status == "identical"
    mixed = record.arm("mixed")
    assert mixed.failures[0].message == "the request got different outputs: 8 of 8 answers differ"
    assert mixed.unique_outputs == 2


async def test_seeds_without_effect_are_a_failure_of_their_own_kind() -> None:
    record = await _verify(FakeServer(ignore_seeds=True), "sampled")
    arm = record.arm("sampled")
    assert record.exit_code == 1
    assert set(_kinds(arm)) == {"seeds_have_no_effect"}
    assert "4 different seeds gave the same output" in arm.failures[0].message
    assert arm.unique_outputs == 1


async def test_equal_choices_are_a_failure_of_their_own_kind() -> None:
    arm = (await _verify(FakeServer(equal_choices=True), "sampled")).arm("sampled")
    assert _kinds(arm) == ["choices_are_equal"]


async def test_a_seed_that_does_not_hold_is_found() -> None:
    arm = (await _verify(FakeServer(unstable_seeds=True), "sampled")).arm("sampled")
    assert "outputs_differ" in _kinds(arm)
    assert arm.divergent == 24


async def test_without_token_ids_texts_are_compared_and_the_record_says_so() -> None:
    clean = await _verify(FakeServer(token_ids=False), *ALL)
    assert clean.status == "identical"
    assert clean.server.tells_token_ids is False
    assert any("texts were compared" in note for note in clean.notes)
    assert any("prompts are words" in note for note in clean.notes)
    faulty = await _verify(FakeServer(token_ids=False, swap_token_beyond=3), "mixed")
    assert _kinds(faulty.arm("mixed")) == ["outputs_differ"]


async def test_a_server_that_refuses_vllms_fields_is_asked_without_them() -> None:
    server = FakeServer(extensions=False, token_ids=False, metrics=False)
    record = await _verify(server, *ALL)
    assert record.status == "identical"
    assert record.server.vllm_request_fields is False
    assert any("refuses vLLM's request fields" in note for note in record.notes)
    assert all(phase.prefix_cache_hits is None for phase in record.arm("prefix").phases)


async def test_the_chat_endpoint_is_verified_too() -> None:
    server = FakeServer()
    record = await _verify(server, *ALL, endpoint="/v1/chat/completions")
    assert record.status == "identical"
    paths = {(incoming.path, "cache_salt" in incoming.body) for incoming in server.seen}
    assert ("/v1/chat/completions", False) in paths
    assert ("/v1/completions", True) in paths  # the arm prefix, for exact lengths
    faulty = await _verify(FakeServer(swap_token_beyond=3), "mixed", endpoint="/v1/chat/completions")
    assert _kinds(faulty.arm("mixed")) == ["outputs_differ"]


async def test_without_logprobs_tokens_alone_are_compared_when_asked_for() -> None:
    record = await _verify(FakeServer(logprobs=False, vary_logprob_beyond=1), *ALL, logprobs=0)
    assert record.status == "identical"
    assert any("--logprobs 0" in note for note in record.notes)


async def test_refused_neighbours_do_not_end_the_run() -> None:
    record = await _verify(FakeServer(refuse_neighbours=True), "mixed", mixed_prompts=12)
    arm = record.arm("mixed")
    assert record.status == "identical"
    assert arm.refused > 0
    assert arm.answered + arm.refused == arm.planned
    assert any(f"refused {arm.refused} neighbours" in note for note in record.notes)


async def test_a_prefix_cache_that_is_off_is_noted() -> None:
    record = await _verify(FakeServer(block_size=10**6), "prefix", block_size=16)
    assert record.status == "identical"
    assert any("found nothing in its prefix cache" in note for note in record.notes)


async def test_several_fingerprints_are_noted() -> None:
    record = await _verify(FakeServer(fingerprints=("fp-0", "fp-1")), "identical")
    assert record.server.system_fingerprints == ["fp-0", "fp-1"]
    assert any("2 system fingerprints" in note for note in record.notes)


async def test_the_request_rate_paces_the_requests() -> None:
    record = await _verify(FakeServer(), "identical", num_prompts=20, request_rate=40)
    sent = sorted(request.sent_s for request in record.arm("identical").requests)
    assert sent[-1] - sent[0] > 0.15


async def test_settings_travel_in_every_body() -> None:
    server = FakeServer()
    await _verify(server, "identical", ignore_eos=True, extra_body={"user": "me"}, model="other")
    assert all(
        (incoming.body["ignore_eos"], incoming.body["user"], incoming.body["model"]) == (True, "me", "other")
        for incoming in server.seen
    )


async def test_two_runs_share_no_prefix_cache() -> None:
    server = FakeServer()
    for _ in range(2):
        record = await _verify(server, "prefix")
        assert record.arm("prefix").phases[0].prefix_cache_hits == 0
