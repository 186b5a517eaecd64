"""Servers that fail: the run ends with a clear message, exit code 2, and the results so far."""

import asyncio
from typing import Any

import httpx
import pytest

from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from .fake_server import FakeServer


async def _verify(server: FakeServer, **given: Any) -> RunRecord:
    small: dict[str, Any] = {"num_prompts": 40, "max_concurrency": 4, "arms": ["identical"]}
    settings = Settings.model_validate({"base_url": "http://fake", **small, **given})
    return await verify(settings, transport=server.transport())


@pytest.mark.parametrize(
    ("server", "given", "message"),
    [
        (FakeServer(answers_before_death=20), {}, "broke the connection"),
        (FakeServer(status_after=(20, 500)), {}, "answered 500: planted. See the server's log"),
        (FakeServer(status_after=(20, 503)), {}, "answered 503: planted."),
        (FakeServer(status_after=(20, 429)), {}, "answered 429: planted. The server limits the load: lower --max-con"),
        (FakeServer(status_after=(20, 400)), {}, "answered 400: planted."),
        (FakeServer(invalid_json_after=20), {}, "invalid JSON"),
        (FakeServer(hang_after=20), {"timeout": 0.3}, "did not answer within 0.3 s. Raise --timeout"),
        (FakeServer(logprobs_until=20), {}, "was answered without logprobs"),
    ],
)
async def test_a_failure_half_way_keeps_the_results_so_far(
    server: FakeServer, given: dict[str, Any], message: str
) -> None:
    record = await _verify(server, **given)
    assert (record.status, record.exit_code) == ("error", 2)
    assert message in record.message
    assert "of 40 requests were answered; no answer differed." in record.message
    assert "\n" not in record.message
    arm = record.arm("identical")
    assert arm.status == "incomplete"
    assert 10 <= arm.compared < 40
    assert arm.unique_outputs == 1


@pytest.mark.parametrize(
    ("server", "given", "message"),
    [
        (FakeServer(logprobs=False), {}, "no logprobs for 'fake'. Turn them on at the server, or compare tokens alone"),
        (FakeServer(), {"model": "nope"}, "serves no model 'nope'. Give --model one of: fake, other."),
        (FakeServer(key="right"), {"api_key": "wrong"}, "answered 401: Incorrect API key. Give the server's key"),
        (FakeServer(starting_for=9), {}, "answered 503: starting."),
        (FakeServer(chat_only=True), {}, "/v1/completions answered 404: Not Found."),
        (
            FakeServer(chat_only=True),
            {"endpoint": "/v1/chat/completions", "arms": ["identical", "prefix"]},
            "The arm 'prefix' needs /v1/completions; leave it out with --arms identical.",
        ),
        (FakeServer(status_after=(0, 400)), {}, "answered 400: planted. Check --extra-body"),
        (FakeServer(invalid_json_after=0), {}, "Check that --base-url names an OpenAI-compatible server"),
    ],
)
async def test_a_server_that_cannot_be_verified_is_refused_before_the_first_arm(
    server: FakeServer, given: dict[str, Any], message: str
) -> None:
    record = await _verify(server, **given)
    assert (record.status, record.exit_code) == ("error", 2)
    assert message in record.message
    assert record.message.endswith("Nothing was compared.")
    assert record.arms == []


@pytest.mark.parametrize("page", ["[]", '{"data": {}}', '{"data": [{}]}', "<html>hello</html>", '{"data": []}'])
async def test_what_is_no_model_server_is_told_apart(page: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=page))
    record = await verify(Settings(base_url="http://fake"), transport=transport)
    assert record.exit_code == 2
    assert "http://fake/v1/models" in record.message


async def test_nothing_listening_is_said_plainly() -> None:
    record = await verify(Settings(base_url="http://127.0.0.1:9"))
    assert record.message.startswith("Cannot connect to http://127.0.0.1:9 (")
    assert "Start the server, or correct --base-url" in record.message


async def test_the_ready_check_waits_for_a_server_that_starts() -> None:
    record = await _verify(FakeServer(starting_for=3), ready_check_timeout_sec=2)
    assert record.status == "identical"


async def test_a_mismatch_before_a_failure_is_still_reported() -> None:
    record = await _verify(FakeServer(status_after=(20, 500), swap_token_of=lambda incoming: incoming.number == 5))
    assert record.exit_code == 2
    assert "1 of 1 arms failed: identical." in record.message
    assert record.arm("identical").status == "diverged"


async def test_an_event_stops_the_run() -> None:
    stop = asyncio.Event()
    server = FakeServer(latency_s=0.02)
    settings = Settings(base_url="http://fake", max_concurrency=4)
    asyncio.get_running_loop().call_later(0.3, stop.set)
    record = await verify(settings, stop=stop, transport=server.transport())
    assert (record.status, record.exit_code) == ("interrupted", 2)
    assert 0 < record.arm("identical").compared < 1000
    assert record.message.startswith("Stopped before the end. So far ")
    assert server.in_flight == 0


async def test_cancelling_the_run_is_passed_on() -> None:
    task = asyncio.create_task(verify(Settings(base_url="http://fake"), transport=FakeServer().transport()))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
