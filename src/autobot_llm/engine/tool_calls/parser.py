"""Find the tool calls in an answer that comes in pieces. Knows markers; knows nothing of models or of tokens.

However the text is cut, the calls and the text beside them are the same. What looks like a call and is none stays text,
with its markers: nothing that a model wrote is lost.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from autobot_llm.engine.tool_calls.json_call import JsonCall, Piece, Text


@dataclass(frozen=True, slots=True)
class Markers:
    """How calls are set apart from text: `open`, perhaps `list_open`, calls with `separator` between them, `close`.

    Empty texts are markers that a form does not have. `may_be_bare`: an answer that begins with a brace is a call.
    """

    open: str
    close: str = ""
    list_open: str = ""
    separator: str = ""
    may_be_bare: bool = False


class _Place(enum.Enum):
    START = enum.auto()  # nothing but white space so far
    TEXT = enum.auto()
    BEFORE = enum.auto()  # a call must follow
    CALL = enum.auto()
    AFTER = enum.auto()  # a call is over, its closing marker may follow
    BETWEEN = enum.auto()  # more calls may follow


class ToolCallParser:
    """The calls of one answer. `push` pieces of text, then `finish`; `num_calls` counts those that began."""

    def __init__(self, markers: Markers, functions: frozenset[str]) -> None:
        self.num_calls = 0
        self._markers = markers
        self._functions = functions
        self._place = _Place.START
        self._buffer = ""  # text that was not understood yet
        self._held = ""  # markers and white space that are text if no call follows
        self._call: JsonCall | None = None
        # What may follow at each place, after white space.
        self._expected = {
            _Place.START: {markers.open: _Place.BEFORE} | ({"{": _Place.CALL} if markers.may_be_bare else {}),
            _Place.BEFORE: {"{": _Place.CALL} | _if_given(markers.list_open, _Place.BEFORE),
            _Place.AFTER: _if_given(markers.close, _Place.BETWEEN) | _if_given(markers.separator, _Place.BEFORE),
            _Place.BETWEEN: {markers.open: _Place.BEFORE},
        }

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer and self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, once no text follows. White space after calls is dropped."""
        text = self._held + self._buffer
        if self._place is _Place.CALL:
            assert self._call is not None
            text = "" if self._call.is_call else self._held + self._call.raw
        elif self._place in (_Place.AFTER, _Place.BETWEEN):
            text = text if text.strip() else ""
        self._buffer = self._held = ""
        self._place = _Place.TEXT
        return [Text(text)] if text else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """Understand a little more of the buffer; False where that takes more text."""
        if self._place is _Place.TEXT:
            return self._pass_text(pieces)
        if self._place is _Place.CALL:
            return self._read_call(pieces)
        rest = self._buffer.lstrip()
        expected = self._expected[self._place]
        for marker, place in expected.items():
            if rest.startswith(marker):
                self._enter(place, marker)
                return True
        if any(marker.startswith(rest) for marker in expected):
            return False
        self._give_up(pieces)
        return True

    def _enter(self, place: _Place, marker: str) -> None:
        end = self._buffer.index(marker) + (0 if place is _Place.CALL else len(marker))
        if self._place in (_Place.AFTER, _Place.BETWEEN):
            self._held = ""  # it led from one call to the next
        self._held += self._buffer[:end]
        self._buffer = self._buffer[end:]
        self._place = place
        if place is _Place.CALL:
            self._call = JsonCall(self.num_calls, self._functions)
        elif place is _Place.BETWEEN:
            self._held = ""

    def _give_up(self, pieces: list[Piece]) -> None:
        """What was held is text, and so is what follows."""
        if self._held:
            pieces.append(Text(self._held))
        self._held = ""
        self._place = _Place.TEXT

    def _pass_text(self, pieces: list[Piece]) -> bool:
        start = self._buffer.find(self._markers.open)
        is_found = start >= 0
        if not is_found:
            start = len(self._buffer) - _overlap(self._buffer, self._markers.open)
        if start:
            pieces.append(Text(self._buffer[:start]))
            self._buffer = self._buffer[start:]
        if is_found:
            self._enter(_Place.BEFORE, self._markers.open)
        return is_found

    def _read_call(self, pieces: list[Piece]) -> bool:
        call = self._call
        assert call is not None
        text, self._buffer = self._buffer, ""
        pieces += call.push(text)
        self.num_calls = call.position + call.is_call
        if not call.is_over:
            return False
        self._buffer = call.rest
        if call.is_call:
            self._held = ""
            self._place = _Place.AFTER
        else:
            pieces.append(Text(self._held + call.raw))
            self._held = ""
            self._place = _Place.TEXT
        return True


def _if_given(marker: str, place: _Place) -> dict[str, _Place]:
    return {marker: place} if marker else {}


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
