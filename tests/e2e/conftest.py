"""Real servers, `vllm serve` over HTTP, and one catalogue of requests that all must answer with the same bytes."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="needs the extra 'cpu'")

from vllm_deterministic.local_server import LocalServer
from vllm_deterministic.tiny_model.config import ModelConfig
from vllm_deterministic.tiny_model.write import write_tiny_model

COMMON = ("--dtype", "float32", "--served-model-name", "tiny", "--max-model-len", "1024")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e") / "model"
    write_tiny_model(folder, ModelConfig(hidden_size=256, num_layers=2))
    return folder


Serve = Callable[..., LocalServer]


def starter(stack: ExitStack, model: Path, logs: Path) -> Serve:
    """A function that starts servers which end with ``stack``."""

    def start(
        *args: str, core: int = 0, deterministic: bool = True, compiled: bool = False, **changes: Any
    ) -> LocalServer:
        flags = [*COMMON, *args]
        flags += ["--enable-deterministic"] if deterministic else []
        flags += [] if compiled else ["--enforce-eager"]
        # One core for each server, so that two run side by side.
        env = {"VLLM_CPU_OMP_THREADS_BIND": str(core), **changes.pop("env", {})}
        log = logs / f"server-{len(list(logs.iterdir()))}.log"
        return stack.enter_context(LocalServer(model, flags, log=log, env=env, kv_cache_bytes=1 << 28, **changes))

    return start


@pytest.fixture
def serve(model: Path, tmp_path: Path) -> Iterator[Serve]:
    with ExitStack() as stack:
        yield starter(stack, model, tmp_path)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "serve.yaml"
    path.write_text("enable-deterministic: true\ndeterministic-kv-split: 256\nmax-num-batched-tokens: 4096\n")
    return path


@pytest.fixture(scope="session")
def server(model: Path, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The server that most tests ask: prompts in one chunk, prefix cache on, flag from a YAML file."""
    with ExitStack() as stack:
        start = starter(stack, model, tmp_path_factory.mktemp("server"))
        yield start("--config", str(config_file), "--enable-prompt-tokens-details", deterministic=False)


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n"]}


def _ids(length: int) -> list[int]:
    return [100 + (length * 7 + i * 13) % 3000 for i in range(length)]


def _catalogue() -> dict[str, tuple[str, dict[str, Any]]]:
    def completion(prompt: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 5, "ignore_eos": True, **fields}
        return "/v1/completions", body

    def chat(text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **fields}
        return "/v1/chat/completions", {"logprobs": True, "top_logprobs": 5, **body}

    lengths = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 600)
    return {
        **{f"greedy, {length} tokens": completion(_ids(length)) for length in lengths},
        "seed": completion("The river", temperature=0.9, seed=11),
        "top-k": completion("The river", temperature=1.1, seed=21, top_k=20),
        "top-p": completion("The river", temperature=1.0, seed=31, top_p=0.8),
        "top-k, top-p and min-p": completion("The house", temperature=1.3, seed=41, top_k=50, top_p=0.9, min_p=0.02),
        "four choices": completion("The house", temperature=1.0, seed=51, n=4),
        "no seed": completion("The house", temperature=1.0, n=2),
        "long and seeded": completion(_ids(300), temperature=1.0, seed=61),
        "penalties": completion("a a a a", presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.2),
        "logit bias": completion("The house", logit_bias={"300": 5.0, "301": -100.0}),
        "bad words": completion("The house", bad_words=["the", "a"], temperature=0.8, seed=71),
        "prompt logprobs": completion(_ids(70), prompt_logprobs=3),
        "chat": chat("Say something."),
        "chat, seeded": chat("Say something else.", temperature=1.0, seed=81),
        "schema": chat(
            "Name and number.",
            max_tokens=40,
            temperature=1.0,
            seed=91,
            response_format={"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA}},
        ),
    }


class Catalogue:
    """The requests, and ways to ask them. An answer is its choices as canonical JSON: equal text is equal bytes."""

    requests = _catalogue()

    async def _ask(self, client: httpx.AsyncClient, name: str) -> str:
        path, body = self.requests[name]
        response = await client.post(path, json={"model": "tiny", "return_token_ids": True, **body})
        assert response.status_code == 200, f"{name}: {response.text}"
        return json.dumps(response.json()["choices"], sort_keys=True)

    def alone(self, server: LocalServer) -> dict[str, str]:
        """Each request by itself."""

        async def run() -> dict[str, str]:
            async with _client(server) as client:
                return {name: await self._ask(client, name) for name in self.requests}

        return asyncio.run(run())

    def crowded(self, server: LocalServer, *, times: int = 2, seed: int = 0) -> dict[str, set[str]]:
        """All requests several times at once, in random order: the different answers to each."""

        async def run() -> dict[str, set[str]]:
            order = list(self.requests) * times
            random.Random(seed).shuffle(order)
            async with _client(server) as client:
                answers = await asyncio.gather(*[self._ask(client, name) for name in order])
            return {name: {a for n, a in zip(order, answers, strict=True) if n == name} for name in self.requests}

        return asyncio.run(run())


def _client(server: LocalServer) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=64)
    return httpx.AsyncClient(base_url=server.base_url, timeout=300, limits=limits, trust_env=False)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return Catalogue()


@pytest.fixture(scope="session")
def expected(server: LocalServer, catalogue: Catalogue) -> dict[str, str]:
    """What the first server answers to each request by itself."""
    return catalogue.alone(server)


def differing(expected: dict[str, str], answers: dict[str, set[str]] | dict[str, str]) -> list[str]:
    """The names of the requests whose answers are not the expected one."""
    return [
        name
        for name, answer in answers.items()
        if {expected[name]} != ({answer} if isinstance(answer, str) else answer)
    ]


def metric(server: LocalServer, name: str) -> float:
    """The sum of a counter over its labels, from `/metrics`."""
    text = httpx.get(f"{server.base_url}/metrics", trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    assert lines, f"no metric {name}"
    return sum(float(line.rpartition(" ")[2]) for line in lines)
