"""Read one tool call, a JSON object, from text that comes in pieces. Knows JSON's shape; knows nothing of markers.

The call is told as soon as its function is known, and its arguments as they come, exactly as the model writes them. A
call that is malformed before that, or names a function that was not offered, is no call: its text is given back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=[^\s])')


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the function `name` begins. `position` counts an answer's calls."""

    position: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    position: int
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """What is no call."""

    text: str


Piece = CallStart | CallArguments | Text


class JsonCall:
    """`{"name": ..., "arguments": {...}}`, or with "parameters", from its opening brace on.

    `push` takes text until `is_over`; what lies behind the call is then in `rest`. As long as it is not known to be a
    call (`is_call`), `raw` is all that was taken.
    """

    def __init__(self, position: int, functions: frozenset[str]) -> None:
        self.position = position
        self.raw = ""
        self.rest = ""
        self.is_over = False
        self.is_call = False
        self._functions = functions
        self._whole = _Nesting()
        self._arguments: _Nesting | None = None
        self._may_have_head = True

    def push(self, text: str) -> list[CallStart | CallArguments]:
        assert not self.is_over
        taken, self.is_over = self._whole.push(text)
        self.rest = text[taken:]
        if self._arguments is not None:
            return self._more_arguments(text[:taken])
        self.raw += text[:taken]
        if self._may_have_head and (head := _HEAD.match(self.raw)):
            self._may_have_head = False
            name = _text(head[1])
            if name in self._functions and self.raw[head.end()] == "{":
                self.is_call = True
                self._arguments = _Nesting()
                return [CallStart(self.position, name), *self._more_arguments(self.raw[head.end() :])]
        return self._from_whole() if self.is_over else []

    def _more_arguments(self, text: str) -> list[CallStart | CallArguments]:
        assert self._arguments is not None
        if self._arguments.is_over:
            return []
        taken, _ = self._arguments.push(text)
        return [CallArguments(self.position, text[:taken])] if taken else []

    def _from_whole(self) -> list[CallStart | CallArguments]:
        """A call whose keys stand in another order, or whose arguments are JSON in a string."""
        try:
            call = json.loads(self.raw)
        except (ValueError, RecursionError):
            return []
        arguments = _arguments(call) if isinstance(call, dict) and isinstance(call.get("name"), str) else None
        if arguments is None or call["name"] not in self._functions:
            return []
        self.is_call = True
        return [CallStart(self.position, call["name"]), CallArguments(self.position, arguments)]


def _text(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


def _arguments(call: dict[str, Any]) -> str | None:
    value = call.get("arguments", call.get("parameters"))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return None
    try:
        return value if isinstance(json.loads(value), dict) else None
    except (ValueError, RecursionError):
        return None


class _Nesting:
    """Finds the end of an object: where its last brace closes, or what cannot be JSON begins."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str) -> tuple[int, bool]:
        """How many characters still belong to the object, and whether it is over."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_over = True
                    return place + 1, True
            elif character == "<":  # a marker that comes too early
                self.is_over = True
                return place, True
        return len(text), False
