"""Use a shared store so that no request waits for it long, or fails with it. Knows stores; knows no answer's meaning.

Lookups that come together are one question to the store. Who asks waits for `PATIENCE` at most, then goes on without;
until a late store has answered, nobody waits for it at all. What fails repeatedly is left alone and tried again in the
background. Entries are written behind the answers' back, and dropped where the store cannot keep up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from autobot_llm.universal.breaker import StoreBreaker
from autobot_llm.universal.stores.base import Kept, SharedStore, StorableT

logger = logging.getLogger("autobot_llm.cache")

PATIENCE = 0.004  # seconds a request waits for a lookup
START_PATIENCE = 0.25  # seconds that the start waits for the store to open, and the very first lookup for its answer
LOOKUP_LIMIT = 1.0  # seconds after which a lookup is given up for good
WRITE_LIMIT = 5.0
CANCEL_AGAIN = 0.5
CLOSE_LIMIT = 2.0  # seconds that the last writes may take
MAX_ASKED = 64  # keys of one question
MAX_WRITTEN = 16  # entries of one write
MAX_PENDING = 512  # entries that wait to be written
MAX_PENDING_BYTES = 32 * 2**20

ResultT = TypeVar("ResultT")


class SecondLevel(Generic[StorableT]):
    """A guarded `SharedStore` of what `seal` writes under a key and `unseal` reads; `what` names it for the log.

    Belongs to one event loop between `start` and `close`.
    """

    def __init__(
        self,
        store: SharedStore,
        seal: Callable[[bytes, StorableT], bytes],
        unseal: Callable[[bytes, bytes], StorableT | None],
        *,
        what: str = "answers",
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._store = store
        self._seal = seal
        self._unseal = unseal
        self._what = what
        self._max_pending = max_pending
        self._reads = StoreBreaker(is_open=True)  # until the store has been opened
        self._writes = StoreBreaker()
        self._is_late = False
        self._patience = START_PATIENCE
        self._has_warned = False
        self._asked: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._pending: dict[bytes, StorableT] = {}
        self._num_pending_bytes = 0
        self._to_read = asyncio.Event()
        self._to_write = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self.num_failures = 0
        self.num_dropped = 0

    @property
    def is_usable(self) -> bool:
        """Whether a lookup would be asked of the store now."""
        return not self._reads.is_open and not self._is_late

    async def start(self) -> None:
        if self._tasks:
            return
        opened = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read(opened)), asyncio.create_task(self._write())]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_PATIENCE):
                await opened.wait()

    async def close(self) -> None:
        """Write what is pending, if that is quickly done, and close the store."""
        if not self._tasks:
            return
        working, self._tasks = set(self._tasks), []
        while working:  # a client library may lose a cancellation
            for task in working:
                task.cancel()
            _, working = await asyncio.wait(working, timeout=CANCEL_AGAIN)
        self._answer_all({})
        self._reads = StoreBreaker(is_open=True)
        with contextlib.suppress(Exception):  # it was only a cache
            async with asyncio.timeout(CLOSE_LIMIT):
                while self._pending and not self._writes.is_open:
                    await self._write_some()
        self._drop_pending()
        with contextlib.suppress(Exception):
            await self._within(CLOSE_LIMIT, self._store.close())

    async def get(self, key: bytes) -> StorableT | None:
        """What is kept under `key`; None where there is nothing, and where the store does not tell in time."""
        return (await self.get_many((key,))).get(key)

    async def get_many(self, keys: Sequence[bytes]) -> dict[bytes, StorableT]:
        """What is kept under each of `keys`; those that have nothing, and those not told in time, are left out."""
        found = {key: self._pending[key] for key in keys if key in self._pending}
        if not self.is_usable or len(found) == len(keys):
            return found
        asked = {key: self._question(key) for key in keys if key not in found}
        await asyncio.wait(asked.values(), timeout=self._patience)
        for key, question in asked.items():
            data = question.result() if question.done() else None
            if data is not None and (entry := self._unseal(key, data)) is not None:
                found[key] = entry
        return found

    def _question(self, key: bytes) -> asyncio.Future[bytes | None]:
        if (asked := self._asked.get(key)) is None:
            asked = self._asked[key] = asyncio.get_running_loop().create_future()
            self._to_read.set()
        return asked

    def put(self, key: bytes, entry: StorableT) -> None:
        """Have `entry` written soon; it is dropped where the store is far behind or out of order.

        While it is out of order, one entry at a time is the trial.
        """
        most = 1 if self._writes.is_open else self._max_pending
        is_full = len(self._pending) >= most or self._num_pending_bytes + entry.num_bytes > MAX_PENDING_BYTES
        if is_full or not self._tasks:
            self.num_dropped += 1
            return
        if (replaced := self._pending.get(key)) is not None:
            self._num_pending_bytes -= replaced.num_bytes
        self._pending[key] = entry
        self._num_pending_bytes += entry.num_bytes
        self._to_write.set()

    async def clear(self) -> int:
        """Remove every entry of the store, and return how many there were. Raises what the store raises."""
        self._drop_pending()
        async with self._writing:
            return await self._within(WRITE_LIMIT, self._store.clear())

    # Reading

    async def _read(self, opened: asyncio.Event) -> None:
        await self._try()
        opened.set()
        while True:
            if self._reads.is_open:
                await asyncio.sleep(self._reads.pause)
                await self._try()
                continue
            await self._to_read.wait()
            self._to_read.clear()
            while keys := list(self._asked)[:MAX_ASKED]:
                await self._look_up(keys)

    async def _look_up(self, keys: list[bytes]) -> None:
        lookup = asyncio.create_task(self._within(LOOKUP_LIMIT, self._store.get_many(keys)))
        try:
            await asyncio.wait((lookup,), timeout=self._patience)
            was_late = self._is_late = not lookup.done()
            if was_late:
                self._answer_all({})
            found = await lookup
        except Exception as exc:
            self._failed(self._reads, exc, gravely=isinstance(exc, TimeoutError))
            self._answer_all({})
        else:
            if was_late:
                self._failed(self._reads, TimeoutError(f"a lookup took longer than {PATIENCE * 1000:g} ms"))
            else:
                self._succeeded(self._reads)
            self._answer(keys, found)
        finally:
            lookup.cancel()
            self._is_late = False
            self._patience = PATIENCE

    def _answer(self, keys: list[bytes], found: dict[bytes, bytes]) -> None:
        for key in keys:
            asked = self._asked.pop(key, None)
            if asked is not None and not asked.done():
                asked.set_result(found.get(key))

    def _answer_all(self, found: dict[bytes, bytes]) -> None:
        self._answer(list(self._asked), found)

    async def _try(self) -> None:
        """Find out whether the store answers, and soon enough; the first time opens it, which may take longer."""
        try:
            await self._within(LOOKUP_LIMIT, self._store.ping())
            began = time.perf_counter()
            await self._within(LOOKUP_LIMIT, self._store.ping())
            if (took := time.perf_counter() - began) > self._patience:
                raise TimeoutError(f"it took {took * 1000:.1f} ms to say that it is there")
        except Exception as exc:
            self._failed(self._reads, exc)
        else:
            self._reads.admit() if self._has_warned else self._reads.succeeded()

    # Writing

    async def _write(self) -> None:
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            while self._pending:
                if self._writes.is_open:
                    await asyncio.sleep(self._writes.pause)
                await self._write_some()

    async def _write_some(self) -> None:
        async with self._writing:
            batch = {key: self._pending[key] for key in list(self._pending)[:MAX_WRITTEN]}
            if not batch:
                return
            kept = [
                Kept(key, entry.expires, data) for key, entry in batch.items() if (data := self._sealed(key, entry))
            ]
            try:
                await self._within(WRITE_LIMIT, self._store.put_many(kept))
            except Exception as exc:
                self._failed(self._writes, exc, gravely=True)
            else:
                self._succeeded(self._writes)
            # Until now they could be found here: between memory and store an entry is never nowhere.
            for key, entry in batch.items():
                if self._pending.get(key) is entry:
                    del self._pending[key]
                    self._num_pending_bytes -= entry.num_bytes

    def _drop_pending(self) -> None:
        self._pending.clear()
        self._num_pending_bytes = 0

    # Failures

    @staticmethod
    async def _within(seconds: float, work: Awaitable[ResultT]) -> ResultT:
        try:
            async with asyncio.timeout(seconds):  # wait_for may lose a cancellation that comes with the result
                return await work
        except TimeoutError as exc:
            raise TimeoutError(str(exc) or f"it did not answer within {seconds:g} s") from exc

    def _failed(self, breaker: StoreBreaker, exc: Exception, *, gravely: bool = False) -> None:
        self.num_failures += 1
        breaker.failed(gravely=gravely)
        if breaker.is_open and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s cannot be used (%s); %s are kept in memory only until it is back", self._store.name, exc, self._what
            )

    def _succeeded(self, breaker: StoreBreaker) -> None:
        breaker.succeeded()
        others = (self._reads, self._writes)
        if self._has_warned and not any(one.is_open or one.is_on_trial for one in others):
            self._has_warned = False
            logger.info("%s is back", self._store.name)

    def _sealed(self, key: bytes, entry: StorableT) -> bytes | None:
        """None where the answer has no bytes: half a surrogate pair, from a provider that sends such."""
        try:
            return self._seal(key, entry)
        except UnicodeEncodeError:
            return None
