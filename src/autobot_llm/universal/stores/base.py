"""What the caches ask of a store that processes share. Knows keys and bytes; knows nothing of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec


class Kept(msgspec.Struct, frozen=True):
    """Bytes under a key, until `expires` (seconds since the epoch)."""

    key: bytes
    expires: float
    data: bytes


class Storable(Protocol):
    """What a cache keeps, as its levels see it: until when, and about how many bytes it takes in memory."""

    @property
    def expires(self) -> float: ...

    @property
    def num_bytes(self) -> int: ...


StorableT = TypeVar("StorableT", bound=Storable)


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """How much a store holds that has not expired."""

    num_entries: int
    num_bytes: int


class SharedStore(Protocol):
    """A second level. Any method may raise, hang or be slow: who calls it must be prepared for that.

    A call that is cancelled leaves the store usable. `name` says where it is and tells no secret.
    """

    name: str

    async def ping(self) -> None:
        """Open what is not open, and make sure that it answers."""
        ...

    async def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]: ...

    async def put_many(self, kept: Sequence[Kept]) -> None: ...

    async def clear(self) -> int:
        """Remove every entry, and return their number."""
        ...

    async def stats(self) -> StoreStats: ...

    async def some(self, limit: int) -> list[Kept]:
        """Up to `limit` entries, the newest first where the store knows their order."""
        ...

    async def close(self) -> None: ...
