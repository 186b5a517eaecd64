import json

import pytest

from vllm_deterministic.verify.completion import parse_completion


def _encoded(**choice: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": " a b", **choice}]}).encode()


LOGPROBS = {"tokens": [" a", " b"], "token_logprobs": [-0.1, None], "top_logprobs": [{" a": -0.1, " c": -2.5}, None]}


def test_reads_completions_and_chat_alike() -> None:
    plain = parse_completion(_encoded(token_ids=[5, 6], finish_reason="stop", logprobs=LOGPROBS))
    chat = {
        "index": 0,
        "message": {"content": " a b"},
        "finish_reason": "stop",
        "token_ids": [5, 6],
        "logprobs": {
            "content": [
                {"token": " a", "logprob": -0.1, "top_logprobs": [{"token": " a", "logprob": -0.1}]},
                {"token": " b", "logprob": -1, "top_logprobs": []},
            ]
        },
    }
    answer = parse_completion(json.dumps({"choices": [chat]}).encode())
    assert plain.choices[0].token_ids == answer.choices[0].token_ids == (5, 6)
    assert plain.choices[0].text == answer.choices[0].text == " a b"
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs[0].top == ((" a", -0.1), (" c", -2.5))
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs[1].logprob == -1.0


@pytest.mark.parametrize("number", ["-1.1920928955078125e-07", "-0.0", "-9999.0", "-2.3841855067985307e-07", "-1e-323"])
def test_keeps_every_bit_of_a_logprob(number: str) -> None:
    body = '{"choices": [{"text": "", "logprobs": {"tokens": ["x"], "token_logprobs": [%s]}}]}' % number  # noqa: UP031
    logprobs = parse_completion(body.encode()).choices[0].logprobs
    assert logprobs is not None
    assert logprobs[0].logprob is not None
    assert logprobs[0].logprob.hex() == float(number).hex()


def test_orders_choices_by_index() -> None:
    body = {"choices": [{"index": 1, "text": "second"}, {"index": 0, "text": "first"}]}
    assert [choice.text for choice in parse_completion(json.dumps(body).encode()).choices] == ["first", "second"]


def test_reads_usage_and_fingerprint() -> None:
    body = {
        "choices": [{"text": "", "prompt_token_ids": [1, 2, 3]}],
        "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
        "system_fingerprint": "fp",
    }
    answer = parse_completion(json.dumps(body).encode())
    assert (answer.prompt_tokens, answer.cached_tokens, answer.system_fingerprint) == (3, 2, "fp")
    assert answer.prompt_token_ids == (1, 2, 3)


def test_tokens_are_the_finest_thing_told() -> None:
    assert parse_completion(_encoded(token_ids=[5, 6])).choices[0].tokens == (5, 6)
    assert parse_completion(_encoded(logprobs=LOGPROBS)).choices[0].tokens == (" a", " b")
    assert parse_completion(_encoded()).choices[0].tokens == (" ", "a", " ", "b")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "invalid JSON"),
        (b'{"choices": [{"text": "", "logprobs": {"tokens": ["a"], "token_logprobs": [NaN]}}]}', "NaN"),
        (b"\xff\xfe\x00", "invalid JSON"),
        (b"[]", "no OpenAI completion"),
        (b'{"choices": []}', "choices"),
        (b'{"choices": [{"text": 3}]}', "choices.0.text"),
        (b'{"choices": [{"text": "", "logprobs": {"tokens": ["a"], "token_logprobs": []}}]}', "lengths"),
    ],
)
def test_says_in_one_line_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_completion(body)
    assert "\n" not in str(error.value)
