"""What is sent for a user's request: the request, and what makes the server tell token ids and logprobs."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from vllm_deterministic.verify.completion import TOKEN_IDS, load_json

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]

_TOP_LOGPROBS = 5  # as many as verify compares
# The bytes of an answer are the same streamed; a receipt is taken of the whole.
_STREAMING = ("stream", "stream_options")
# Answered with numbers that no part of a receipt holds.
_NOT_COVERED = ("echo", "prompt_logprobs")


def read_request(content: bytes) -> dict[str, Any]:
    """Read the body of a request to ``/v1/completions`` or ``/v1/chat/completions``.

    Raises ValueError, in one line, where it is none that a receipt can be taken of.
    """
    try:
        request = load_json(content)
        json.dumps(request, allow_nan=False)  # 1e999 is read as infinity, which cannot be sent
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    if not isinstance(request, dict):
        raise ValueError("it is no JSON object; give the body of a request to /v1/completions or /v1/chat/completions")
    if ("prompt" in request) == ("messages" in request):
        raise ValueError('give either "prompt", for /v1/completions, or "messages", for /v1/chat/completions')
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(token, int) for token in prompt):
        raise ValueError(f"it holds {len(prompt)} prompts, and a receipt is of one; give each a line of --requests")
    for name in _NOT_COVERED:
        value = request.get(name)
        if value is not None and value is not False:
            raise ValueError(f'leave out "{name}": a receipt holds what was generated, and nothing of the prompt')
    return request


def endpoint_of(request: Mapping[str, Any]) -> Endpoint:
    """The endpoint that a request is for."""
    return "/v1/chat/completions" if "messages" in request else "/v1/completions"


def to_send(request: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The body that is sent: the request as it is, but for these fields.

    ``model`` is set. Token ids are asked for, and logprobs where the request asks for none; these name tokens by id,
    since several ids can have the same text. Streaming is left out.
    """
    body = {name: value for name, value in request.items() if name not in _STREAMING} | {"model": model}
    if "messages" in request:
        if not request.get("logprobs"):
            body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
    elif request.get("logprobs") is None:
        body["logprobs"] = _TOP_LOGPROBS
    return body | TOKEN_IDS
