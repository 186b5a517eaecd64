"""What Prometheus reads, during a service's life and after its next start."""

from prometheus_client.parser import text_string_to_metric_families

from ..verify.fake_server import FakeServer
from .conftest import Running, Serve, listening

PREFIX = "vllm_deterministic_"


async def read(service: Running) -> dict[tuple[str, str], float]:
    """Values by name and target; of several with the same, their sum."""
    page = await service.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            key = sample.name.removeprefix(PREFIX), sample.labels.get("target", "")
            values[key] = values.get(key, 0.0) + sample.value
    return values


async def test_runs_outputs_divergences_latencies_and_tokens_are_counted(serve: Serve) -> None:
    async with (
        listening(FakeServer()) as good,
        listening(FakeServer(swap_token_beyond=2)) as bad,
        serve(f"good={good}", f"bad={bad}") as service,
    ):
        found = await service.verify()
        values = await read(service)
        divergent = found["results"][1]["arms"][0]["divergent"]
        assert divergent > 0
        assert (values["divergences_total", "good"], values["divergences_total", "bad"]) == (0, divergent)
        assert (values["unique_outputs", "good"], values["unique_outputs", "bad"]) == (1, 2)
        assert (values["diverged", "good"], values["diverged", "bad"]) == (0, 1)
        assert values["runs_total", "good"] == 1
        assert values["tokens_compared_total", "good"] == 20 * 16
        assert values["answer_duration_seconds_count", "good"] == 20
        assert values["answer_duration_seconds_sum", "good"] > 20 * 0.005
        assert values["last_success_timestamp_seconds", "bad"] == 0
        success = values["last_success_timestamp_seconds", "good"]
        assert success > 0
    async with serve("good=http://127.0.0.1:9", "bad=http://127.0.0.1:9") as service:
        values = await read(service)
        assert values["last_success_timestamp_seconds", "good"] == success
        assert (values["diverged", "bad"], values["unique_outputs", "bad"]) == (1, 2)
        await service.verify(targets=["bad"])
        assert (await read(service))["diverged", "bad"] == 1  # a target that is gone is no better for it


async def test_a_target_that_is_configured_no_more_is_not_told(serve: Serve) -> None:
    async with listening(FakeServer()) as url, serve(f"old={url}") as service:
        await service.verify()
    async with serve("new=http://127.0.0.1:9") as service:
        assert not any(target == "old" for _, target in await read(service))
