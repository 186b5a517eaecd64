"""Verifications kept in SQLite: a crash loses no finished one, and marks the unfinished.

Each verification is stored as the JSON that the API answers with, and its run records as they come from the worker.
WAL with synchronous=FULL: what was committed survives a kill and a power cut.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import aiosqlite

from vllm_deterministic.service.schema import UNFINISHED, Status, Verification

_VERSION = 1
_RECENT = 200
_TABLES = """
CREATE TABLE verifications (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    created_at REAL NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX verifications_by_status ON verifications (status, number);
CREATE TABLE records (
    id TEXT NOT NULL REFERENCES verifications (id) ON DELETE CASCADE,
    target TEXT NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (id, target)
);
"""
CRASHED = "The service ended before the verification did; nothing was kept of it."


class History:
    """The database. Make one with `History.open`."""

    def __init__(
        self,
        lock: sqlite3.Connection,
        reader: aiosqlite.Connection,
        writer: aiosqlite.Connection,
        keep_runs: int,
        keep_days: int,
    ) -> None:
        self._lock = lock
        self._reader = reader  # apart from the writer, so that no answer waits for a disk
        self._writer = writer
        self._keep_runs = keep_runs
        self._keep_days = keep_days
        self._writing = asyncio.Lock()  # one transaction at a time on the connection
        self._recent: dict[str, str] = {}  # what clients poll, answered without a thread and a disk

    @classmethod
    async def open(cls, path: Path, keep_runs: int, keep_days: int) -> Self:
        """Open or make the database, mark what a crash left unfinished, and drop what is beyond retention.

        Raises ValueError, in one line, where the file cannot serve: not writable, not a database, in use by another
        service, or of a newer version.
        """
        try:
            lock = _prepare(path)
            reader, writer = await aiosqlite.connect(path), await aiosqlite.connect(path)
            await reader.execute("PRAGMA query_only = ON")
            await writer.execute("PRAGMA synchronous = FULL")
            await writer.execute("PRAGMA foreign_keys = ON")
            history = cls(lock, reader, writer, keep_runs, keep_days)
            await history._mark_crashed()
            await history.prune()
        except sqlite3.Error as error:
            raise ValueError(f"--database {path}: {error}") from None
        return history

    async def close(self) -> None:
        """Close the database."""
        await self._reader.close()
        await self._writer.close()
        self._lock.close()

    async def add(self, verification: Verification) -> None:
        """Keep a new verification. Raises sqlite3.Error."""
        values = (verification.id, verification.status, verification.created_at.timestamp(), _json(verification))
        async with self._transaction():
            await self._writer.execute(
                "INSERT INTO verifications (id, status, created_at, body) VALUES (?, ?, ?, ?)", values
            )

    async def update(self, verification: Verification, records: Mapping[str, bytes] | None = None) -> None:
        """Keep what became of a verification, with its run records by target, all or nothing. Raises sqlite3.Error."""
        async with self._transaction():
            await self._writer.execute(
                "UPDATE verifications SET status = ?, body = ? WHERE id = ?",
                (verification.status, _json(verification), verification.id),
            )
            await self._writer.executemany(
                "INSERT INTO records (id, target, content) VALUES (?, ?, ?)",
                [(verification.id, target, content) for target, content in (records or {}).items()],
            )

    async def get(self, id: str) -> str | None:
        """The JSON of a verification, None where there is none."""
        if id in self._recent:
            return self._recent[id]
        row = await self._one("SELECT status, body FROM verifications WHERE id = ?", id)
        if row is None:
            return None
        if row[0] not in UNFINISHED:  # it changes no more, and goes only by `prune`
            self._recent[id] = row[1]
            if len(self._recent) > _RECENT:
                del self._recent[next(iter(self._recent))]
        return str(row[1])

    async def page(
        self, limit: int, before: int | None, status: Status | None
    ) -> tuple[list[tuple[str, str]], int | None]:
        """Id and JSON of the newest verifications before a number, and where the next page begins."""
        rows = await self._all(
            "SELECT number, id, body FROM verifications WHERE number < ? AND (? IS NULL OR status = ?) "
            "ORDER BY number DESC LIMIT ?",
            before if before is not None else 2**63 - 1,
            status,
            status,
            limit + 1,
        )
        return [(row[1], row[2]) for row in rows[:limit]], rows[limit - 1][0] if len(rows) > limit else None

    async def finished(self) -> list[Verification]:
        """Every finished verification, the oldest first."""
        rows = await self._all(
            "SELECT body FROM verifications WHERE status NOT IN ('queued', 'running') ORDER BY number"
        )
        return [Verification.model_validate_json(row[0]) for row in rows]

    async def record(self, id: str, target: str) -> bytes | None:
        """The zlib-compressed JSON run record of one target, None where there is none."""
        row = await self._one("SELECT content FROM records WHERE id = ? AND target = ?", id, target)
        return row[0] if row else None

    async def prune(self) -> None:
        """Drop finished verifications that are too old or too many. Raises sqlite3.Error."""
        oldest = datetime.now(UTC) - timedelta(days=self._keep_days)
        async with self._transaction():
            await self._writer.execute(
                "DELETE FROM verifications WHERE status NOT IN ('queued', 'running') AND (created_at < ? OR number <= "
                "(SELECT number FROM verifications ORDER BY number DESC LIMIT 1 OFFSET ?))",
                (oldest.timestamp(), self._keep_runs),
            )
        self._recent.clear()

    async def _mark_crashed(self) -> None:
        rows = await self._all("SELECT body FROM verifications WHERE status IN ('queued', 'running')")
        for row in rows:
            verification = Verification.model_validate_json(row[0])
            end = {"status": "interrupted", "message": CRASHED, "finished_at": datetime.now(UTC)}
            await self.update(verification.model_copy(update=end))

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        async with self._writing:
            try:
                yield
                await self._writer.commit()
            except BaseException:
                await self._writer.rollback()
                raise

    async def _one(self, query: str, *values: object) -> sqlite3.Row | None:
        async with self._reader.execute(query, values) as cursor:
            return await cursor.fetchone()

    async def _all(self, query: str, *values: object) -> list[sqlite3.Row]:
        async with self._reader.execute(query, values) as cursor:
            return list(await cursor.fetchall())


def _prepare(path: Path) -> sqlite3.Connection:
    """Make the tables where there are none, and give the lock that a service holds on its database.

    A second service on the same file would take the runs of the first for crashed. The lock is a file beside the
    database: one on the database itself would shut out readers, such as the sqlite3 shell.
    """
    lock = sqlite3.connect(f"{path}-lock", timeout=0.5)
    try:
        lock.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            hint = "; another service uses it" if "locked" in str(error) else ""
            raise ValueError(f"--database {path}: {error}{hint}") from None
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise ValueError(f"--database {path}: a newer version of vllm-deterministic made it")
            if version == 0:
                database.executescript(f"BEGIN;{_TABLES}PRAGMA user_version = {_VERSION};COMMIT;")
    except BaseException:
        lock.close()
        raise
    return lock


def _json(verification: Verification) -> str:
    return verification.model_dump_json()
