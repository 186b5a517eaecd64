from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_deterministic.lab import console, html
from vllm_deterministic.lab.record import Finding, FloatRecord, ReductionRecord
from vllm_deterministic.lab.view import number, view

STUDIES = ("rmsnorm", "matmul", "attention", "float")


@pytest.fixture(params=STUDIES)
def study(request: pytest.FixtureRequest, record: Callable[[str], Any]) -> Any:
    """The record of each study."""
    return record(request.param)


def test_json_round_trip(study: Any) -> None:
    assert type(study).model_validate_json(study.model_dump_json()) == study
    other = ReductionRecord if isinstance(study, FloatRecord) else FloatRecord
    with pytest.raises(ValidationError):
        other.model_validate_json(study.model_dump_json())
    assert {"processor", "cores", "python", "system"} <= study.environment.keys()


def test_every_report_names_every_strategy_claim_and_the_machine(study: Any) -> None:
    for page in (console.render(study), html.render(study)):
        words = " ".join(page.replace("&#39;", "'").split())
        for bar in view(study).bars:
            assert bar.name in words
        for finding in study.findings:
            assert finding.claim in words
        assert study.environment["processor"] in words


def test_the_console_says_the_verdict(record: Callable[[str], Any]) -> None:
    lines = console.render(record("matmul")).splitlines()
    assert next(line for line in lines if line.startswith(" fixed tile")).endswith("batch-invariant ")
    assert next(line for line in lines if line.startswith(" segments that")).endswith("run-to-run only ")


def test_a_contradicted_claim_is_said_so(record: Callable[[str], Any]) -> None:
    claims = [Finding(claim=f"claim {held}", held=held, measured="1 of 2") for held in (True, False, None)]
    study = record("matmul").model_copy(update={"findings": claims})
    text = console.render(study)
    for line in ("held: claim True", "not so: claim False", "undecided: claim None"):
        assert line in text
    assert '<span class="not-so">Not so:</span> claim False' in html.render(study)


def test_a_page_needs_nothing_but_itself(study: Any) -> None:
    page = html.render(study)
    assert "http" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_a_picture_is_written(study: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vllm_deterministic.lab.picture import draw

    draw(study, tmp_path / "study.png")
    content = (tmp_path / "study.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width == 1120
    assert height > 400


def test_numbers_have_two_digits() -> None:
    assert [number(value) for value in (0.0523, 8.44, 15.5, 123.4)] == ["0.052", "8.4", "16", "120"]
