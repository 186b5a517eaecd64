"""The fingerprint in every response of a real server, and the coverage over HTTP and in its file."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_deterministic.local_server import LocalServer
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from .conftest import starter

COMPLETION = {"prompt": "The river", "max_tokens": 3, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 3, "temperature": 0}
COVERAGE = "/plugins/deterministic/coverage"


def post(server: LocalServer, path: str, body: dict[str, Any]) -> httpx.Response:
    response = httpx.post(f"{server.base_url}{path}", json={"model": "tiny", **body}, timeout=300, trust_env=False)
    assert response.status_code == 200, response.text
    return response


def fingerprint(server: LocalServer, path: str = "/v1/completions", body: dict[str, Any] = COMPLETION) -> str:
    value: str = post(server, path, body).json()["system_fingerprint"]
    return value


def streamed_fingerprints(server: LocalServer, path: str, body: dict[str, Any]) -> set[str]:
    lines = post(server, path, {**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return {chunk["system_fingerprint"] for chunk in chunks if chunk.get("system_fingerprint")}


def test_every_response_carries_it(server: LocalServer) -> None:
    value = fingerprint(server)
    assert value.startswith("det-")
    assert len(value) == len("det-") + 32
    assert fingerprint(server, "/v1/chat/completions", CHAT) == value
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert streamed_fingerprints(server, path, body) == {value}
        assert streamed_fingerprints(server, path, {**body, "stream_options": {"include_usage": True}}) == {value}


def test_verify_records_it(server: LocalServer) -> None:
    record = asyncio.run(
        verify(Settings(base_url=server.base_url, arms=("identical",), num_prompts=4, max_concurrency=2, max_tokens=3))
    )
    assert record.server.system_fingerprints == [fingerprint(server)]


@pytest.fixture(scope="module")
def replica(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalServer, Path]]:
    """A second server of the same model, with other chunks and blocks, and with the endpoint switched on."""
    folder = tmp_path_factory.mktemp("replica")
    (folder / "logs").mkdir()
    path = folder / "coverage.json"
    with ExitStack() as stack:
        start = starter(stack, model, folder / "logs")
        args = ("--deterministic-coverage-file", str(path), "--max-num-batched-tokens", "512", "--block-size", "32")
        yield start(*args, core=1, env={"VLLM_PLUGINS": "deterministic"}), path


def test_replica_has_the_same(server: LocalServer, replica: tuple[LocalServer, Path]) -> None:
    assert fingerprint(replica[0]) == fingerprint(server)


def test_coverage_over_http_and_in_the_file(server: LocalServer, replica: tuple[LocalServer, Path]) -> None:
    started, path = replica
    told = httpx.get(f"{started.base_url}{COVERAGE}", trust_env=False).json()
    assert told == json.loads(path.read_text())
    assert told["deterministic"]
    assert told["fingerprint"]["value"] == fingerprint(started)
    assert {entry["part"] for entry in told["entries"]} >= {"modules", "attention", "sampler", "collectives"}
    assert "every part is covered" in started.log.read_text()
    assert httpx.get(f"{server.base_url}{COVERAGE}", trust_env=False).status_code == 404
