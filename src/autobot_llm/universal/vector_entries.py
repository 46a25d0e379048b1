"""A kept vector: its bytes as they came, and in a shared store. Knows numbers; knows no request and no store.

A vector is kept in the width in which it came, so that it comes back bit by bit: float32 where it is an array of such
(what OpenAI's base64 carries), else float64. Sealed as answers are (entries.py): damage costs a miss, and gives nobody
the vector of another text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from hmac import compare_digest

import msgspec

_SEAL_BYTES = 16
_OVERHEAD = 300  # bytes that an entry takes in memory beside its numbers, about


class VectorEntry(msgspec.Struct, array_like=True, frozen=True):
    """A vector that may be given again until `expires`, both times in seconds since the epoch.

    `width` is "f" or "d", as `array` has it, and `data` its numbers in this machine's order of bytes, which is in the
    key. `model` is what the provider called the model that made it. `num_tokens` is the input's length, or its part of
    a call's, by characters.
    """

    created: float
    expires: float
    width: str
    data: bytes
    model: str
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        return _OVERHEAD + len(self.data)

    def vector(self) -> Sequence[float]:
        """The numbers as they came, each time in an array or a list of their own, which the caller may change."""
        numbers = array(self.width, self.data)
        return numbers if self.width == "f" else list(numbers)


def vector_entry(
    vector: Sequence[float], *, model: str, num_tokens: int, created: float, expires: float
) -> VectorEntry:
    kept = vector if isinstance(vector, array) and vector.typecode == "f" else array("d", vector)
    return VectorEntry(created, expires, kept.typecode, kept.tobytes(), model, num_tokens)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(VectorEntry).decode


def seal_vector(key: bytes, entry: VectorEntry) -> bytes:
    """`entry` as it is kept under `key`."""
    body = _encode(entry)
    return _digest(key, body) + body


def unseal_vector(key: bytes, data: bytes) -> VectorEntry | None:
    """The entry that was kept under `key`, None where `data` is anything else."""
    if not compare_digest(data[:_SEAL_BYTES], _digest(key, data[_SEAL_BYTES:])):
        return None
    try:
        entry = _decode(data[_SEAL_BYTES:])
    except msgspec.MsgspecError:
        return None  # sealed by another version
    return entry if entry.width in ("f", "d") and len(entry.data) % array(entry.width).itemsize == 0 else None


def _digest(key: bytes, body: bytes) -> bytes:
    return blake2b(body, digest_size=_SEAL_BYTES, key=key).digest()
