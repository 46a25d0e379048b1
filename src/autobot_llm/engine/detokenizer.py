"""Token ids to text, one at a time, as they are generated. Knows characters and stop strings; knows nothing of why a
token was chosen.

What is emitted is never taken back: half a character waits for its other half, and what may be the beginning of a stop
string waits until it is one or is not.
"""

from __future__ import annotations

import codecs
import re
from typing import Protocol
from weakref import WeakKeyDictionary

from autobot_llm.engine.tokenizer import Tokenizer

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
MAX_HEAD_TOKENS = 8


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What one token adds to a text that goes before it, as bytes: they may be half a character.

    A special token is written as its name, and an id that is no token as nothing.
    """
    piece = tokenizer.piece(token_id)
    if piece is None:
        return b""
    if token_id in tokenizer.special_ids:
        return piece.encode()
    if tokenizer.decoder_kind == "byte_level":
        return _bytes_and_text(piece)[0]
    if tokenizer.decoder_kind == "byte_fallback" and BYTE_PIECE.match(piece):
        return bytes([int(piece[3:5], 16)])
    return tokenizer.decode_after_text([token_id], skip_special_tokens=False).encode()


class Detokenizer:
    """One answer's text. The pieces that `push` and `flush` return add up to `tokenizer.decode` of all the ids, less an
    incomplete character at the end, and cut before the first stop string.

    With several stop strings the one that is complete first counts, so the text does not depend on how it fell into
    tokens. Each call costs time for the new token alone, however long the answer. Not thread-safe; one per choice.
    """

    stop_string: str | None = None
    """The stop string that was met. The text ended before it, and later tokens add nothing."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        keeps_leading_space: bool = False,
    ) -> None:
        """`shown_ids` are special tokens that are shown though others are skipped. With `keeps_leading_space` the text
        is what the tokens add to a text before them, also where `tokenizer.decode` would drop a space at the start."""
        skipped_ids = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset[int]()
        self._text = _text_stream(tokenizer, skipped_ids, keeps_leading_space)
        self._stop = _StopStrings(stop) if stop else None

    @property
    def has_stop_strings(self) -> bool:
        return self._stop is not None

    def push(self, token_id: int, *, match_stop: bool = True) -> str:
        """The text that is certain now, after one more token; often a little late, sometimes empty.

        With `match_stop` False a stop string that ends in this token's text does not count (`min_tokens`).
        """
        text = self._text.push(token_id)
        if self._stop is None:
            return text
        text = self._stop.push(text, match_stop)
        self.stop_string = self._stop.matched
        return text

    def flush(self) -> str:
        """The rest, once no token follows: what was held back for a stop string, without an incomplete character."""
        text = self._text.flush()
        if self._stop is None:
            return text
        text = self._stop.push(text, match=True) + self._stop.flush()
        self.stop_string = self._stop.matched
        return text


class _StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        assert all(stop), "an empty stop string is refused with the request"
        self._stop = stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, match: bool) -> str:
        if self.matched is not None or not text:
            return ""
        buffer = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := buffer.find(stop)) >= 0]
        if ends and match:
            _, start, self.matched = min(ends)
            self._held = ""
            return buffer[:start]
        num_held = max(_overlap(buffer, stop) for stop in self._stop)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class _TextStream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def _text_stream(tokenizer: Tokenizer, skipped_ids: frozenset[int], keeps_leading_space: bool) -> _TextStream:
    if tokenizer.decoder_kind == "byte_level":
        return _ByteLevelText(tokenizer, skipped_ids)
    return _PieceText(
        tokenizer,
        skipped_ids,
        has_bytes=tokenizer.decoder_kind == "byte_fallback",
        keeps_leading_space=keeps_leading_space,
    )


class _ByteLevelText:
    """For vocabularies of byte strings (GPT-2's scheme; Llama 3, Qwen): UTF-8, decoded incrementally."""

    def __init__(self, tokenizer: Tokenizer, skipped_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._pieces = _PIECES.setdefault(tokenizer, {})
        self._skipped = skipped_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_between = True  # two characters, so that whole ones need no decoder

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = _bytes_and_text(self._tokenizer.piece(token_id) or "")
        if self._is_between and piece[1] is not None:
            return piece[1]
        text = self._utf8.decode(piece[0])
        self._is_between = not self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        self._utf8.reset()
        return ""


_PIECES: WeakKeyDictionary[Tokenizer, dict[int, tuple[bytes, str | None]]] = WeakKeyDictionary()
"""By token id, of the tokens that were met so far: an answer's text is mostly made of the same few thousand."""


def _bytes_and_text(piece: str) -> tuple[bytes, str | None]:
    """What a piece of a byte-level vocabulary stands for; as text, too, if it is whole characters.

    One that is not of the vocabulary's alphabet is plain text.
    """
    try:
        data = bytes(BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:
        return piece.encode(), piece
    try:
        return data, data.decode()
    except UnicodeDecodeError:
        return data, None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: visible Latin-1 characters stand for themselves, other bytes for U+0100 and up, in order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


class _PieceText:
    """For vocabularies of text pieces (SentencePiece's scheme), some with single bytes for what they lack.

    The library's decoder treats pieces one by one, except at the beginning (it drops a space there) and in a run of
    bytes: a run that is not UTF-8 as a whole becomes U+FFFD for each byte, so a run is held until it ends.
    """

    def __init__(
        self, tokenizer: Tokenizer, skipped_ids: frozenset[int], *, has_bytes: bool, keeps_leading_space: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped_ids  # they never get as far as the library's decoder
        self._has_bytes = has_bytes
        self._bytes: list[int] = []
        self._head: list[int] = []
        """The first tokens, while they may still all be the space that is dropped."""
        self._head_text = ""
        self._is_past_head = keeps_leading_space

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if self._has_bytes and BYTE_PIECE.match(piece):
            self._bytes.append(token_id)
            return ""
        run, self._bytes = self._bytes, []
        return self._decode([*run, token_id])

    def flush(self) -> str:
        run, self._bytes = self._bytes, []
        return self._decode(run[: len(run) - self._num_incomplete(run)]) if run else ""

    def _decode(self, ids: list[int]) -> str:
        if self._is_past_head:
            return self._tokenizer.decode_after_text(ids, skip_special_tokens=False)
        self._head += ids
        before = len(self._head_text)
        self._head_text = self._tokenizer.decode(self._head, skip_special_tokens=False)
        self._is_past_head = bool(self._head_text.strip(" ")) or len(self._head) >= MAX_HEAD_TOKENS
        return self._head_text[before:]

    def _num_incomplete(self, run: list[int]) -> int:
        """Bytes at the end of a run that begin a character and do not end it."""
        data = bytes(int((self._tokenizer.piece(token_id) or "<0x00>")[3:5], 16) for token_id in run)
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        utf8.decode(data)
        return len(utf8.getstate()[0])
