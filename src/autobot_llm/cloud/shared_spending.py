"""Where workers tell each other what they have spent and set aside: a Redis, or the file that a host's processes share.

Knows scripts and SQL; knows nothing of budgets' refusals. Both do the same with the same figures, and neither is waited
for long: what does not answer soon says None.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from autobot_llm.cloud.guarded_redis import GuardedRedis
from autobot_llm.cloud.spending_script import (
    HOLD_SECONDS,
    Position,
    Standing,
    arguments,
    keys,
    read_standing,
)

FILE_PATIENCE = 0.1  # seconds that a request waits for the file, which others may be writing to
_HELD = "CREATE TABLE IF NOT EXISTS held (worker TEXT PRIMARY KEY, dollars REAL, seen REAL) WITHOUT ROWID"


class SharedSpending(Protocol):
    """`ask` tells the position of a worker, and sets aside each of the sums `wanted` that the budgets (of the day and
    the month) allow, in one step that nobody else's can come between.
    """

    @property
    def is_usable(self) -> bool: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(
        self, worker: str, account: str, position: Position, budgets: Sequence[float | None], wanted: Sequence[float]
    ) -> Standing | None: ...


class RedisSpending:
    """For all workers and hosts that use the same Redis."""

    def __init__(self, redis: GuardedRedis) -> None:
        self._redis = redis

    @property
    def is_usable(self) -> bool:
        return self._redis.is_usable

    async def start(self) -> None:
        await self._redis.start()

    async def close(self) -> None:
        await self._redis.close()

    async def ask(
        self, worker: str, account: str, position: Position, budgets: Sequence[float | None], wanted: Sequence[float]
    ) -> Standing | None:
        args = arguments(worker, account, position, budgets, wanted)
        return await self._redis.run(keys(position.day), args, read_standing)


class FileSpending:
    """For the processes of one user on one host: in the ledger's file at `path`, by the host's clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._late: set[asyncio.Task[Any]] = set()

    @property
    def is_usable(self) -> bool:
        return not self._late

    async def start(self) -> None:
        """Nothing: the file is opened for each question."""

    async def close(self) -> None:
        if self._late:
            await asyncio.wait(self._late, timeout=1.0)

    async def ask(
        self, worker: str, account: str, position: Position, budgets: Sequence[float | None], wanted: Sequence[float]
    ) -> Standing | None:
        if self._late:
            return None
        asked = asyncio.create_task(
            asyncio.to_thread(_standing, self._path, worker, position, tuple(budgets), tuple(wanted))
        )
        await asyncio.wait((asked,), timeout=FILE_PATIENCE)
        if not asked.done():
            self._late.add(asked)
            asked.add_done_callback(self._over)
            return None
        with contextlib.suppress(sqlite3.Error, OSError):  # the ledger warns of a file that cannot be used
            return asked.result()
        return None

    def _over(self, asked: asyncio.Task[Any]) -> None:
        self._late.discard(asked)
        if not asked.cancelled():
            asked.exception()  # nobody waits for it any more


def _standing(
    path: Path, worker: str, position: Position, budgets: tuple[float | None, ...], wanted: tuple[float, ...]
) -> Standing | None:
    """The script's twin in SQL. Where there is no file yet and nothing is wanted, none is made."""
    if not path.exists() and not wanted and not position.held:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    with contextlib.closing(sqlite3.connect(path, timeout=FILE_PATIENCE, isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("PRAGMA synchronous=OFF")  # what is set aside need not outlive the machine's power
        file.execute("BEGIN IMMEDIATE")
        with file:  # commits, or takes back
            file.execute(_HELD)
            file.execute("DELETE FROM held WHERE abs(? - seen) > ? OR worker = ?", (now, HOLD_SECONDS, worker))
            (others,) = file.execute("SELECT total(dollars) FROM held").fetchone()
            spent = (_spent(file, position.day), _spent(file, position.day[:7]))
            held = position.held
            answers = []
            for dollars in wanted:
                answer = _answer(spent, others + held + dollars, budgets)
                held += dollars if answer == "yes" else 0.0
                answers.append(answer)
            file.execute("INSERT INTO held VALUES (?, ?, ?)", (worker, held, now))
    return Standing(spent_day=spent[0], spent_month=spent[1], held_elsewhere=others, answers=tuple(answers))


def _spent(file: sqlite3.Connection, period: str) -> float:
    if file.execute("SELECT 1 FROM sqlite_master WHERE name = 'spending'").fetchone() is None:
        return 0.0
    row = file.execute("SELECT total(dollars_spent) FROM spending WHERE day LIKE ?", (f"{period}%",)).fetchone()
    return float(row[0])


def _answer(spent: tuple[float, float], besides: float, budgets: tuple[float | None, ...]) -> str:
    for name, dollars, budget in zip(("day", "month"), spent, budgets, strict=True):
        if budget is not None and (dollars >= budget or dollars + besides > budget):
            return name
    return "yes"
