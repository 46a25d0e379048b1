"""A body from disk goes over HTTP/2 as it does over HTTP/1.1, and whatever ends it leaves the connection to others."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import served, trusting
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from http2_server import StreamWire, http2_server, pool_of
from raw_server import Asked, Wire, raw_server

from autobot_llm.errors import InvalidRequestError, ProviderTimeout, ProviderUnavailable
from autobot_llm.transport.pool import HttpPool, Timeouts
from autobot_llm.transport.upload import PIECE_BYTES, FileBody

MEBIBYTE = 2**20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(MEBIBYTE) * 20)
    return path


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def digest_of_file(path: Path) -> bytes:
    return digest_of(path.read_bytes())


async def tell_digest(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(digest_of(asked.body))


def keep_waiting(stream: StreamWire, data: bytes, let_on: Callable[[], None]) -> None:
    stream.body += data


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 5, 3 * PIECE_BYTES])
async def test_what_arrives_is_the_same_in_both_versions(tmp_path: Path, num_bytes: int) -> None:
    async def tell(wire: Wire, asked: Asked) -> None:
        await wire.reply(digest_of(asked.body))

    path = tmp_path / "f"
    path.write_bytes(os.urandom(num_bytes))
    for body in (FileBody(path, b"<a>", b"</a>"), FileBody(path)):
        whole = body.before + path.read_bytes() + body.after
        async with http2_server(tell_digest) as new, raw_server(tell, tls=served("http/1.1")) as old:
            for server in (new, old):
                pool = HttpPool(server.url, name="test", tls=trusting())
                for _ in range(2):  # the body can be read again, and the connection is kept
                    assert (await pool.request("POST", "/", body=body)).body == digest_of(whole)
                await pool.close()
                assert server.asked[1].headers["content-length"] == str(len(whole))
                assert server.num_accepted == 1
            assert new.resets == []


async def test_a_slow_server_is_waited_for_with_little_in_memory_and_others_go_on_beside(large: Path) -> None:
    digest, num_taken = hashlib.sha256(), 0
    loop = asyncio.get_running_loop()

    def take(stream: StreamWire, data: bytes, let_on: Callable[[], None]) -> None:
        nonlocal num_taken
        num_taken += len(data)
        digest.update(data)
        loop.call_later(0.002, let_on)

    async def play(stream: StreamWire, asked: Asked) -> None:
        await stream.reply(b"ok")

    async with http2_server(play, take=take) as server:
        pool = pool_of(server)
        tracemalloc.start()
        try:
            uploading = asyncio.create_task(pool.request("POST", "/", body=FileBody(large)))
            await server.until(lambda seen: num_taken > MEBIBYTE)
            assert (await pool.request("GET", "/other")).body == b"ok"
            assert num_taken < 20 * MEBIBYTE, "it was answered beside the upload"
            assert (await uploading).body == b"ok"
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert num_taken == 20 * MEBIBYTE
        assert digest.hexdigest().encode() == digest_of_file(large)
        assert peak < 6 * MEBIBYTE
        assert server.num_accepted == 1
        await pool.close()


async def test_a_slow_server_is_not_a_silent_one(large: Path) -> None:
    """Each window that opens counts: the upload takes much longer than the silence that is allowed."""
    loop = asyncio.get_running_loop()
    num_taken = 0

    def take(stream: StreamWire, data: bytes, let_on: Callable[[], None]) -> None:
        nonlocal num_taken
        num_taken += len(data)
        loop.call_later(0.1 if num_taken < 6 * 65536 else 0.0, let_on)

    async def play(stream: StreamWire, asked: Asked) -> None:
        await stream.reply(b"ok")

    async with http2_server(play, take=take) as server:
        pool = pool_of(server)
        begun = loop.time()
        async with pool.stream("POST", "/", body=FileBody(large), timeouts=Timeouts(first_token=0.3)) as answer:
            assert await answer.body(10) == b"ok"
        assert loop.time() - begun > 0.45
        await pool.close()


async def test_a_server_that_answers_early_is_heard_and_the_connection_serves_on(large: Path) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/other":
            await stream.reply(b"ok")
            return
        await stream.reply(b'{"error": {"message": "too much"}}', status=200 if asked.path == "/fine" else 400)
        if asked.path == "/polite":
            stream.reset(ErrorCodes.NO_ERROR)

    async with http2_server(play, is_eager=True, take=keep_waiting) as server:
        pool = pool_of(server)
        for num_resets, path in enumerate(("/polite", "/half-closed")):
            with pytest.raises(InvalidRequestError, match="too much"):
                await pool.request("POST", path, body=FileBody(large))
            assert (await pool.request("GET", "/other")).body == b"ok"
            assert server.resets == [ErrorCodes.CANCEL] * num_resets, "only where the server still waits"
        assert b"too much" in (await pool.request("POST", "/fine", body=FileBody(large))).body
        await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL] * 2)
        assert (await pool.request("GET", "/other")).body == b"ok"
        assert server.num_accepted == 1
        await pool.close()


async def test_a_cancelled_upload_is_reset_and_the_connection_serves_on(large: Path) -> None:
    streams: list[StreamWire] = []

    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/other":
            await stream.reply(b"ok")
            return
        streams.append(stream)
        await stream.until_gone()

    async with http2_server(play, is_eager=True, take=keep_waiting) as server:
        pool = pool_of(server)
        uploading = asyncio.create_task(pool.request("POST", "/", body=FileBody(large)))
        await server.until(lambda seen: bool(streams) and len(streams[0].body) == 65535)  # the window is full
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL])
        assert (await pool.request("GET", "/other")).body == b"ok"
        assert server.num_accepted == 1
        assert pool.metrics()["num_idle_connections"] == 1
        await pool.close()


async def test_a_server_that_takes_no_more_is_waited_for_as_long_as_allowed(large: Path) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/other":
            await stream.reply(b"ok")
        else:
            await stream.until_gone()

    async with http2_server(play, is_eager=True, take=keep_waiting) as server:
        pool = pool_of(server)
        with pytest.raises(ProviderTimeout):
            await pool.request("POST", "/", body=FileBody(large), timeout=0.3)
        await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL])
        assert (await pool.request("GET", "/other")).body == b"ok"
        assert server.num_accepted == 1
        await pool.close()


@pytest.mark.parametrize("may_repeat", [True, False])
async def test_an_upload_that_broke_off_is_sent_again_only_where_that_is_allowed(large: Path, may_repeat: bool) -> None:
    uploads: list[StreamWire] = []

    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/":
            uploads.append(stream)
            if len(uploads) == 1:
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while len(stream.body) < int(asked.headers.get("content-length", 0)):
                    await asyncio.sleep(0.002)
        await stream.reply(digest_of(stream.body))

    def take(stream: StreamWire, data: bytes, let_on: Callable[[], None]) -> None:
        stream.body += data
        if uploads[0] is stream and len(stream.body) > 2 * MEBIBYTE:
            stream.peer.transport.abort()
        else:
            let_on()

    async with http2_server(
        play, is_eager=True, take=take, settings={SettingCodes.INITIAL_WINDOW_SIZE: 2**20}
    ) as server:
        pool = pool_of(server)
        await pool.request("GET", "/other")  # so that the connection is one that was kept
        asking = pool.request("POST", "/", body=FileBody(large), may_repeat=may_repeat)
        if may_repeat:
            assert (await asking).body == digest_of_file(large)
        else:
            with pytest.raises(ProviderUnavailable, match="connection was lost") as caught:
                await asking
            assert caught.value.may_have_begun
            await asyncio.sleep(0.05)
        assert len(uploads) == 1 + may_repeat
        await pool.close()


async def test_an_upload_that_was_not_looked_at_is_sent_again_whole(large: Path) -> None:
    """The server says so itself, so nothing is done twice, whatever `may_repeat` says."""
    num_refused = 0

    async def play(stream: StreamWire, asked: Asked) -> None:
        nonlocal num_refused
        if not num_refused:
            num_refused += 1
            stream.reset(ErrorCodes.REFUSED_STREAM)
            return
        while len(stream.body) < int(asked.headers["content-length"]):
            await asyncio.sleep(0.002)
        await stream.reply(digest_of(stream.body))

    async with http2_server(play, is_eager=True) as server:
        pool = pool_of(server)
        answer = await pool.request("POST", "/", body=FileBody(large), may_repeat=False)
        assert answer.body == digest_of_file(large)
        assert len(server.asked) == 2
        await pool.close()


async def test_a_file_that_is_not_there_is_the_callers_error_and_costs_no_connection(tmp_path: Path) -> None:
    async def tell(wire: Wire, asked: Asked) -> None:
        await wire.reply(b"ok")

    async with http2_server(tell_digest) as new, raw_server(tell, tls=served("http/1.1")) as old:
        for server in (new, old):
            pool = HttpPool(server.url, name="test", tls=trusting())
            await pool.request("GET", "/")
            with pytest.raises(FileNotFoundError):
                await pool.request("POST", "/", body=FileBody(tmp_path / "gone"))
            await pool.request("GET", "/")
            assert (len(server.asked), server.num_accepted) == (2, 1)
            await pool.close()
