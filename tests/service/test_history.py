"""What the database keeps, and what it does with one that is not right."""

import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vllm_deterministic.service.history import CRASHED, History
from vllm_deterministic.service.schema import Verification, VerificationRequest


def verification(number: int, **fields: Any) -> Verification:
    given: dict[str, Any] = {
        "id": f"{number:032x}",
        "status": "identical",
        "message": "",
        "trigger": "request",
        "request": VerificationRequest(),
        "targets": ["one"],
        "created_at": datetime.now(UTC),
    }
    return Verification(**given | fields)


async def ids(history: History) -> list[int]:
    rows, _ = await history.page(100, None, None)
    return [int(id, 16) for id, _ in rows]


async def test_a_run_and_its_records_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    history = await History.open(tmp_path / "runs.db", 10, 10)
    await history.add(verification(1, status="running"))
    await history.update(verification(1), {"one": b"record"})
    assert await history.record(verification(1).id, "one") == b"record"
    with pytest.raises(sqlite3.IntegrityError):
        await history.update(verification(1, status="diverged"), {"two": b"new", "one": b"again"})
    stored = await history.get(verification(1).id)
    assert stored is not None
    assert Verification.model_validate_json(stored).status == "identical"
    assert await history.record(verification(1).id, "two") is None
    await history.close()


async def test_the_next_start_marks_what_did_not_end(tmp_path: Path) -> None:
    history = await History.open(tmp_path / "runs.db", 10, 10)
    for number, status in enumerate(("identical", "running", "queued", "diverged")):
        await history.add(verification(number, status=status))
    await history.close()
    history = await History.open(tmp_path / "runs.db", 10, 10)
    found = [Verification.model_validate_json(body) for _, body in (await history.page(10, None, None))[0]]
    assert [one.status for one in found] == ["diverged", "interrupted", "interrupted", "identical"]
    assert (found[1].message, found[0].message) == (CRASHED, "")
    assert found[1].finished_at is not None
    await history.close()


async def test_the_oldest_go_by_count_and_by_age_and_what_runs_stays(tmp_path: Path) -> None:
    history = await History.open(tmp_path / "runs.db", 3, 10)
    await history.add(verification(0, status="running"))
    for number in range(1, 6):
        await history.add(verification(number, status="running"))
        await history.update(verification(number), {"one": b"record"})
    await history.prune()
    assert await ids(history) == [5, 4, 3, 0]
    assert await history.record(verification(1).id, "one") is None
    assert await history.record(verification(5).id, "one") == b"record"
    await history.add(verification(6, created_at=datetime.now(UTC) - timedelta(days=11)))
    await history.prune()
    assert 6 not in await ids(history)
    await history.close()


async def test_a_second_service_on_the_same_file_is_refused(tmp_path: Path) -> None:
    history = await History.open(tmp_path / "runs.db", 10, 10)
    with pytest.raises(ValueError, match="database is locked; another service uses it"):
        await History.open(tmp_path / "runs.db", 10, 10)
    await history.close()


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "runs.db"
    file.write_text("my diary " * 1000)
    with pytest.raises(ValueError, match="file is not a database"):
        await History.open(file, 10, 10)
    assert file.read_text().startswith("my diary")


async def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "runs.db"
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(ValueError, match="a newer version of vllm-deterministic made it"):
        await History.open(file, 10, 10)
