"""Every endpoint, as a client sees it."""

import asyncio
import json
from typing import Any

import pytest

from vllm_deterministic import __version__
from vllm_deterministic.verify.record import RunRecord

from ..verify.fake_server import FakeServer
from .conftest import SMALL, Serve, listening

ID = "0" * 32


async def test_a_pure_target_is_found_identical(serve: Serve) -> None:
    async with listening(FakeServer()) as url, serve(f"one={url}") as service:
        created = await service.client.post("/v1/verifications", json=SMALL)
        assert created.status_code == 202
        place = created.headers["location"]
        assert place == f"/v1/verifications/{created.json()['id']}"
        found = await service.until(created.json()["id"])
        assert (found["status"], found["trigger"], found["targets"]) == ("identical", "request", ["one"])
        (result,) = found["results"]
        assert result["fingerprints"] == ["fp-0"]
        (arm,) = result["arms"]
        assert (arm["compared"], arm["unique_outputs"], arm["divergent"]) == (20, 1, 0)
        assert found["created_at"] <= found["started_at"] <= found["finished_at"]
        record = RunRecord.model_validate((await service.client.get(f"{place}/record")).json())
        assert record.arm("identical").compared == 20
        page = await service.client.get(f"{place}/report")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "<!doctype html>" in page.text.lower()


async def test_a_target_that_varies_is_found_diverged_and_so_is_its_report(serve: Serve) -> None:
    async with (
        listening(FakeServer()) as good,
        listening(FakeServer(swap_token_beyond=2)) as bad,
        serve(f"good={good}", f"bad={bad}") as service,
    ):
        found = await service.verify()
        assert found["status"] == "diverged"
        assert {result["target"]: result["status"] for result in found["results"]} == {
            "good": "identical",
            "bad": "diverged",
        }
        assert found["message"].startswith("bad: 1 of 1 arms failed")
        place = f"/v1/verifications/{found['id']}"
        worst = (await service.client.get(f"{place}/record")).json()
        assert worst["status"] == "diverged"
        assert "iverged" in (await service.client.get(f"{place}/report")).text
        good_one = (await service.client.get(f"{place}/record", params={"target": "good"})).json()
        assert good_one["status"] == "identical"


async def test_prompts_are_kept_only_where_asked(serve: Serve) -> None:
    async with listening(FakeServer()) as url, serve(url) as service:
        kept = {}
        for keep in (False, True):
            id = (await service.verify(keep_prompts=keep))["id"]
            record = (await service.client.get(f"/v1/verifications/{id}/record")).json()
            kept[keep] = record["arms"][0]["groups"][0]["prompt"]
    assert kept[True].startswith("Continue this list of words")
    assert kept[False] == f"request {record['arms'][0]['groups'][0]['key']}"


async def test_the_history_is_told_page_by_page_the_newest_first(serve: Serve) -> None:
    async with listening(FakeServer()) as url, serve(url) as service:
        ids = [(await service.verify())["id"] for _ in range(3)]
        first = (await service.client.get("/v1/verifications", params={"limit": 2})).json()
        assert [item["id"] for item in first["items"]] == ids[:0:-1]
        rest = await service.client.get("/v1/verifications", params={"limit": 2, "before": first["next"]})
        assert ([item["id"] for item in rest.json()["items"]], rest.json()["next"]) == (ids[:1], None)
        for status, count in (("identical", 3), ("diverged", 0)):
            page = await service.client.get("/v1/verifications", params={"status": status})
            assert len(page.json()["items"]) == count


async def test_one_verification_at_a_time_on_a_target_and_a_queue_of_bounded_length(serve: Serve) -> None:
    async with (
        listening(FakeServer(hang_after=1)) as slow,
        listening(FakeServer()) as free,
        serve(f"slow={slow}", f"free={free}", max_queue=2) as service,
    ):
        first = await service.start(targets=["slow"])
        await service.until(first, "running")
        waiting = [await service.start(targets=["slow"]) for _ in range(2)]
        refused = await service.client.post("/v1/verifications", json=SMALL | {"targets": ["slow"]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["content-type"] == "application/problem+json"
        await service.client.delete(f"/v1/verifications/{waiting[1]}")
        assert (await service.until(waiting[1]))["status"] == "cancelled"
        assert (await service.verify(targets=["free"]))["status"] == "identical"
        assert (await service.get(waiting[0]))["status"] == "queued"
        assert (await service.get(first))["status"] == "running"


async def test_a_cancelled_run_keeps_what_it_found(serve: Serve) -> None:
    server = FakeServer(hang_after=9)
    async with listening(server) as url, serve(url) as service:
        id = await service.start()
        while len(server.seen) < 12:
            await asyncio.sleep(0.05)
        answer = await service.client.delete(f"/v1/verifications/{id}")
        assert answer.status_code == 202
        found = await service.until(id)
        assert found["status"] == "cancelled"
        assert found["message"].startswith("Cancelled. Stopped before the end. So far 8 of 20")
        assert found["results"][0]["arms"][0]["answered"] == 8
        again = await service.client.delete(f"/v1/verifications/{id}")
        assert (again.status_code, again.json()["title"]) == (409, "Conflict")


async def test_a_run_that_takes_too_long_is_stopped(serve: Serve) -> None:
    async with listening(FakeServer(hang_after=9)) as url, serve(url, max_duration="2s") as service:
        found = await service.verify()
    assert found["status"] == "interrupted"
    assert found["message"].startswith("Stopped after 2 s (--max-duration).")


async def test_progress_is_told_as_it_happens_and_the_result_at_the_end(serve: Serve) -> None:
    async with listening(FakeServer(latency_s=0.05)) as url, serve(url) as service:
        id = await service.start(num_prompts=100)
        stream = await service.client.get(f"/v1/verifications/{id}/events", timeout=30)
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = _events(stream.text)
        assert [name for name, _ in events[:-1]] == ["progress"] * (len(events) - 1)
        done = [told["progress"][0]["done"] for _, told in events[:-1] if told["progress"]]
        assert len(done) > 3
        assert done == sorted(done)
        assert (events[-1][0], events[-1][1]["status"]) == ("result", "identical")
        late = _events((await service.client.get(f"/v1/verifications/{id}/events")).text)
        assert late == [events[-1]]


def _events(text: str) -> list[tuple[str, Any]]:
    events = []
    for block in text.replace("\r\n", "\n").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            events.append((fields["event"], json.loads(fields["data"])))
    return events


async def test_health_is_told_always_and_readiness_by_the_targets(serve: Serve) -> None:
    async with listening(FakeServer()) as url:
        async with serve(f"up={url}", "down=http://127.0.0.1:9") as service:
            assert (await service.client.get("/health")).json() == {"status": "ok"}
            await _until_probed(service.state.probe)
            answer = await service.client.get("/ready")
            assert answer.status_code == 503
            assert answer.json() == {"status": "not ready", "targets": {"up": True, "down": False}}
            up, down = (await service.client.get("/v1/targets")).json()["items"]
            assert (up["ready"], up["model"]) == (True, "fake")
            assert "Connection refused" in down["detail"]
        async with serve(f"up={url}") as service:
            await _until_probed(service.state.probe)
            answer = await service.client.get("/ready")
            assert (answer.status_code, answer.json()["status"]) == (200, "ready")
            version = (await service.client.get("/version")).json()
            assert version["version"] == __version__


async def _until_probed(probe: Any) -> None:
    async with asyncio.timeout(10):
        while any("not been asked" in state.detail for state in probe.states):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        (b"{", "body", "JSON"),
        (b"[]", "body", "object"),
        (b'{"num_prompts": "many"}', "num_prompts", "integer"),
        (b'{"num_prompts": 1}', "num_prompts", "greater than or equal to 2"),
        (b'{"num_prompts": -5}', "num_prompts", "greater than or equal to 2"),
        (b'{"num_prompts": 6000}', "num_prompts", "this service allows 5000 (--max-requests)"),
        (b'{"sampled_prompts": 100000}', "sampled_prompts", "--max-requests"),
        (b'{"max_concurrency": 257}', "max_concurrency", "at most 256 (--max-concurrency)"),
        (b'{"max_tokens": 300}', "max_tokens", "at most 256 (--max-tokens)"),
        (b'{"max_tokens": 1e400}', "max_tokens", "integer"),
        (b'{"timeout": NaN}', "timeout", ""),
        (b'{"arms": ["identical", "sideways"]}', "arms.1", "'identical', 'mixed', 'prefix' or 'sampled'"),
        (b'{"arms": []}', "arms", "at least 1"),
        (b'{"targets": ["http://evil"]}', "targets", "no target has this name; there are one"),
        (b'{"targets": ["one", "one"]}', "body", "twice"),
        (b'{"endpoint": "/etc/passwd"}', "endpoint", "/v1/chat/completions"),
        (b'{"base_url": "http://evil"}', "base_url", "not permitted"),
    ],
)
async def test_a_wrong_field_is_named(serve: Serve, body: bytes, field: str, said: str) -> None:
    async with serve("one=http://127.0.0.1:9") as service:
        answer = await service.client.post(
            "/v1/verifications", content=body, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 422
    assert problem["errors"][0]["field"] == field
    assert said in problem["errors"][0]["message"]
    assert "evil" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/v1/verifications/{ID}", 404),
        ("GET", f"/v1/verifications/{ID}/events", 404),
        ("GET", f"/v1/verifications/{ID}/report", 404),
        ("GET", f"/v1/verifications/{ID}/record", 404),
        ("DELETE", f"/v1/verifications/{ID}", 404),
        ("GET", "/v1/verifications/%00", 404),
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/verifications", 405),
        ("GET", "/v1/verifications?limit=0", 422),
        ("GET", "/v1/verifications?limit=many", 422),
        ("GET", f"/v1/verifications?before={10**30}", 422),
        ("GET", "/v1/verifications?status=fine", 422),
    ],
)
async def test_what_is_not_there_or_not_right_is_a_problem(serve: Serve, method: str, path: str, status: int) -> None:
    async with serve("one=http://127.0.0.1:9") as service:
        answer = await service.client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
