"""The first level: what this process keeps, the least recently used given up first. Knows sizes and a clock only.

What is made of an entry (`Forms`) stays with it, and its bytes count as the entry's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic

from autobot_llm.universal.kept_answer import Forms
from autobot_llm.universal.stores.base import StorableT


class MemoryStore(Generic[StorableT]):
    """At most `max_entries` entries of `max_bytes` together; every operation takes the same time, however many."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._entries: OrderedDict[bytes, StorableT] = OrderedDict()
        self._forms: dict[bytes, Forms] = {}
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> StorableT | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: StorableT) -> None:
        """Keep `entry`, in the place of what was there; one too large for the store is not kept."""
        if key in self._entries:
            self._remove(key)
        if entry.num_bytes > self._max_bytes or self._max_entries == 0:
            return
        self._entries[key] = entry
        self.num_bytes += entry.num_bytes
        self._make_room()

    def forms(self, key: bytes) -> Forms:
        """What was made of the entry that `get` has just found under `key`."""
        return self._forms.setdefault(key, Forms())

    def grow(self, key: bytes, forms: Forms, num_bytes: int) -> None:
        """Something of `num_bytes` was made and added to `forms`, which may have left the store meanwhile."""
        if self._forms.get(key) is forms:
            self.num_bytes += num_bytes
            self._make_room()

    def _make_room(self) -> None:
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self.num_evicted += 1

    def clear(self) -> int:
        num_entries = len(self._entries)
        self._entries.clear()
        self._forms.clear()
        self.num_bytes = 0
        return num_entries

    def _remove(self, key: bytes) -> None:
        self.num_bytes -= self._entries.pop(key).num_bytes
        if (forms := self._forms.pop(key, None)) is not None:
            self.num_bytes -= forms.num_bytes
