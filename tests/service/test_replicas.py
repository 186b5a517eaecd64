"""Several targets are held against each other: the same fingerprint and the same bytes are expected."""

from typing import Any

from vllm_deterministic.service.replicas import compare_replicas
from vllm_deterministic.service.schema import ReplicaResult
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from ..verify.fake_server import FakeServer


async def compared(**servers: FakeServer) -> ReplicaResult:
    given: dict[str, Any] = {"arms": ["identical", "sampled"], "num_prompts": 8, "sampled_prompts": 48}
    records = {
        name: await verify(Settings(base_url=f"http://{name}", **given), transport=server.transport())
        for name, server in servers.items()
    }
    return compare_replicas(records)


async def test_equal_replicas_agree() -> None:
    result = await compared(a=FakeServer(), b=FakeServer(), c=FakeServer())
    assert (result.status, result.fingerprints_agree, result.compared_requests) == ("identical", True, 25)
    assert result.message == "The targets agree on the usual answer to each of 25 distinct requests."


async def test_a_replica_that_answers_otherwise_is_named_with_the_place() -> None:
    result = await compared(a=FakeServer(swap_token_of=lambda _: True), b=FakeServer(), c=FakeServer())
    assert (result.status, result.differing) == ("diverged", 25)
    assert result.message == "a answered 25 of 25 distinct requests otherwise than the other targets."
    first = result.differences[0]
    assert (first.target, first.reference, first.position) == ("a", "b", 8)
    assert len(result.differences) == 20


async def test_one_bit_of_a_logprob_is_a_difference() -> None:
    result = await compared(a=FakeServer(), b=FakeServer(vary_logprob_beyond=0))
    assert result.status == "diverged"
    assert (result.differences[0].position, result.differences[0].logprob_position) == (None, 1)


async def test_other_fingerprints_are_named() -> None:
    result = await compared(a=FakeServer(), b=FakeServer(fingerprints=("fp-1",)))
    assert (result.status, result.fingerprints_agree) == ("identical", False)
    assert result.message.endswith("a has fp-0; b has fp-1.")


async def test_without_an_answer_of_all_there_is_nothing_to_compare() -> None:
    result = await compared(a=FakeServer(), b=FakeServer(status_after=(0, 500)))
    assert result.status == "incomplete"
