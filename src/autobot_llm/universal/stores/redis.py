"""The second level that hosts share: a Redis. Knows keys and bytes; knows nothing of answers.

Commands: https://redis.io/commands. A key that holds something else than a string counts as absent and is overwritten.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from autobot_llm.errors import ConfigurationError
from autobot_llm.universal.request_key import FORMAT
from autobot_llm.universal.stores.base import Kept, StoreStats

ANSWERS = b"autobot:answer:%d:" % FORMAT
VECTORS = b"autobot:vector:%d:" % FORMAT
COMMAND_SECONDS = 1.0  # after which a silent server's connection is closed
MAX_CONNECTIONS = 4  # lookups, writes and commands of a person follow one another
SCAN_COUNT = 500


class RedisStore:
    """A `SharedStore` in the Redis at `url`, under names that begin with `prefix`.

    Raises ConfigurationError where its client is not installed.
    """

    def __init__(self, url: str, *, prefix: bytes = ANSWERS) -> None:
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                'AUTOBOT_REDIS_URL needs redis, which is not installed: pip install "autobot_llm[redis]"'
            ) from exc
        self._prefix = prefix
        parts = urlsplit(url)
        self.name = f"the Redis at {parts.hostname or parts.path}" + (f":{parts.port}" if parts.port else "")
        self._redis = Redis.from_url(
            url,
            socket_timeout=COMMAND_SECONDS,
            socket_connect_timeout=COMMAND_SECONDS,
            max_connections=MAX_CONNECTIONS,
            retry=Retry(NoBackoff(), 0),
        )

    async def ping(self) -> None:
        await self._redis.ping()

    async def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found = await self._redis.mget([self._prefix + key.hex().encode() for key in keys])
        return {key: data for key, data in zip(keys, found, strict=True) if isinstance(data, bytes)}

    async def put_many(self, kept: Sequence[Kept]) -> None:
        now = time.time()
        async with self._redis.pipeline(transaction=False) as pipeline:
            for one in kept:
                if (milliseconds := int((one.expires - now) * 1000)) > 0:
                    pipeline.set(self._prefix + one.key.hex().encode(), one.data, px=milliseconds)
            await pipeline.execute()

    async def clear(self) -> int:
        num_removed = 0
        async for names in self._names():
            num_removed += await self._redis.unlink(*names)
        return num_removed

    async def stats(self) -> StoreStats:
        num_entries = num_bytes = 0
        async for names in self._names():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.strlen(name)
                sizes = await pipeline.execute(raise_on_error=False)
            num_entries += len(names)
            num_bytes += sum(size for size in sizes if isinstance(size, int))
        return StoreStats(num_entries=num_entries, num_bytes=num_bytes)

    async def some(self, limit: int) -> list[Kept]:
        kept: list[Kept] = []
        async for names in self._names():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for name in names[: limit - len(kept)]:
                    pipeline.get(name)
                    pipeline.pttl(name)
                replies = await pipeline.execute(raise_on_error=False)
            for name, data, milliseconds in zip(names, replies[::2], replies[1::2], strict=False):
                if isinstance(data, bytes) and milliseconds > 0:
                    key = bytes.fromhex(name.removeprefix(self._prefix).decode())
                    kept.append(Kept(key, time.time() + milliseconds / 1000, data))
            if len(kept) >= limit:
                break
        return kept

    async def close(self) -> None:
        await self._redis.aclose()

    async def _names(self) -> AsyncIterator[list[bytes]]:
        """The names of all entries, some at a time, without holding the server up."""
        cursor = 0
        while True:
            cursor, names = await self._redis.scan(cursor, match=self._prefix + b"*", count=SCAN_COUNT)
            if names:
                yield [name for name in names if isinstance(name, bytes)]
            if cursor == 0:
                return
