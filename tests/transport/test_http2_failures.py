"""What goes wrong over HTTP/2 is told in the words that HTTP/1.1 has for it, and harms nobody else."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable

import pytest
from certificates import served, trusting
from h2.errors import ErrorCodes
from http2_server import StreamWire, http2_server
from hyperframe.frame import DataFrame, GoAwayFrame, PingFrame
from hypothesis import given
from hypothesis import strategies as st
from raw_server import PATIENCE, Asked, Wire, raw_server

from autobot_llm.errors import LLMError, ProviderError, ProviderUnavailable
from autobot_llm.transport.exchange import BrokenConnection, Common, Request
from autobot_llm.transport.goaway import GoAway, GoAwayCutter
from autobot_llm.transport.http2 import Connection
from autobot_llm.transport.pool import HttpPool, PoolLimits, Timeouts

LARGE = {f"x-{number}": "y" * 2000 for number in range(150)}


# What a server does, over HTTP/1.1 and over HTTP/2


async def drop_before_1(wire: Wire, asked: Asked) -> None:
    wire.close()
    raise ConnectionError


async def drop_before_2(stream: StreamWire, asked: Asked) -> None:
    stream.peer.transport.close()


async def drop_within_1(wire: Wire, asked: Asked) -> None:
    await wire.begin_stream()
    await wire.piece(b"half")
    await asyncio.sleep(0.01)
    wire.close()
    raise ConnectionError


async def drop_within_2(stream: StreamWire, asked: Asked) -> None:
    stream.head()
    await stream.piece(b"half")
    await asyncio.sleep(0.01)
    stream.peer.transport.close()


async def large_head_1(wire: Wire, asked: Asked) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in LARGE.items())
    await wire.send(f"HTTP/1.1 200 OK\r\n{lines}".encode())
    await wire.until_gone()


async def large_head_2(stream: StreamWire, asked: Asked) -> None:
    stream.head(**LARGE)
    await stream.until_gone()


async def late_1(wire: Wire, asked: Asked) -> None:
    await wire.until_gone()


async def late_2(stream: StreamWire, asked: Asked) -> None:
    await stream.until_gone()


async def silent_1(wire: Wire, asked: Asked) -> None:
    await wire.begin_stream()
    await wire.piece(b"half")
    await wire.until_gone()


async def silent_2(stream: StreamWire, asked: Asked) -> None:
    stream.head()
    await stream.piece(b"half")
    await stream.until_gone()


async def refused_1(wire: Wire, asked: Asked) -> None:
    await wire.reply(b'{"error": {"message": "no such thing"}}', status=400)


async def refused_2(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(b'{"error": {"message": "no such thing"}}', status=400)


async def moved_1(wire: Wire, asked: Asked) -> None:
    await wire.reply(b"", status=302, location="https://evil/")


async def moved_2(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(b"", status=302, location="https://evil/")


async def large_1(wire: Wire, asked: Asked) -> None:
    await wire.begin_stream()
    for _ in range(100):
        await wire.piece(bytes(65536))
    await wire.end_stream()


async def large_2(stream: StreamWire, asked: Asked) -> None:
    stream.head()
    for _ in range(100):
        await stream.piece(bytes(65536))
    await stream.piece(b"", end=True)


async def coded_1(wire: Wire, asked: Asked) -> None:
    await wire.reply(b"ok", content_encoding="br")


async def coded_2(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(b"ok", content_encoding="br")


async def bomb_1(wire: Wire, asked: Asked) -> None:
    await wire.reply(gzip.compress(bytes(2**23)), content_encoding="gzip")


async def bomb_2(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(gzip.compress(bytes(2**23)), content_encoding="gzip")


async def error_of(url: str) -> tuple[type[LLMError], str, object, object]:
    pool = HttpPool(url, name="test", tls=trusting(), limits=PoolLimits(max_stream_bytes=2**21))
    try:
        with pytest.raises(LLMError) as caught:
            async with pool.stream("POST", "/", body=b"x", timeouts=Timeouts(first_token=1.0, read=0.1)) as answer:
                _ = [chunk async for chunk in answer.chunks()]
    finally:
        async with asyncio.timeout(PATIENCE):
            await pool.close()
    error = caught.value
    return type(error), error.message, getattr(error, "may_have_begun", None), error.code


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (drop_before_1, drop_before_2),
        (drop_within_1, drop_within_2),
        (large_head_1, large_head_2),
        (late_1, late_2),
        (silent_1, silent_2),
        (refused_1, refused_2),
        (moved_1, moved_2),
        (large_1, large_2),
        (coded_1, coded_2),
        (bomb_1, bomb_2),
    ],
)
async def test_the_same_failure_is_the_same_error_in_both_versions(
    first: Callable[[Wire, Asked], Awaitable[None]], second: Callable[[StreamWire, Asked], Awaitable[None]]
) -> None:
    async with raw_server(first, tls=served("http/1.1")) as one:
        old = await error_of(one.url)
    async with http2_server(second) as two:
        new = await error_of(two.url)
        assert two.protocols == ["h2"]
    assert new == old


@pytest.mark.parametrize("code", [ErrorCodes.INTERNAL_ERROR, ErrorCodes.ENHANCE_YOUR_CALM, ErrorCodes.CANCEL])
@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_stream_that_the_server_gives_up_harms_no_other(code: ErrorCodes, has_begun: bool) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        stream.head()
        if asked.path == "/given-up":
            if has_begun:
                await stream.piece(b"half")
                await asyncio.sleep(0.01)
            stream.reset(code)
            return
        for _ in range(20):
            await stream.piece(b"x")
            await asyncio.sleep(0.002)
        await stream.piece(b"", end=True)

    async with http2_server(play) as server:
        pool = HttpPool(server.url, name="test", tls=trusting())
        other = asyncio.create_task(pool.request("GET", "/"))
        await server.until(lambda seen: len(seen.asked) == 1)
        with pytest.raises(ProviderError, match=f"the server gave it up: {code.name}"):
            await pool.request("GET", "/given-up")
        assert (await other).body == b"x" * 20
        assert server.num_accepted == 1
        await pool.close()


async def test_an_announced_error_is_passed_on_in_the_words_of_the_server() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        stream.peer.go_away(1, ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
        stream.peer.transport.close()

    async with http2_server(play) as server:
        pool = HttpPool(server.url, name="test", tls=trusting())
        with pytest.raises(ProviderUnavailable, match=r"closed by the server \(ENHANCE_YOUR_CALM: too_many_pings\)"):
            await pool.request("GET", "/")
        await pool.close()


@pytest.mark.parametrize(
    "words",
    [b"HTTP/1.1 200 OK\r\n\r\n", b"\xff" * 100, b"\x00\x00\x01\x00\x00\x00\x00\x00\x07x", b"\xff\xff\xff" + bytes(100)],
)
async def test_what_is_no_http2_ends_the_connection_and_nothing_else(words: bytes) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/bad":
            stream.peer.transport.write(words)
            await stream.until_gone()
        else:
            await stream.reply(b"ok")

    async with http2_server(play) as server:
        pool = HttpPool(server.url, name="test", tls=trusting())
        with pytest.raises(ProviderUnavailable, match="no answer: no valid HTTP"):
            await pool.request("GET", "/bad", timeout=2)
        await server.until(lambda seen: seen.num_open == 0)
        assert (await pool.request("GET", "/fine")).body == b"ok"
        await pool.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_a_server_that_is_silent_is_asked_whether_it_is_there(answers: bool) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if not answers:
            stream.peer.transport.pause_reading()
        await asyncio.sleep(0.3)
        stream.peer.transport.resume_reading()
        if answers:
            await stream.reply(b"late")
        else:
            await stream.until_gone()

    async with http2_server(play) as server:
        lost = asyncio.Event()
        made: list[Connection] = []

        def connection() -> Connection:
            made.append(Connection(lambda one: None, lambda one: lost.set(), ping_seconds=0.05, ping_patience=0.05))
            return made[-1]

        host, port = server.url.removeprefix("https://").split(":")
        tls = trusting()
        tls.set_alpn_protocols(["h2"])
        await asyncio.get_running_loop().create_connection(connection, host, int(port), ssl=tls)
        stream = made[0].open()
        stream.send(Request("GET", "/", Common({"host": host}, b""), None, b"", None), 5.0)
        if answers:
            await stream.head()
            assert await stream.read() == b"late"
        else:
            with pytest.raises(BrokenConnection, match="no sign of the server") as caught:
                await stream.head()
            assert caught.value.is_stale
        stream.leave()
        made[0].close()
        async with asyncio.timeout(PATIENCE):
            await lost.wait()


_FRAMES = st.lists(
    st.one_of(
        st.binary(max_size=40).map(lambda data: DataFrame(1, data).serialize()),
        st.just(PingFrame(0, b"12345678").serialize()),
        st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 13), st.binary(max_size=20)),
    ),
    max_size=8,
)


@given(frames=_FRAMES, cuts=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_announced_ends_are_found_wherever_the_bytes_are_cut(
    frames: list[bytes | tuple[int, int, bytes]], cuts: list[int]
) -> None:
    sent, others, expected = b"", b"", []
    for frame in frames:
        if isinstance(frame, bytes):
            sent += frame
            others += frame
        else:
            goaway = GoAwayFrame(0)
            goaway.last_stream_id, goaway.error_code, goaway.additional_data = frame
            sent += goaway.serialize()
            expected.append(GoAway(frame[0], frame[1], frame[2].decode("utf-8", "replace")))
    cutter, passed, found = GoAwayCutter(), b"", []
    place = 0
    while place < len(sent):
        size = cuts[place % len(cuts)]
        more, goaways = cutter.feed(sent[place : place + size])
        passed += more
        found += goaways
        place += size
    assert (passed, found) == (others, expected)
