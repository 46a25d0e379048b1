"""Take the GOAWAY frames out of an HTTP/2 connection's bytes. Knows the frame header only (RFC 9113, 4.1 and 6.8).

A server says GOAWAY when it takes no more requests; those that it has taken go on. The h2 library regards it as the
end of the connection and refuses every frame after it, so it never sees one.
"""

from __future__ import annotations

from dataclasses import dataclass

_HEADER_BYTES = 9
_GOAWAY = 7
_GOAWAY_BYTES = 8  # at least; a shorter one is h2's to refuse
_MOST_BYTES = 16384  # of a frame, and we allow no more


class OversizedFrame(Exception):
    """The server sends a frame that is larger than we said we take, or no frames at all."""


@dataclass(frozen=True, slots=True)
class GoAway:
    """Requests on streams above `last_stream_id` were not looked at. `error_code` 0 is a graceful end."""

    last_stream_id: int
    error_code: int
    reason: str


class GoAwayCutter:
    """Takes bytes cut at any place, and gives those of all other frames, and the GOAWAYs that are complete."""

    def __init__(self) -> None:
        self._num_left = 0  # bytes of the frame under way that are yet to come
        self._held = b""  # the beginning of a frame that may be a GOAWAY

    def feed(self, data: bytes) -> tuple[bytes, list[GoAway]]:
        """Raises OversizedFrame."""
        if self._held:
            data, self._held = self._held + data, b""
        position, end = self._num_left, len(data)
        others: list[bytes] = []
        found: list[GoAway] = []
        begin = 0  # of the bytes that are passed on
        while position + _HEADER_BYTES <= end:
            length = int.from_bytes(data[position : position + 3], "big")
            if length > _MOST_BYTES:  # h2 would refuse it too, once it had all of it
                raise OversizedFrame(f"a frame of {length} bytes")
            after = position + _HEADER_BYTES + length
            if data[position + 3] == _GOAWAY and length >= _GOAWAY_BYTES:
                if after > end:
                    break
                others.append(data[begin:position])
                found.append(_read(data[position + _HEADER_BYTES : after]))
                begin = after
            position = after
        if position < end:  # half a frame header, or of a GOAWAY
            self._held = data[position:]
            self._num_left = 0
            data = data[:position]
        else:
            self._num_left = position - end
        if not others:
            return data, found
        others.append(data[begin:])
        return b"".join(others), found


def _read(payload: bytes) -> GoAway:
    return GoAway(
        last_stream_id=int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF,
        error_code=int.from_bytes(payload[4:8], "big"),
        reason=payload[8:208].decode("utf-8", "replace"),
    )
