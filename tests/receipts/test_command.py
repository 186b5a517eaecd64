"""Both commands as a user runs them: processes, their exit codes, what they print and write."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_deterministic.certify.whole_file import write_whole
from vllm_deterministic.cli import app

from .fake_server import COMPLETION, ReceiptServer, swap

COMMAND = Path(sys.executable).with_name("vllm-deterministic")
NOWHERE = "http://127.0.0.1:9"


def environment(**changes: str) -> dict[str, str]:
    hidden = ("OPENAI_API_KEY", "VLLM_DETERMINISTIC_API_KEY", "VLLM_DETERMINISTIC_URL")
    return {name: value for name, value in os.environ.items() if name not in hidden} | changes


def run(*words: Any, given: str | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *map(str, words)], input=given, capture_output=True, text=True, timeout=60, env=environment(**changes)
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def invoke(*words: Any) -> Any:
    """The same in this process, for what ends before anything is sent."""
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(COMPLETION, indent=2))
    return path


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n\n".join(json.dumps({**COMPLETION, "seed": seed}) for seed in range(20)) + "\n")
    return path


@pytest.fixture
def receipts_file(tmp_path: Path, requests_file: Path) -> Path:
    """Twenty receipts."""
    path = tmp_path / "receipts.jsonl"
    with ReceiptServer().listen() as url:
        done = run("receipt", "--base-url", url, "--requests", requests_file, "--output", path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "receipts: 20 of 20 in" in done.stderr
    return path


def test_a_receipt_and_its_replay(request_file: Path) -> None:
    with ReceiptServer(key="sk-secret").listen() as url:
        taken = run("receipt", "--base-url", url, "--request", request_file, OPENAI_API_KEY="sk-secret")
        replayed = run("replay", "-", "--base-url", url, "--api-key", "sk-secret", given=taken.stdout)
    assert (taken.returncode, taken.stderr, taken.stdout.count("\n")) == (0, "", 1)
    assert "sk-secret" not in taken.stdout
    assert (replayed.returncode, replayed.stderr) == (0, "")
    assert replayed.stdout == "<stdin>: identical: 9 tokens and their logprobs\n"


def test_a_replay_that_diverges(tmp_path: Path, request_file: Path) -> None:
    path = tmp_path / "receipt.json"
    with ReceiptServer().listen() as url:
        run("receipt", "--base-url", url, "--request", request_file, "--token-ids", "--output", path)
    assert json.loads(path.read_text())["answer"]["choices"][0]["token_ids"]
    with ReceiptServer(edit=swap(4)).listen() as url:
        replayed = run("replay", path, VLLM_DETERMINISTIC_URL=url)
        told = run("replay", path, "--json", "--base-url", url)
    assert replayed.returncode == told.returncode == 1
    assert replayed.stdout.startswith(f"{path}: diverged at token 4 (id ")
    verdict = json.loads(told.stdout)
    assert (verdict["status"], verdict["divergence"]["position"]) == ("diverged", 4)


def test_a_batch_tells_each_in_order_and_progress_apart(receipts_file: Path) -> None:
    with ReceiptServer(swap_token_of=lambda incoming: incoming.body["seed"] in (3, 17)).listen() as url:
        done = run("replay", receipts_file, "--base-url", url, "--max-concurrency", "4")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"{receipts_file}:{n}" for n in range(1, 21)]
    assert [n for n, line in enumerate(lines[:-1]) if "diverged at token 4" in line] == [3, 17]
    assert lines[-1] == "18 identical, 2 diverged"
    assert done.stderr.startswith("replay: 20 requests\nreplay: 20 of 20 in ")


def test_json_is_all_that_goes_to_standard_output(receipts_file: Path) -> None:
    with ReceiptServer().listen() as url:
        done = run("replay", receipts_file, "--base-url", url, "--json")
    assert {json.loads(line)["status"] for line in done.stdout.splitlines()} == {"identical"}
    assert done.returncode == 0


def test_damaged_receipts_are_told_and_the_others_replayed(receipts_file: Path) -> None:
    lines = receipts_file.read_text().splitlines()
    lines[4] = lines[4].replace('"seed":4', '"seed":5')
    lines[9] = lines[9][:300]
    lines[12] = lines[12].replace('"schema_version":"1.0"', '"schema_version":"2.0"')
    receipts_file.write_text("\n".join(lines))
    before = receipts_file.read_bytes()
    server = ReceiptServer()
    with server.listen() as url:
        done = run("replay", receipts_file, "--base-url", url)
    told = done.stdout.splitlines()
    assert done.returncode == 2
    assert ":5: not replayed: it was changed or damaged since it was taken" in told[4]
    assert ":10: not replayed: it is no receipt, or cut off" in told[9]
    assert ":13: not replayed: it has schema version '2.0', and this vllm-deterministic reads 1.x" in told[12]
    assert told[-1] == "17 identical, 3 not replayed"
    assert len(server.seen) == 17
    assert receipts_file.read_bytes() == before


def test_a_file_that_is_there_is_left_alone(tmp_path: Path, request_file: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_text("mine")
    server = ReceiptServer()
    with server.listen() as url:
        done = run("receipt", "--base-url", url, "--request", request_file, "--output", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: --output: {path} is there already; nothing is written over\n"
    assert path.read_text() == "mine"
    assert server.seen == []


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_text("theirs")
    with pytest.raises(FileExistsError):
        write_whole(path, "ours", replace=False)
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(tmp_path / "other.json", "ours", replace=False)
    assert (tmp_path / "other.json").read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_half_way_writes_nothing(tmp_path: Path, requests_file: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ReceiptServer(answers_before_death=10).listen() as url:
        done = run("receipt", "--base-url", url, "--requests", requests_file, "--output", path)
        printed = run("receipt", "--base-url", url, "--requests", requests_file)
    assert (done.returncode, printed.returncode, printed.stdout) == (2, 2, "")
    assert "Error: " in done.stderr
    assert not path.exists()


def test_a_full_disk_is_no_divergence(receipts_file: Path) -> None:
    with ReceiptServer().listen() as url, Path("/dev/full").open("w") as full:
        command = [COMMAND, "replay", receipts_file, "--base-url", url]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment())
    assert done.returncode == 2
    assert done.stderr.endswith("Error: cannot write to standard output: No space left on device\n")


def test_nothing_listens(receipts_file: Path, request_file: Path) -> None:
    for words in (["replay", receipts_file], ["receipt", "--request", request_file]):
        done = run(*words, "--base-url", NOWHERE)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Error: Cannot connect to http://127.0.0.1:9 (Connection refused)." in done.stderr


def test_a_server_without_the_promise(receipts_file: Path, request_file: Path) -> None:
    with ReceiptServer(fingerprints=("vllm-0.32.0-ab12",)).listen() as url:
        replayed = run("replay", receipts_file, "--base-url", url)
        taken = run("receipt", "--request", request_file, "--base-url", url)
    assert (replayed.returncode, taken.returncode, taken.stdout) == (2, 2, "")
    assert replayed.stdout.count("'vllm-0.32.0-ab12', not one of --enable-deterministic") == 20
    assert "'vllm-0.32.0-ab12', not one of --enable-deterministic" in taken.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_tells_the_verdicts_until_then(
    receipts_file: Path, requests_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def interrupted(*words: Any) -> tuple[int, str, str]:
        server = ReceiptServer(hang_after=8)
        with server.listen() as url:
            command = [COMMAND, *map(str, words), "--base-url", url, "--max-concurrency", "2"]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            )
            wait_until(lambda: len(server.seen) >= 9)
            process.send_signal(number)
            output, errors = process.communicate(timeout=20)
        assert "Traceback" not in errors
        return process.returncode, output, errors

    code, output, errors = interrupted("replay", receipts_file)
    assert code == 2
    assert "Error: Stopped before the end. 8 of 20 receipts were replayed." in errors
    assert output.count("identical: 9 tokens") == 8
    path = tmp_path / "out.jsonl"
    code, output, errors = interrupted("receipt", "--requests", requests_file, "--output", path)
    assert (code, output) == (2, "")
    assert "Error: Stopped after 8 of 20 answers; no receipt was written." in errors
    assert not path.exists()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["receipt"], "give either --request or --requests"),
        (["receipt", "--request", "FILE", "--requests", "FILE"], "give either --request or --requests"),
        (["receipt", "--request", "/nope.json"], "No such file or directory"),
        (["receipt", "--request", "EMPTY"], "it is not valid JSON"),
        (["receipt", "--requests", "EMPTY"], "there is no request in it"),
        (["receipt", "--request", "FILE", "--output", "/no/such/dir/x"], "the directory /no/such/dir does not exist"),
        (["receipt", "--request", "FILE", "--max-concurrency", "0"], "--max-concurrency: input should be greater than"),
        (["replay", "/nope.json"], "No such file or directory"),
        (["replay", "EMPTY"], "there is no receipt in it"),
        (["replay", "FILE"], "there is no schema_version in it"),
    ],
)
def test_a_users_mistake(tmp_path: Path, request_file: Path, words: list[str], message: str) -> None:
    (tmp_path / "empty").touch()
    files = {"FILE": request_file, "EMPTY": tmp_path / "empty"}
    done = invoke(*[files.get(word, word) for word in words], "--base-url", NOWHERE)
    assert done.exit_code == 2
    assert message in done.output


def test_a_request_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": ["a", "b"]}\n')
    done = invoke("receipt", "--requests", path, "--base-url", NOWHERE)
    assert (
        done.stderr == f"Error: {path}:3: it holds 2 prompts, and a receipt is of one; give each a line of --requests\n"
    )


def test_they_need_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; import vllm_deterministic.receipts.command; "
        "print({'vllm', 'torch', 'triton', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
