"""Choose the replica of a request: the one whose prefix cache knows its beginning, unless that one is overloaded.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018). Knows names and counts; knows nothing
of HTTP or of who is healthy.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence

from autobot_llm.types import ChatMessage, LLMRequest

POINTS_PER_REPLICA = 160  # on the ring: the shares of replicas differ by a few percent
LOAD_FACTOR = 1.25  # a replica takes at most this many times the mean number of requests
FREE_LOAD = 4  # requests that every replica takes, however idle the others are: so few cost it nothing
MAX_KEY_BYTES = 4096  # of a conversation's beginning; about a thousand tokens


class Ring:
    """Names on a circle. A name that goes leaves its share to others and moves nobody else's."""

    def __init__(self, names: Sequence[str]) -> None:
        points = sorted(
            (_position(f"{name}#{number}".encode()), name) for name in names for number in range(POINTS_PER_REPLICA)
        )
        self._positions = [position for position, _ in points]
        self._names = [name for _, name in points]
        self._num_names = len(set(names))

    def clockwise(self, key: bytes) -> Iterator[str]:
        """Every name once, the owner of `key` first."""
        start = bisect.bisect(self._positions, _position(key))
        seen: set[str] = set()
        for step in range(len(self._names)):
            if len(seen) == self._num_names:
                return
            name = self._names[(start + step) % len(self._names)]
            if name not in seen:
                seen.add(name)
                yield name


def _position(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


class Balancer:
    """Knows how many requests each replica answers now, and in which order replicas should be tried."""

    def __init__(self, names: Sequence[str]) -> None:
        self._ring = Ring(names)
        self._loads = dict.fromkeys(names, 0)

    @property
    def loads(self) -> dict[str, int]:
        """Requests under way, by replica."""
        return dict(self._loads)

    def order(self, key: bytes, usable: Collection[str]) -> list[str]:
        """The usable replicas, the best one first: the key's own, then its neighbours; overloaded ones come last."""
        if not usable:
            return []
        total = sum(self._loads[name] for name in usable)
        capacity = max(FREE_LOAD, math.ceil(LOAD_FACTOR * (total + 1) / len(usable)))
        clockwise = [name for name in self._ring.clockwise(key) if name in usable]
        return sorted(clockwise, key=lambda name: self._loads[name] if self._loads[name] >= capacity else 0)

    def home(self, key: bytes, usable: Collection[str]) -> str:
        """The usable replica to which the key belongs, overloaded or not; there must be one."""
        return next(name for name in self._ring.clockwise(key) if name in usable)

    @contextlib.contextmanager
    def under_way(self, name: str) -> Iterator[None]:
        """Count one request to the replica while the block runs."""
        self._loads[name] += 1
        try:
            yield
        finally:
            self._loads[name] -= 1


def affinity_key(request: LLMRequest) -> bytes:
    """What requests have in common that should meet the same prefix cache: the tenant, and how the prompt begins.

    Of a conversation that is everything up to the first thing the user said, so that its later turns have the same
    key; of a prompt, its first characters or token ids.
    """
    prompt = request.prompt
    if request.messages is not None:
        beginning = "\0".join(_opening(request.messages))
    elif isinstance(prompt, str):
        beginning = prompt[:MAX_KEY_BYTES]
    else:
        beginning = str((prompt or [])[: MAX_KEY_BYTES // 4])
    return request.tenant.encode() + b"\0" + beginning.encode("utf-8", "surrogatepass")[:MAX_KEY_BYTES]


def _opening(messages: Sequence[ChatMessage]) -> Iterator[str]:
    for message in messages:
        parts = message.content if isinstance(message.content, list) else [message.content]
        for part in parts:
            # A picture is megabytes of text: only its beginning is looked at.
            yield (part if isinstance(part, str) else repr(_cut(part)))[:MAX_KEY_BYTES]
        if message.role == "user":
            return


def _cut(part: object) -> object:
    """A content part with its long texts cut."""
    if isinstance(part, dict):
        return {name: _cut(value) for name, value in part.items()}
    return part[:MAX_KEY_BYTES] if isinstance(part, str) else part
