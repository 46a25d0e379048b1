"""A kept answer: its events, its age, and its bytes in a shared store. Knows events; knows no request and no store.

The bytes begin with a hash of the rest under the answer's key. What comes back from a store is believed only if it is
whole and stands under the key that it was kept under, so a damaged file or a mixed-up connection costs a miss and never
gives a caller somebody else's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from hmac import compare_digest

import msgspec

from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCallDelta,
)

_SEAL_BYTES = 16
_KINDS: tuple[type[Event], ...] = (
    Start, TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta, ChoiceEnd, Finish,
)  # fmt: skip
_PLACES = {kind: place for place, kind in enumerate(_KINDS)}
_EVENT_OVERHEAD = 160  # bytes that an event takes in memory beside its text, about


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that may be given again until `expires`, both times in seconds since the epoch.

    `events` go from Start to Finish in the pieces in which they came. `milliseconds` is how long the provider took.
    `num_bytes` is about what the entry takes in memory.
    """

    events: tuple[Event, ...]
    created: float
    expires: float
    milliseconds: float
    num_bytes: int


def num_bytes_of(event: Event) -> int:
    """About what `event` takes in memory."""
    if type(event) is TextDelta:
        return _EVENT_OVERHEAD + len(event.text) + sum(80 * (1 + len(one.top)) for one in event.logprobs)
    if isinstance(event, ReasoningDelta | RefusalDelta):
        return _EVENT_OVERHEAD + len(event.text)
    return _EVENT_OVERHEAD + len(event.arguments) if isinstance(event, ToolCallDelta) else _EVENT_OVERHEAD


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    created: float
    expires: float
    milliseconds: float
    events: Sequence[tuple[int, msgspec.Raw]]


class _Storing(msgspec.Struct, array_like=True, frozen=True):
    created: float
    expires: float
    milliseconds: float
    events: Sequence[tuple[int, Event]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Stored).decode
_decode_event = tuple(msgspec.msgpack.Decoder(kind).decode for kind in _KINDS)


def seal(key: bytes, entry: Entry) -> bytes:
    """`entry` as it is kept under `key`."""
    events = [(_PLACES[type(event)], event) for event in entry.events]
    body = _encode(_Storing(entry.created, entry.expires, entry.milliseconds, events))
    return blake2b(body, digest_size=_SEAL_BYTES, key=key).digest() + body


def unseal(key: bytes, data: bytes) -> Entry | None:
    """The entry that was kept under `key`, None where `data` is anything else."""
    seal_, body = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
    if not compare_digest(seal_, blake2b(body, digest_size=_SEAL_BYTES, key=key).digest()):
        return None
    try:
        stored = _decode(body)
        events: tuple[Event, ...] = tuple(_decode_event[place](raw) for place, raw in stored.events)
    except (msgspec.MsgspecError, IndexError):
        return None  # sealed by a version whose events were others
    num_bytes = sum(map(num_bytes_of, events))
    return Entry(
        events=events,
        created=stored.created,
        expires=stored.expires,
        milliseconds=stored.milliseconds,
        num_bytes=num_bytes,
    )
