import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from vllm_deterministic.verify.settings import OutputSpec, Settings, explain

URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_url": "localhost:8000"}, "--base-url: 'localhost:8000' is not a URL"),
        ({"base_url": "http://"}, "is not a URL"),
        ({"base_url": "http://host:99999"}, "is not a URL"),
        ({"base_url": "http://user:secret@host"}, "--api-key"),
        ({"endpoint": "/v1/embeddings"}, "/v1/completions or /v1/chat/completions"),
        ({"arms": ["identical", "mixd"]}, "--arms: 'mixd' is not an arm; choose from identical, mixed"),
        ({"arms": []}, "--arms"),
        ({"num_prompts": 1}, "--num-prompts: input should be greater than or equal to 2, not 1"),
        ({"max_concurrency": 0}, "--max-concurrency"),
        ({"request_rate": 0}, "--request-rate"),
        ({"request_rate": float("nan")}, "--request-rate"),
        ({"timeout": float("inf")}, "--timeout"),
        ({"logprobs": 21}, "--logprobs"),
        ({"extra_body": "{"}, "--extra-body: it is not valid JSON"),
        ({"extra_body": "[]"}, "JSON object"),
        ({"extra_body": {"n": 2}}, "n cannot be set here"),
        ({"metadata": ["novalue"]}, "--metadata: 'novalue' is not of the form KEY=VALUE"),
        ({"max_tokens": 2}, "--max-tokens 4 or more"),
        ({"seed": "x"}, "--seed"),
    ],
)
def test_wrong_values_are_named_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Settings.model_validate({"base_url": URL} | given)
    assert message in explain(error.value)
    assert "\n" not in explain(error.value)
    assert "secret" not in explain(error.value)


def test_reads_what_the_command_line_gives() -> None:
    settings = Settings.model_validate(
        {"base_url": URL + "/v1/", "extra_body": '{"top_p": 0.5}', "metadata": ["gpu=H200", "note=a=b"]}
    )
    assert settings.base_url == URL
    assert settings.extra_body == {"top_p": 0.5}
    assert settings.metadata == {"gpu": "H200", "note": "a=b"}


def test_command_line_repeats_the_run_without_the_key() -> None:
    settings = Settings(
        base_url=URL,
        arms=("mixed", "prefix"),
        extra_body={"a": 1},
        metadata={"k": "two words"},
        api_key=SecretStr("sk"),
    )
    words = shlex.split(settings.command_line())
    assert words[:2] == ["vllm-deterministic", "verify"]
    assert words[words.index("--arms") + 1] == "mixed,prefix"
    assert words[words.index("--metadata") + 1] == "k=two words"
    assert "sk" not in words
    assert "--num-prompts" not in words


def test_reads_outputs(tmp_path: Path) -> None:
    assert OutputSpec.parse("kind=console") == OutputSpec(kind="console", path=None)
    assert OutputSpec.parse(f"kind=json,path={tmp_path}/a.json").path == tmp_path / "a.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("json", "not of the form"),
        ("kind=json,path", "not of the form"),
        ("kind=json,file=x", "not of the form"),
        ("kind=pdf,path=x", "'pdf' is not a kind of output"),
        ("kind=png,path=x", "'png' is not a kind of output; choose one of console, json, html"),
        ("kind=html", "needs a path"),
        ("kind=json,path=/no/such/place/x.json", "does not exist"),
        ("kind=json,path=/", "is a directory"),
    ],
)
def test_wrong_outputs_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputSpec.parse(text)
