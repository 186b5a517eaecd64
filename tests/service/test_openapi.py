"""The API against its own description: schemathesis tries what the description allows and what it does not."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from ..verify.fake_server import FakeServer
from .conftest import TOKEN, Process

# Not checked: that whatever the description allows is accepted (limits and targets come from the settings), and that
# whatever it does not is refused (unknown query parameters and headers are let pass).
NOT_CHECKED = [positive_data_acceptance, negative_data_rejection]
ENDPOINTS = {
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/v1/targets"),
    ("GET", "/v1/verifications"),
    ("POST", "/v1/verifications"),
    ("GET", "/v1/verifications/{id}"),
    ("DELETE", "/v1/verifications/{id}"),
    ("GET", "/v1/verifications/{id}/events"),
    ("GET", "/v1/verifications/{id}/report"),
    ("GET", "/v1/verifications/{id}/record"),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    database = tmp_path_factory.mktemp("openapi") / "runs.db"
    with FakeServer().listen() as url, Process(database, "--target", f"one={url}", "--max-requests", "150") as process:
        yield process


@pytest.fixture(scope="module")
def described(service: Process) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json", headers=dict(service.client.headers))


def test_every_endpoint_and_error_is_described(service: Process) -> None:
    description = service.client.get("/openapi.json").json()
    operations = {
        (method.upper(), path): operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    assert operations.keys() == ENDPOINTS
    for (_, path), operation in operations.items():
        open_to_all = path in ("/health", "/ready", "/metrics")
        assert operation["security"] == ([] if open_to_all else [{"token": []}])
        assert open_to_all or "application/problem+json" in operation["responses"]["401"]["content"]
        assert operation["description"]
    assert "HTTPValidationError" not in description["components"]["schemas"]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_description_knows(
    service: Process, described: schemathesis.BaseSchema, mode: GenerationMode
) -> None:
    tried = set()
    for result in described.get_all_operations():
        operation = result.ok()

        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            tried.add((case.method, case.path))
            headers = {"Authorization": f"Bearer {TOKEN}"}
            case.call_and_validate(headers=headers, timeout=30, excluded_checks=NOT_CHECKED)

        if mode is GenerationMode.POSITIVE or operation.path_parameters or operation.query or operation.body:
            check()
    assert tried <= ENDPOINTS
    assert ("POST", "/v1/verifications") in tried
    assert service.client.get("/health").is_success
