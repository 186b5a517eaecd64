import json as stdlib_json
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from typer.testing import CliRunner

from vllm_deterministic.cli import app
from vllm_deterministic.report import json
from vllm_deterministic.verify.record import SCHEMA_VERSION

from .conftest import Recorded

SHIPPED = files("vllm_deterministic.report").joinpath("run-record.schema.json").read_text()


def test_the_shipped_schema_is_that_of_the_models() -> None:
    assert json.schema() == SHIPPED, (
        "run `python -m vllm_deterministic.report.json > vllm_deterministic/report/run-record.schema.json` "
        "and mind SCHEMA_VERSION"
    )


@pytest.mark.parametrize(
    "faults", [{}, {"swap_token_beyond": 3}, {"status_after": (8, 500)}, {"logprobs": False}, {"ignore_seeds": True}]
)
async def test_records_keep_to_the_schema_and_survive_the_file(recorded: Recorded, faults: dict[str, object]) -> None:
    record = await recorded(**faults)
    text = json.render(record)
    Draft202012Validator(stdlib_json.loads(SHIPPED)).validate(stdlib_json.loads(text))
    assert json.load(text) == record
    assert stdlib_json.loads(text)["schema_version"] == SCHEMA_VERSION


async def test_logprobs_survive_to_the_bit(recorded: Recorded) -> None:
    record = await recorded(vary_logprob_beyond=2)
    group = next(group for group in json.load(json.render(record)).arm("mixed").groups if len(group.variants) > 1)
    first, second = (variant.choices[0].logprobs for variant in group.variants)
    assert first is not None
    assert second is not None
    assert first[1].logprob != second[1].logprob


async def test_records_of_another_major_version_are_refused(recorded: Recorded) -> None:
    text = json.render(await recorded(settings={"arms": ["identical"]}))
    with pytest.raises(ValidationError):
        json.load(text.replace(f'"schema_version":"{SCHEMA_VERSION}"', '"schema_version":"2.0"'))
    newer = text.replace(f'"schema_version":"{SCHEMA_VERSION}"', '"schema_version":"1.9","added_later":1')
    assert json.load(newer).status == "identical"


async def test_the_report_command_renders_a_saved_record(recorded: Recorded, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    saved.write_text(json.render(await recorded(settings={"arms": ["identical"]})))
    done = CliRunner().invoke(
        app, ["report", str(saved), "--output", "kind=console", f"kind=html,path={tmp_path}/r.html"]
    )
    assert done.exit_code == 0
    assert "Verdict: identical." in done.stdout
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "is no run record"), ("no", "is no run record"), (None, "cannot read")]
)
def test_the_report_command_refuses_what_is_no_record(tmp_path: Path, content: str | None, message: str) -> None:
    saved = tmp_path / "run.json"
    if content is not None:
        saved.write_text(content)
    done = CliRunner().invoke(app, ["report", str(saved)])
    assert done.exit_code == 2
    assert message in done.stderr
