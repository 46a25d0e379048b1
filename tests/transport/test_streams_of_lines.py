"""However a stream of bytes is cut, the same events and lines come out of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autobot_llm.errors import ProviderError
from autobot_llm.transport import ndjson, sse
from autobot_llm.transport.ndjson import LineParser
from autobot_llm.transport.sse import SseEvent, SseParser

LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINES = st.one_of(
    st.sampled_from(["", "", "data", "data:", "data: ", ": comment", "event: ping", "id: 1", "retry: 5", "other: x"]),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8).map("data: {}".format),
)


@st.composite
def event_streams(draw: st.DrawFn) -> bytes:
    lines = draw(st.lists(st.tuples(LINES, LINE_ENDS), max_size=12))
    start = draw(st.sampled_from(["", "\ufeff"]))
    return (start + "".join(line + end for line, end in lines)).encode()


@st.composite
def cut(draw: st.DrawFn, text: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def by_the_specification(text: bytes) -> list[SseEvent]:
    """The events of a whole stream, as the standard's algorithm words it, with no thought of speed or of chunks."""
    lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    events, name, data = [], "", b""
    for line in lines:
        if not line:
            if data:
                events.append(SseEvent(name, data.removesuffix(b"\n")))
            name, data = "", b""
            continue
        field, colon, value = line.partition(b":")
        value = value.removeprefix(b" ") if colon else b""
        if field == b"data":
            data += value + b"\n"
        elif field == b"event":
            name = value.decode()
    return events


@given(st.data())
def test_any_cut_of_an_event_stream_gives_the_events_of_the_specification(data: st.DataObject) -> None:
    text = data.draw(event_streams())
    parser = SseParser()
    found = [event for chunk in data.draw(cut(text)) for event in parser.feed(chunk)]
    assert found == by_the_specification(text)


@given(event_streams())
@example(b"data: \xf0\x9f\xa6\x8a\r\n\r\n")
def test_an_event_stream_may_come_byte_by_byte(text: bytes) -> None:
    parser = SseParser()
    found = [event for i in range(len(text)) for event in parser.feed(text[i : i + 1])]
    assert found == by_the_specification(text)


@given(st.data())
def test_any_cut_of_lines_gives_the_same_lines(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
    text = "\n".join(texts).encode()
    parser = LineParser()
    found = [line for chunk in data.draw(cut(text)) for line in parser.feed(chunk)]
    found += [last] if (last := parser.last()) else []
    assert found == [line.strip() for line in text.split(b"\n") if line.strip()]


async def chunks(*data: bytes) -> AsyncIterator[bytes]:
    for chunk in data:
        yield chunk


async def test_half_an_event_at_the_end_is_no_event_and_half_a_line_is_a_line() -> None:
    assert [event.data async for event in sse.events(chunks(b"data: 1\n\nda", b"ta: 2\n"))] == [b"1"]
    assert [line async for line in ndjson.lines(chunks(b'{"a":1}\n{"b"', b":2}"))] == [b'{"a":1}', b'{"b":2}']


@pytest.mark.parametrize("chunk", [b"x" * 2**20, b"data: x\n" * 2**17])
def test_an_endless_event_is_an_error_and_not_endless_memory(chunk: bytes) -> None:
    parser = SseParser()
    parser.feed(b"data: ")
    with pytest.raises(ProviderError, match="an event larger than"):
        for _ in range(200):
            parser.feed(chunk)


def test_an_endless_line_is_an_error_and_comments_without_end_are_not() -> None:
    lines, events = LineParser(), SseParser()
    with pytest.raises(ProviderError, match="a line larger than"):
        for _ in range(20):
            lines.feed(b"x" * 2**20)
    for _ in range(40):
        assert events.feed(b": still working\n" * 2**15) == []
