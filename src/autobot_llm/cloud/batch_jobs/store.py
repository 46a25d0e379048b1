"""Keep batch jobs over crashes: one SQLite file, and a folder for each job. Knows SQLite; knows no provider.

What is written is on the disk before the call returns (WAL, synchronous=FULL). Each call opens the file anew, so any
thread and any process may call.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from autobot_llm.cloud.batch_jobs.job import Job, Part
from autobot_llm.cloud.durable import open_durable
from autobot_llm.errors import ConfigurationError, InvalidRequestError, LLMError

FILE_NAME = "jobs.sqlite"
PATIENCE = 10.0  # seconds for others who write to the file
_ORPHAN_SECONDS = 86_400.0  # after which a folder without a job is what a killed process has left
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, created REAL, provider TEXT, address TEXT, source TEXT, digest TEXT, num_items INTEGER,
    reserved REAL, is_cancelled INTEGER, unpriced TEXT
);
CREATE TABLE IF NOT EXISTS parts (
    job TEXT, number INTEGER, url TEXT, model TEXT, headers TEXT, num_items INTEGER, num_bytes INTEGER,
    begun_at REAL, intent_at REAL, file_id TEXT, batch_id TEXT, has_ended INTEGER, is_withdrawn INTEGER, status TEXT,
    num_done INTEGER, num_failed INTEGER, result_files TEXT, failure TEXT, fetched_at REAL, costs TEXT,
    num_unpriced INTEGER,
    PRIMARY KEY (job, number)
);
CREATE TABLE IF NOT EXISTS items (
    job TEXT, position INTEGER, part INTEGER, custom_id TEXT, PRIMARY KEY (job, position)
) WITHOUT ROWID;
"""
_JOB_COLUMNS = tuple(name for name in Job.__struct_fields__ if name != "parts")
_PART_COLUMNS = Part.__struct_fields__
_AS_JSON = ("headers", "result_files", "unpriced", "costs")


KindT = TypeVar("KindT", Job, Part)


class JobBusy(LLMError):
    """Another process is submitting, withdrawing or fetching this job."""

    status = 409
    code = "batch_busy"


class JobStore:
    """The jobs in the folder at `path`, which is made when the first one is added.

    Raises ConfigurationError where the folder or its file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, job: str) -> Path:
        return self.path / job

    def part_path(self, part: Part) -> Path:
        """The part's requests, as they are sent."""
        return self.folder(part.job) / f"part-{part.number}.jsonl"

    def results_path(self, part: Part) -> Path:
        """The part's results, as they came; it exists only when all of them are in it."""
        return self.folder(part.job) / f"results-{part.number}.jsonl"

    def new_folder(self, job: str) -> Path:
        """A folder for a job that is still to be added."""
        with self._usable():
            self.path.mkdir(parents=True, exist_ok=True)
            self.folder(job).mkdir(mode=0o700)  # prompts are nobody else's business
        self._remove_orphans()
        return self.folder(job)

    def add(self, job: Job, items: Iterable[tuple[int, int, str]], is_same: Callable[[Job], bool] | None = None) -> Job:
        """Add `job` and its items: position in the input, number of the part, custom_id; all of it or nothing.

        Where there is a job already for which `is_same`, that is returned and nothing is added.
        """
        with self._open(to_write=True) as file:
            for known in _jobs(file) if is_same is not None else ():
                if is_same is not None and is_same(known):
                    return known
            file.execute(_insert("jobs", _JOB_COLUMNS), _row(job, _JOB_COLUMNS))
            file.executemany(_insert("parts", _PART_COLUMNS), [_row(part, _PART_COLUMNS) for part in job.parts])
            file.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", ((job.id, *item) for item in items))
        return job

    def jobs(self) -> list[Job]:
        """Every job, the latest first."""
        if not (self.path / FILE_NAME).exists():
            return []
        with self._open() as file:
            return _jobs(file)

    def job(self, name: str) -> Job:
        """The job whose id is `name`, or begins so. Raises InvalidRequestError where there is none, or several."""
        jobs = self.jobs()
        found = [job for job in jobs if job.id == name] or [job for job in jobs if name and job.id.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(job.id for job in found[:8])
            raise InvalidRequestError(f"several jobs begin with '{name}': {several}", param="job")
        known = ", ".join(job.id for job in jobs[:8]) or "none"
        raise InvalidRequestError(
            f"no batch job is called '{name}'; known are {known}", param="job", code="no_such_job"
        )

    def items(self, job: str) -> Iterator[tuple[int, int, str]]:
        """Position, part and custom_id of each request, in the order of the input."""
        with self._open() as file:
            yield from file.execute(
                "SELECT position, part, custom_id FROM items WHERE job = ? ORDER BY position", (job,)
            )

    def part_of(self, job: str, position: int) -> int | None:
        """The number of the part that has the job's request at `position`."""
        with self._open() as file:
            row = file.execute("SELECT part FROM items WHERE job = ? AND position = ?", (job, position)).fetchone()
        return None if row is None else row[0]

    def update_part(self, part: Part, **changes: Any) -> Part:
        """`part` with `changes`, written down."""
        new = msgspec.structs.replace(part, **changes)
        names = ", ".join(f"{name} = ?" for name in changes)
        with self._open(to_write=True) as file:
            values = _row(new, tuple(changes))
            file.execute(f"UPDATE parts SET {names} WHERE job = ? AND number = ?", (*values, part.job, part.number))
        return new

    def update_job(self, job: str, **changes: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in changes)
        with self._open(to_write=True) as file:
            file.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*changes.values(), job))

    def known_batches(self) -> set[str]:
        """The ids of every batch at a provider that is known to be one of our parts."""
        with self._open() as file:
            return {row[0] for row in file.execute("SELECT batch_id FROM parts WHERE batch_id IS NOT NULL")}

    @contextlib.contextmanager
    def lock(self, job: str) -> Iterator[None]:
        """Nobody else sends, withdraws or fetches parts of the job meanwhile. Raises JobBusy at once.

        The lock is a transaction, so the operating system gives it back when its holder is killed.
        """
        with contextlib.ExitStack() as open_files:
            with self._usable():
                file = sqlite3.connect(self.folder(job) / "lock.sqlite", timeout=0, isolation_level=None)
                open_files.callback(file.close)
                try:
                    file.execute("BEGIN EXCLUSIVE")
                except sqlite3.OperationalError as exc:
                    if "locked" not in str(exc):
                        raise
                    raise JobBusy(f"another process is at work on {job}: try again when it is done") from exc
            yield

    @contextlib.contextmanager
    def _open(self, *, to_write: bool = False) -> Iterator[sqlite3.Connection]:
        with self._usable(), contextlib.closing(open_durable(self.path / FILE_NAME, PATIENCE)) as file, file:
            file.executescript(_SCHEMA)
            if to_write:
                file.execute("BEGIN IMMEDIATE")
            yield file

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            raise ConfigurationError(f"the folder of batch jobs, {self.path}, cannot be used: {exc}") from exc

    def _remove_orphans(self) -> None:
        """Remove what processes that were killed while they read a file have left."""
        known = {job.id for job in self.jobs()}
        for folder in self.path.iterdir():
            if folder.is_dir() and folder.name not in known:
                with contextlib.suppress(OSError):
                    if time.time() - folder.stat().st_mtime > _ORPHAN_SECONDS:
                        shutil.rmtree(folder)


@contextlib.contextmanager
def written_whole(path: Path, job: str) -> Iterator[Callable[[bytes], object]]:
    """Write to a file beside `path` and give it that name at the end: there is all of it, or what was there before.

    The caller holds the lock of `job`. What a killed process has left of such a file is written over.
    """
    beside = path.with_name(f".{path.name}.{job}.part")
    try:
        with beside.open("wb") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _insert(table: str, columns: tuple[str, ...]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def _row(value: Job | Part, columns: tuple[str, ...]) -> list[Any]:
    fields = ((name, getattr(value, name)) for name in columns)
    return [msgspec.json.encode(field).decode() if name in _AS_JSON else field for name, field in fields]


def _jobs(file: sqlite3.Connection) -> list[Job]:
    rows = file.execute(f"SELECT {', '.join(_JOB_COLUMNS)} FROM jobs ORDER BY created DESC").fetchall()
    parts = file.execute(f"SELECT {', '.join(_PART_COLUMNS)} FROM parts ORDER BY job, number").fetchall()
    by_job: dict[str, list[Part]] = {}
    for part in (_read(Part, _PART_COLUMNS, row) for row in parts):
        by_job.setdefault(part.job, []).append(part)
    jobs = (_read(Job, _JOB_COLUMNS, row) for row in rows)
    return [msgspec.structs.replace(job, parts=tuple(by_job.get(job.id, ()))) for job in jobs]


def _read(kind: type[KindT], columns: tuple[str, ...], row: tuple[Any, ...]) -> KindT:
    fields = dict(zip(columns, row, strict=True))
    fields |= {name: msgspec.json.decode(fields[name]) for name in columns if name in _AS_JSON}
    return msgspec.convert(fields, kind, strict=False)  # SQLite has 0 and 1 for false and true
