"""Where settings come from, and what is said of wrong ones."""

import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from vllm_deterministic.service.settings import ServiceSettings

from .conftest import COMMAND, TOKEN

URL = "http://127.0.0.1:8000"


def test_options_come_before_variables_and_variables_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(f"target: [one={URL}]\nport: 1\nhost: localhost\nevery: 10m\nshare: 0.5\n")
    monkeypatch.setenv("VLLM_DETERMINISTIC_PORT", "2")
    monkeypatch.setenv("VLLM_DETERMINISTIC_HOST", "127.0.0.2")
    monkeypatch.setenv("VLLM_DETERMINISTIC_TOKEN", TOKEN)
    settings = ServiceSettings.load({"port": 3}, file)
    assert (settings.port, settings.host, settings.share) == (3, "127.0.0.2", 0.5)
    assert settings.every == timedelta(minutes=10)
    assert settings.token is not None
    assert settings.token.get_secret_value() == TOKEN
    assert TOKEN not in repr(settings)


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        (URL, "127.0.0.1:8000", URL),
        ("http://[::1]:8000/v1/", "[::1]:8000", "http://[::1]:8000"),
        (f"blue={URL}", "blue", URL),
        ("http://gateway/vllm?a=b", "gateway", "http://gateway/vllm?a=b"),
    ],
)
def test_a_target_is_a_url_with_or_without_a_name(text: str, name: str, url: str) -> None:
    (target,) = ServiceSettings.load({"target": [text]}).target
    assert (target.name, target.url) == (name, url)


def test_targets_of_a_variable_and_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(f"target:\n  - {{name: a, url: '{URL}', model: m, api_key: secret}}\n")
    (target,) = ServiceSettings.load({}, file).target
    assert (target.name, target.model) == ("a", "m")
    assert target.api_key is not None
    monkeypatch.setenv("VLLM_DETERMINISTIC_TARGET", f"a={URL}, b=http://other:8000")
    assert [target.name for target in ServiceSettings.load({}, file).target] == ["a", "b"]


def test_the_share_bounds_what_the_schedule_sends_at_a_time() -> None:
    given: dict[str, Any] = {"target": [URL], "every": "1m", "share": 0.05, "capacity": 100}
    assert ServiceSettings.load(given).scheduled_concurrency == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--target: at least one is needed"),
        ({"target": []}, "--target"),
        ({"target": ["nonsense"]}, "--target: url: 'nonsense' is not a URL"),
        ({"target": ["http://user:secret@host"]}, "--target: url: it holds a user name or a password"),
        ({"target": [URL, URL]}, "two targets are called '127.0.0.1:8000'"),
        ({"host": ""}, "--host: '' is not a host name"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets other machines start load"),
        ({"host": "example.org"}, "--host example.org lets other machines start load"),
        ({"port": 70000}, "--port: input should be less than or equal to 65535, not 70000"),
        ({"token": "short"}, "--token: at least 16 printable ASCII characters"),
        ({"token": "a token with spaces inside"}, "--token: at least 16 printable ASCII characters"),
        ({"every": "10"}, "--every: '10' is not a duration"),
        ({"every": "0s"}, "--every: '0s' is out of range"),
        ({"every": f"{10**12}d"}, "is out of range"),
        ({"every": "1m", "share": 0.001}, "--share 0.001 of --capacity 256 is less than 2 requests"),
        ({"share": 0}, "--share: input should be greater than 0"),
        ({"max_queue": 0}, "--max-queue: input should be greater than or equal to 1, not 0"),
        ({"keep_days": -1}, "--keep-days"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        ServiceSettings.load({"target": [URL]} | given if given else {})
    assert said in str(refused.value)
    assert "short" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_non_loopback_address_is_taken_with_a_token_or_when_told_so() -> None:
    for more in ({"token": TOKEN}, {"allow_no_token": True}):
        assert ServiceSettings.load({"target": [URL], "host": "0.0.0.0", **more}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a list", "it holds no settings"),
        ("a: [", "it is no YAML"),
        (b"\xff\xfe\xfa", "it is no YAML"),
        ("tokn: x", "'tokn' is not a setting"),
        ("target: [{name: a}]", "--target: url: Field required"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str | bytes, said: str) -> None:
    file = tmp_path / "service.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        ServiceSettings.load({}, file)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "nonsense"], "Error: --target: url:"),
        (["--target", URL, "--config", "/nowhere.yaml"], "Error: --config /nowhere.yaml: No such file"),
        (["--target", URL, "--database", "/nowhere/runs.db"], "Error: --database /nowhere/runs.db: unable to open"),
        (["--target", URL, "--host", "192.0.2.1", "--token", TOKEN], "Error: --host 192.0.2.1 --port 8090: Cannot"),
        (["--target", URL, "--every", "1h", "--max-requests", "50"], "Error: --every: the verification would send"),
        (["--target", URL, "--port", "seven"], "Invalid value for '--port'"),
    ],
)
def test_the_command_ends_with_2_and_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run([COMMAND, "service", *words], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
