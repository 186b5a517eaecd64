"""What users' clients see: the official `openai` package, plain and asynchronous, whole and streamed."""

import asyncio
import json
from typing import Any

import openai

from vllm_deterministic.local_server import LocalServer

ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me of the river."}],
    "temperature": 1.0,
    "seed": 5,
    "max_tokens": 16,
    "logprobs": True,
    "top_logprobs": 5,
}


def _tokens(content: Any) -> list[Any]:
    return [(t.token, t.logprob, [(top.token, top.logprob) for top in t.top_logprobs]) for t in content]


def _whole(answer: Any) -> tuple[str, list[Any]]:
    choice = answer.choices[0]
    return choice.message.content, _tokens(choice.logprobs.content)


def _joined(chunks: list[Any]) -> tuple[str, list[Any]]:
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, [token for choice in choices if choice.logprobs for token in _tokens(choice.logprobs.content)]


async def _four_ways_at_once(base_url: str) -> list[tuple[str, list[Any]]]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:

        async def whole() -> tuple[str, list[Any]]:
            return _whole(await client.chat.completions.create(**ASKED))

        async def streamed() -> tuple[str, list[Any]]:
            return _joined([chunk async for chunk in await client.chat.completions.create(**ASKED, stream=True)])

        return await asyncio.gather(whole(), streamed(), whole(), streamed())


def test_openai_client_sync_async_and_streaming(server: LocalServer) -> None:
    base_url = f"{server.base_url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        expected = _whole(client.chat.completions.create(**ASKED))
        streamed = _joined(list(client.chat.completions.create(**ASKED, stream=True)))
    assert len(expected[1]) == 16
    assert streamed == expected
    assert asyncio.run(_four_ways_at_once(base_url)) == [expected] * 4


def test_openai_completions(server: LocalServer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0, "logprobs": 3}
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        whole = client.completions.create(**asked).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True) if chunk.choices]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    logprobs = [value for chunk in chunks if chunk.logprobs for value in chunk.logprobs.token_logprobs]
    assert logprobs == whole.logprobs.token_logprobs


def test_structured_output_keeps_to_its_schema(expected: dict[str, str]) -> None:
    choice = json.loads(expected["schema"])[0]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"])["n"], int)
    assert choice["message"]["content"].lstrip().startswith("{")
