"""What every provider of batches can do, in the fewest verbs. Knows parts of jobs; knows no one provider."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterable, Callable, Collection
from pathlib import Path
from typing import Protocol

import msgspec

from autobot_llm.cloud.batch_jobs.job import ItemResult, Part
from autobot_llm.transport.network import DEFAULT_LIMITS, PoolLimits
from autobot_llm.types import LLMRequest, Usage

Write = Callable[[bytes], object]

CALL_SECONDS = 120.0  # for an answer that needs no model
_MOST_CONNECTIONS = 4  # a job's calls are few, and large
_MAX_RESULT_BYTES = 16 * 2**30
_BYTES_PER_SECOND = 250_000  # of an upload, at the slowest


def upload_seconds(num_bytes: int) -> float:
    """How long sending `num_bytes`, and the answer to that, may take."""
    return CALL_SECONDS + num_bytes / _BYTES_PER_SECOND


async def write_lines(chunks: AsyncIterable[bytes], write: Write) -> None:
    """Give all of `chunks` to `write`, on another thread; the last line ends, even where the provider's does not."""
    last = b"\n"
    async for chunk in chunks:
        await asyncio.to_thread(write, chunk)
        last = chunk
    if not last.endswith(b"\n"):
        await asyncio.to_thread(write, b"\n")


def sizes_of(limits: PoolLimits) -> PoolLimits:
    """The limits of a pool for batches, where `limits` are those of the provider's requests."""
    return dataclasses.replace(
        limits,
        max_connections=min(_MOST_CONNECTIONS, limits.max_connections),
        max_stream_bytes=max(_MAX_RESULT_BYTES, limits.max_stream_bytes),
    )


DEFAULT_SIZES = sizes_of(DEFAULT_LIMITS)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one batch holds at most. Embeddings count by their inputs."""

    max_requests: int
    max_bytes: int


class Kind(msgspec.Struct, frozen=True):
    """What all requests of one batch have in common: the path of the API, the model where that matters, and headers."""

    url: str
    model: str
    headers: tuple[tuple[str, str], ...] = ()


class WireItem(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the provider takes it, and the batches that it may be in. `weight` counts against the limit."""

    data: bytes
    kind: Kind
    weight: int = 1


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a part's results: whose it is, what it is, and what is to be paid for.

    `is_unreadable`: the provider has answered something, and nobody knows what, nor what it cost.
    """

    custom_id: str
    result: ItemResult
    model: str | None = None
    usage: Usage | None = None
    is_unreadable: bool = False


class Undecided(Exception):
    """Whether the provider has a part will be known later; `candidates` are the batches that could be it."""

    def __init__(self, candidates: tuple[str, ...]) -> None:
        super().__init__(", ".join(candidates))
        self.candidates = candidates


class BatchService(Protocol):
    """One provider's batches. Its methods raise the errors of `HttpPool.request`."""

    name: str
    address: str
    limits: Limits
    uploads: bool
    separator: bytes

    def write_chat(self, custom_id: str, request: LLMRequest, model: str) -> WireItem:
        """Raises UnsupportedError and InvalidRequestError with the field."""
        ...

    def write_embedding(self, custom_id: str, body: bytes, model: str) -> WireItem:
        """`body` is OpenAI's. Raises UnsupportedError where there are no embeddings."""
        ...

    async def upload(self, part: Part, path: Path) -> str:
        """Send the requests in the file at `path` and return the file's id; only where the service `uploads` first."""
        ...

    async def find_upload(self, part: Part, path: Path, since: float) -> str | None:
        """The id of the part's file, if it was uploaded whole after `since` by our clock."""
        ...

    async def create(self, part: Part, path: Path) -> str:
        """Have the provider begin with the part, and return the batch's id."""
        ...

    async def find(self, part: Part, since: float, known: Collection[str], owns: Callable[[str], bool]) -> str | None:
        """The id of the part's batch, if it was created after `since` by our clock.

        `known` are batches of other parts, and `owns` tells whether a request's custom_id is one of this part's. Raises
        Undecided where that cannot be told yet.
        """
        ...

    async def look(self, part: Part) -> dict[str, object]:
        """How far the part's batch is: what has changed of `Part`'s fields."""
        ...

    async def cancel(self, part: Part) -> None:
        """Have the provider stop; what is done by then stays done. No error if it has ended already."""
        ...

    async def download(self, part: Part, write: Write) -> None:
        """Write every line of the part's results, in any order."""
        ...

    async def read(self, line: bytes) -> Outcome:
        """What one line of results says. Raises ProviderError where it is none."""
        ...

    async def close(self) -> None: ...
