"""Keep account of what was spent, by day, provider, model and tenant, over restarts and for all processes of a user.

Knows SQLite; knows nothing of prices. Days are UTC's. What is added is written a moment later, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from autobot_llm.cloud.durable import open_durable
from autobot_llm.types import Usage

logger = logging.getLogger("autobot_llm.cloud")

FILE_NAME = "spending.sqlite"
PATIENCE = 10.0  # seconds for others who write to the file, where nothing may be lost
WRITE_SECONDS = 0.25  # that sums are gathered before they are written
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spending (
    day TEXT, provider TEXT, model TEXT, tenant TEXT,
    num_requests INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER,
    dollars_spent REAL, dollars_saved REAL,
    PRIMARY KEY (day, provider, model, tenant)
) WITHOUT ROWID
"""
_ACCOUNT = "CREATE TABLE IF NOT EXISTS account (id TEXT PRIMARY KEY) WITHOUT ROWID"
_ADD = """
INSERT INTO spending VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
    num_requests = num_requests + excluded.num_requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    dollars_spent = dollars_spent + excluded.dollars_spent, dollars_saved = dollars_saved + excluded.dollars_saved
"""
_ONCE = "CREATE TABLE IF NOT EXISTS entered_once (name TEXT PRIMARY KEY) WITHOUT ROWID"


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the account: what a tenant spent on a model in a day."""

    day: str
    provider: str
    model: str
    tenant: str
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    dollars_spent: float
    dollars_saved: float


Key = tuple[str, str, str, str]


class Ledger:
    """The account in the file at `path`. Where that cannot be used, it is kept in memory and a warning says so, once.

    `clock` gives seconds since 1970; `patience` (seconds) is for others who write to the file. Belongs to one event
    loop between `start` and `close`. `account` names the file among those of other hosts, from `start` on.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, patience: float = 2.0) -> None:
        self._path = path
        self._patience = patience
        self._clock = clock
        self._pending: dict[Key, list[float]] = {}
        self._by_day: dict[str, float] = {}  # dollars of this month, those that are not written yet included
        self._written_by_day: dict[str, float] = {}
        self._being_written = 0.0
        self.added = 0.0  # dollars, by this process, since it began
        self.account = secrets.token_hex(8)
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._has_warned = False

    async def start(self) -> None:
        """Read what was spent so far."""
        await self._write()

    async def close(self) -> None:
        """Write what is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None:
            await self._writing
        if self._pending:
            await self._write()

    def today(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).date().isoformat()

    def spent_today(self) -> float:
        """Dollars, since midnight UTC."""
        return self._by_day.get(self.today(), 0.0)

    def spent_this_month(self) -> float:
        month = self.today()[:7]
        return sum(dollars for day, dollars in self._by_day.items() if day.startswith(month))

    def written(self, period: str) -> float:
        """Dollars of a day or a month ("2026-11") that are in the file, whoever spent them."""
        return sum(dollars for day, dollars in self._written_by_day.items() if day.startswith(period))

    def unwritten(self) -> float:
        """Dollars that this process spent and that are not known to be in the file."""
        return self._being_written + sum(figures[4] for figures in self._pending.values())

    def seconds_left(self, *, of_month: bool) -> float:
        """Until the day, or the month, is over."""
        now = datetime.fromtimestamp(self._clock(), UTC)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        end = (
            (midnight.replace(day=28) + timedelta(days=4)).replace(day=1) if of_month else midnight + timedelta(days=1)
        )
        return (end - now).total_seconds()

    def add(self, provider: str, model: str, tenant: str, usage: Usage, *, spent: float, saved: float) -> None:
        """Enter one answer. Needs a running event loop."""
        day = self.today()
        figures = (1, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, spent, saved)
        sums = self._pending.setdefault((day, provider, model, tenant), [0] * len(figures))
        for place, figure in enumerate(figures):
            sums[place] += figure
        self._by_day[day] = self._by_day.get(day, 0.0) + spent
        self.added += spent
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS, self._begin_writing)

    def _begin_writing(self) -> None:
        self._timer = None
        self._writing = asyncio.get_running_loop().create_task(self._write())
        self._writing.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing = None
        if self._pending and not task.cancelled() and not self._has_warned:
            self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS, self._begin_writing)

    async def _write(self) -> None:
        pending, self._pending = self._pending, {}
        self._being_written = sum(figures[4] for figures in pending.values())
        try:
            self.account, stored = await asyncio.to_thread(
                _stored, self._path, self._patience, pending, self.today()[:7], self.account
            )
        except (sqlite3.Error, OSError) as exc:
            for key, figures in self._pending.items():
                sums = pending.setdefault(key, [0] * len(figures))
                for place, figure in enumerate(figures):
                    sums[place] += figure
            self._pending = pending
            self._being_written = 0.0
            if not self._has_warned:
                logger.warning("what is spent cannot be written to %s, and is lost at the end: %s", self._path, exc)
            self._has_warned = True
            return
        self._has_warned = False
        self._being_written = 0.0
        self._written_by_day = dict(stored)
        for (day, *_), figures in self._pending.items():  # added meanwhile
            stored[day] = stored.get(day, 0.0) + figures[4]
        self._by_day = stored


def _stored(
    path: Path, patience: float, pending: dict[Key, list[float]], month: str, account: str
) -> tuple[str, dict[str, float]]:
    """Add `pending` to the file; returns its name (`account` where it has none) and the dollars of the month's days.

    No file is made for nothing.
    """
    if not pending and not path.exists():
        return account, {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=patience)) as file, file:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute(_SCHEMA)
        file.execute(_ACCOUNT)
        file.execute("INSERT INTO account SELECT ? WHERE NOT EXISTS (SELECT * FROM account)", (account,))
        (named,) = file.execute("SELECT id FROM account").fetchone()
        file.executemany(_ADD, [(*key, *figures) for key, figures in pending.items()])
        rows = file.execute(
            "SELECT day, SUM(dollars_spent) FROM spending WHERE day >= ? GROUP BY day", (f"{month}-01",)
        )
        return named, dict(rows.fetchall())


def enter_once(path: Path, name: str, day: str, provider: str, sums: Mapping[str, Sequence[float]]) -> None:
    """Enter what a piece of work cost, all of it or nothing, and once however often it is called with this `name`.

    `sums` has for each model the number of requests, prompt, cached and completion tokens, and dollars spent and saved.
    It is on the disk when the call returns. Raises sqlite3.Error and OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(open_durable(path, PATIENCE)) as file, file:
        file.execute(_SCHEMA)
        file.execute(_ONCE)
        if file.execute("INSERT OR IGNORE INTO entered_once VALUES (?)", (name,)).rowcount:
            file.executemany(_ADD, [(day, provider, model, "", *figures) for model, figures in sums.items()])


def read_spending(path: Path, since: str) -> list[Spending]:
    """The lines from the day `since` on, the latest day first and the dearest model of a day first.

    Raises sqlite3.Error for a file that is none of ours; where there is no file, nothing was spent.
    """
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
        rows = file.execute(
            "SELECT * FROM spending WHERE day >= ? ORDER BY day DESC, dollars_spent DESC, provider, model", (since,)
        ).fetchall()
    return [Spending(**dict(zip(Spending.__struct_fields__, row, strict=True))) for row in rows]
