"""What is sent for a request, and which are refused."""

import json
from typing import Any

import pytest

from vllm_deterministic.receipts.request import endpoint_of, read_request, to_send

from .fake_server import CHAT, COMPLETION

ADDED = {"model": "m", "return_token_ids": True, "return_tokens_as_token_ids": True}


@pytest.mark.parametrize(
    ("request_", "added"),
    [
        (COMPLETION, {"logprobs": 5}),
        ({**COMPLETION, "logprobs": None}, {"logprobs": 5}),
        ({**COMPLETION, "logprobs": 0}, {}),
        ({**COMPLETION, "logprobs": 2, "seed": 3, "user": "u"}, {}),
        (CHAT, {"logprobs": True, "top_logprobs": 5}),
        ({**CHAT, "logprobs": False}, {"logprobs": True, "top_logprobs": 5}),
        ({**CHAT, "logprobs": True}, {}),
        ({**CHAT, "logprobs": True, "top_logprobs": 2}, {}),
    ],
)
def test_only_what_is_needed_is_added(request_: dict[str, Any], added: dict[str, Any]) -> None:
    sent = to_send(request_, "m")
    assert sent == {**request_, **added, **ADDED}
    assert to_send(sent, "m") == sent


def test_streaming_is_left_out() -> None:
    streamed = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    assert to_send(streamed, "m") == to_send(CHAT, "m")


def test_the_endpoint_follows_from_the_request() -> None:
    assert endpoint_of(COMPLETION) == "/v1/completions"
    assert endpoint_of(CHAT) == "/v1/chat/completions"


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3], [[1, 2, 3]]])
def test_one_prompt_in_any_form(prompt: Any) -> None:
    assert read_request(json.dumps({"prompt": prompt}).encode())["prompt"] == prompt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"prompt": "a"', "not valid JSON"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "temperature": 1e999}', "not valid JSON"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ("[]", "no JSON object"),
        ("{}", "give either"),
        ('{"prompt": "a", "messages": []}', "give either"),
        ('{"prompt": ["a", "b"]}', "it holds 2 prompts"),
        ('{"prompt": [[1], [2]]}', "it holds 2 prompts"),
        ('{"prompt": "a", "echo": true}', 'leave out "echo"'),
        ('{"prompt": "a", "prompt_logprobs": 0}', 'leave out "prompt_logprobs"'),
    ],
)
def test_what_is_no_request_for_a_receipt(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_request(content.encode())
    assert "\n" not in str(raised.value)


def test_fields_that_are_off_are_no_reason_to_refuse() -> None:
    request = {"prompt": "a", "echo": False, "prompt_logprobs": None}
    assert read_request(json.dumps(request).encode()) == request
