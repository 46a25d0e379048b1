"""The second level that needs nothing installed: one SQLite file for the processes of a machine. Knows keys and bytes.

Readers and the writer have a thread and a connection each, so that a lookup never waits for a write; nor does the file
make it wait, in WAL mode. A file that turns out to be damaged is put aside and begun anew: it is a cache.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from autobot_llm.universal.stores.base import Kept, StoreStats

MAX_BYTES = 512 * 2**20
BUSY_SECONDS = 0.5  # for which the writer, whom nobody awaits, waits for another process's
PRUNE_EVERY = 64  # writes

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, expires REAL NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS answers_by_expiry ON answers (expires);
"""

ResultT = TypeVar("ResultT")


class SqliteStore:
    """A `SharedStore` in the file at `path`, which is made, readable for its owner only, when it is first used.

    Beyond `max_bytes`, what expires first is removed.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.name = f"the cache file {path}"
        self._path = path
        self._max_bytes = max_bytes
        putting_aside = threading.Lock()
        self._reader = _Lane(path, putting_aside, busy_seconds=0.0)
        self._writer = _Lane(path, putting_aside, busy_seconds=BUSY_SECONDS)
        self._num_writes = 0

    async def ping(self) -> None:
        await self._writer.do(_ping)
        await self._reader.do(_ping)

    async def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return await self._reader.do(partial(_get_many, keys, time.time()))

    async def put_many(self, kept: Sequence[Kept]) -> None:
        is_due = self._num_writes % PRUNE_EVERY == 0
        self._num_writes += 1
        await self._writer.do(partial(_put_many, kept, time.time(), self._max_bytes if is_due else None))

    async def clear(self) -> int:
        return await self._writer.do(_clear)

    async def stats(self) -> StoreStats:
        return await self._reader.do(partial(_stats, time.time()))

    async def some(self, limit: int) -> list[Kept]:
        return await self._reader.do(partial(_some, limit, time.time()))

    async def close(self) -> None:
        await asyncio.gather(self._reader.close(), self._writer.close())


class _Lane:
    """A thread with a connection of its own. Work that was given up keeps the thread until it is done.

    A damaged file is put aside once, though two lanes and other processes may notice: the inode that was opened tells
    whether it is still the one at the path.
    """

    def __init__(self, path: Path, putting_aside: threading.Lock, *, busy_seconds: float) -> None:
        self._path = path
        self._putting_aside = putting_aside
        self._busy_seconds = busy_seconds
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._executor: ThreadPoolExecutor | None = None

    async def do(self, work: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="answer-cache")
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._do, work)

    def _do(self, work: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        try:
            return work(self._opened())
        except sqlite3.Error as exc:
            self._shut()
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                self._put_aside()
            raise

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
            self._inode = os.fstat(descriptor).st_ino
            os.close(descriptor)
            connection = sqlite3.connect(
                self._path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
            )
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _put_aside(self) -> None:
        with self._putting_aside:
            if not self._path.exists() or self._path.stat().st_ino != self._inode:
                return
            self._path.replace(self._path.with_suffix(".damaged"))
            for ending in ("-wal", "-shm"):
                self._path.with_name(self._path.name + ending).unlink(missing_ok=True)

    def _shut(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def close(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            try:
                await asyncio.get_running_loop().run_in_executor(executor, self._shut)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)


def _ping(connection: sqlite3.Connection) -> None:
    connection.execute("SELECT 1 FROM answers LIMIT 1").fetchone()


def _get_many(keys: Sequence[bytes], now: float, connection: sqlite3.Connection) -> dict[bytes, bytes]:
    if len(keys) == 1:
        query = "SELECT key, data FROM answers WHERE key = ? AND expires > ?"
    else:
        query = f"SELECT key, data FROM answers WHERE key IN ({','.join('?' * len(keys))}) AND expires > ?"
    return dict(connection.execute(query, (*keys, now)).fetchall())


def _put_many(kept: Sequence[Kept], now: float, prune_to: int | None, connection: sqlite3.Connection) -> None:
    rows = [(one.key, one.expires, one.data) for one in kept]
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany("INSERT OR REPLACE INTO answers (key, expires, data) VALUES (?, ?, ?)", rows)
        if prune_to is not None:
            _prune(now, prune_to, connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _prune(now: float, max_bytes: int, connection: sqlite3.Connection) -> None:
    """Remove what has expired, and where the rest is too much, the quarter that expires first."""
    connection.execute("DELETE FROM answers WHERE expires <= ?", (now,))
    (num_bytes,) = connection.execute(
        "SELECT (page_count - freelist_count) * page_size "
        "FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
    ).fetchone()
    if num_bytes > max_bytes:
        connection.execute(
            "DELETE FROM answers WHERE key IN "
            "(SELECT key FROM answers ORDER BY expires LIMIT (SELECT COUNT(*) / 4 + 1 FROM answers))"
        )


def _clear(connection: sqlite3.Connection) -> int:
    return connection.execute("DELETE FROM answers").rowcount


def _stats(now: float, connection: sqlite3.Connection) -> StoreStats:
    query = "SELECT COUNT(*), COALESCE(SUM(LENGTH(data)), 0) FROM answers WHERE expires > ?"
    num_entries, num_bytes = connection.execute(query, (now,)).fetchone()
    return StoreStats(num_entries=num_entries, num_bytes=num_bytes)


def _some(limit: int, now: float, connection: sqlite3.Connection) -> list[Kept]:
    query = "SELECT key, expires, data FROM answers WHERE expires > ? ORDER BY rowid DESC LIMIT ?"
    return [Kept(*row) for row in connection.execute(query, (now, limit))]
