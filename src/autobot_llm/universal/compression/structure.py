"""Tell the prose of a prompt from everything that must stay as it is: code, data, tables, quotes, addresses.

Knows how such things look on the page; knows nothing of what may be done to prose. In doubt, a line is not prose.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

MARK = "\ufffc"
"""Stands for a protected span while prose is worked on. One that a text contains itself is a protected span, too."""

SEPARATOR = "\n\n"

# Elements that hold instructions rather than data: only their tags are kept.
PROSE_TAGS = frozenset(
    {"instruction", "instructions", "rule", "rules", "guidelines", "role", "system", "task", "persona", "style", "tone"}
)

_FENCE = re.compile(r"\s*(?:>\s?)*(?:[-*+]\s+|\d+[.)]\s+)?(`{3,}|~{3,})")
_KEY_LINE = re.compile(r"""(?:-\s+)?["']?[A-Za-z_][\w.\-/]*["']?\s*:(?:\s|$)""")
_DATA_KEY_LINE = re.compile(r"""(?:-\s+)?(?:["'][^"']+["']|[a-z_][\w.\-/]*|\w+[_.\-/][\w.\-/]*)\s*:(?:\s|$)""")
_LIST_LINE = re.compile(r"-\s")
_LIST_BEGINS = re.compile(r"\s*-\s|.*:\s*$")
_DATA_LINE = re.compile(
    r"[ \t]*\S.*[\t|]|[ \t]+\S|[>|]|[-=+.*_~]{3,}[-=+|\s]*$|\[[\w.\-\"]+\]\s*$|[{}\[\](),;]+\s*$|<!--"
)
_CODE_LINE = re.compile(
    r"@\w|#!|#\w|//|/\*|\$ |>>> |% "
    r"|(?:def|class|for|while|if|elif|else|try|except|finally|with|async|fn|func|function|struct|enum|interface|impl"
    r"|switch|case|match|do|public|private|static|export)\b.*[:{;(]\s*$"
    r"|(?:from|import|package|using|return|const|let|var|val)\s+[\w.*{\"']+(?:\s*[;=(,]|\s+(?:import|as|from)\b|\s*$)"
    r"|(?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|WITH|FROM|WHERE|JOIN|GROUP BY|ORDER BY|VALUES|SET)\s\S"
    r"|.*[{;]\s*$"
    r"|[A-Za-z_][\w.\[\]]*\s*(?:[-+*/|&:]?=|<-|->)\s*\S"
    r"|[A-Za-z_][\w.]*\([^()]*\)\s*;?\s*$"
)
_GAP = re.compile(r"[^\s.!?:;,][ ]{2,}\S")
_COMMA_SEPARATED = re.compile(r"[^,\n]*(?:,[^,\s][^,\n]*){2,}$")
_OPENING = re.compile(r"<([A-Za-z][\w.\-]*)(?:\s[^<>]*)?>")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')

# Spans inside of prose. A quotation that is not closed ends with its paragraph.
_REST = r"(?=\n[ \t]*\n)|\Z"
_INLINE = re.compile(
    rf"{MARK}"
    r"|(?P<ticks>`+)[^`](?:.|\n(?![ \t]*\n))*?(?P=ticks)(?!`)|`(?:.|\n(?![ \t]*\n))*"
    rf'|"(?:[^"\n]|\n(?![ \t]*\n))*(?:"|{_REST})'
    rf"|“(?:[^”\n]|\n(?![ \t]*\n))*(?:”|{_REST})"
    rf"|„(?:[^“”\n]|\n(?![ \t]*\n))*(?:[“”]|{_REST})"
    rf"|«(?:[^»\n]|\n(?![ \t]*\n))*(?:»|{_REST})"
    r"|「[^「」\n]*」|『[^『』\n]*』"
    r"|(?<![\w’'])'(?:[^'\n]|(?<=\w)'(?=\w))*'(?!\w)|‘(?:[^‘’\n]|(?<=\w)’(?=\w))*’"
    r"|\$[^\s$][^$\n]*\$|\\\(.{0,500}?\\\)|\\\[.{0,500}?\\\]"
    r"|!?\[[^\[\]\n]*\](?:\([^()\n]*\)|\[[^\[\]\n]*\])?"
    r"|\{\{[^{}\n]*\}\}|\{[^{}\n]*\}|<[^<>\s][^<>\n]*>"
    r"|\b[A-Za-z][A-Za-z0-9+.\-]{0,20}://\S+"
)


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with each protected span replaced by one MARK; `spans` are they, in order."""

    text: str
    spans: tuple[str, ...]

    def split(self, separator: str) -> list[str]:
        """The text, cut where `separator` stands outside of protected spans."""
        spans = iter(self.spans)
        pieces = (piece.split(MARK) for piece in self.text.split(separator))
        return [first + "".join(next(spans) + part for part in others) for first, *others in pieces]

    def unmasked(self, text: str) -> str:
        """`text`, an edited form of `self.text` that still has every mark in order, with the spans put back."""
        parts = text.split(MARK)
        assert len(parts) == len(self.spans) + 1, "an edit keeps every mark"
        return "".join(part + span for part, span in zip(parts, (*self.spans, ""), strict=True))


def mask(text: str) -> Masked:
    """Protect what is not prose; `mask(text).unmasked(mask(text).text) == text`, always."""
    spans: list[str] = []

    def protect(span: str) -> str:
        spans.append(span)
        return MARK

    pieces = []
    for is_data, block in _blocks(text):
        if is_data:
            body = block.removesuffix("\n")
            pieces.append(protect(body) + block[len(body) :])
        else:
            pieces.append(_INLINE.sub(lambda found: protect(found.group()), block))
    return Masked("".join(pieces), tuple(spans))


def paragraphs(text: str) -> list[str]:
    """What empty lines separate; one within code or data separates nothing."""
    return [piece for piece in mask(text).split(SEPARATOR) if piece.strip()] or [text]


def _blocks(text: str) -> Iterator[tuple[bool, str]]:
    """The text in pieces of whole lines, each data or not."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    is_data = [False] * len(lines)
    for mark_lines in (_fences, _elements, _brackets, _lines_of_data, _tables, _spread, _gaps):
        for number in mark_lines(lines, is_data):
            is_data[number] = True
    numbered = zip(is_data, lines, strict=True)
    for kind, group in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield kind, "".join(line for _, line in group)


# --- which lines are data: each yields numbers of lines, given those that are already known ---------------------------


def _fences(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """Fenced code, to the end of the text where the fence is never closed."""
    fence = ""
    for number, line in enumerate(lines):
        found = _FENCE.match(line)
        if fence:
            yield number
            if found and found[1].startswith(fence) and not line[found.end() :].strip():
                fence = ""
        elif found:
            fence = found[1]
            yield number


def _elements(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """`<document>...</document>`, over several lines or within one; of PROSE_TAGS only the tags are data."""
    last = -1
    closings: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        for name in re.findall(r"</([A-Za-z][\w.\-]*)>", line):
            closings.setdefault(name, []).append(number)
    for number, line in enumerate(lines):
        if number <= last or is_data[number]:
            continue
        for name in _OPENING.findall(line):
            if name.lower() in PROSE_TAGS or name not in closings:
                continue
            at = bisect.bisect_left(closings[name], number)
            if at < len(closings[name]):
                last = max(last, closings[name][at])
                yield from range(number, last + 1)


def _brackets(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """Lines from one that begins with a bracket to the one where it closes; unclosed, to the end of the paragraph."""
    number = 0
    while number < len(lines):
        if is_data[number] or not lines[number].startswith(("{", "[")):
            number += 1
            continue
        first, depth = number, 0
        while number < len(lines) and lines[number].strip():
            bare = _STRING.sub("", lines[number])
            depth += sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))
            number += 1
            if depth <= 0:
                break
        if number - first > 1 or lines[first].rstrip().endswith(("}", "]", "},", "],")):
            yield from range(first, number)


def _lines_of_data(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """Indented lines, tables, block quotes, rules, keys of YAML, and lines of code."""
    for number, line in enumerate(lines):
        if line.strip() and any(kind.match(line) for kind in (_DATA_LINE, _DATA_KEY_LINE, _CODE_LINE)):
            yield number


def _tables(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """Two lines in a row, or more, with aligned columns, with separated values, or with one key each."""
    for kind in (_GAP.search, _COMMA_SEPARATED.match, _KEY_LINE.match):
        for number in range(1, len(lines)):
            if kind(lines[number - 1]) and kind(lines[number]):
                yield from (number - 1, number)


def _spread(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """A key beside data is data, and so is a list right below a key."""
    for number, line in enumerate(lines):
        before = number > 0 and is_data[number - 1] and bool(lines[number - 1].strip())
        after = number + 1 < len(lines) and is_data[number + 1] and lines[number + 1].startswith((" ", "\t"))
        is_key = _KEY_LINE.match(line) and (before or after)
        is_item = before and _LIST_LINE.match(line) and _LIST_BEGINS.match(lines[number - 1])
        if is_key or is_item:
            is_data[number] = True
            yield number


def _gaps(lines: list[str], is_data: list[bool]) -> Iterator[int]:
    """Empty lines between data belong to it."""
    empty: list[int] = []
    after_data = False
    for number, line in enumerate(lines):
        if is_data[number]:
            if after_data:
                yield from empty
            after_data, empty = True, []
        elif line.strip():
            after_data, empty = False, []
        else:
            empty.append(number)
