"""What goes over HTTP/2 comes whole, as fast as each side takes it, and no faster."""

from __future__ import annotations

import asyncio
import hashlib
import os

import psutil
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from http2_server import StreamWire, http2_server, pool_of
from raw_server import Asked

from autobot_llm.errors import OverloadedError, ProviderTimeout
from autobot_llm.transport.pool import Timeouts


async def test_a_slow_reader_holds_its_own_stream_back_and_no_other() -> None:
    sent: dict[str, StreamWire] = {}

    async def play(stream: StreamWire, asked: Asked) -> None:
        sent[asked.path] = stream
        stream.head()
        for _ in range(100):
            await stream.piece(bytes(65536))
        await stream.piece(b"", end=True)

    async with http2_server(play) as server:
        pool = pool_of(server)
        async with pool.stream("GET", "/slow", timeouts=Timeouts(read=0.2)) as slow:
            num_read = len(await slow.read())
            for _ in range(3):
                assert len((await pool.request("GET", "/fast")).body) == 100 * 65536
            assert sent["/slow"].num_sent <= 3 * 2**19, "one window, and what was read"
            await asyncio.sleep(0.3)  # the silence is the reader's own
            async for chunk in slow.chunks():
                num_read += len(chunk)
        assert num_read == 100 * 65536
        assert server.num_accepted == 1
        await pool.close()


async def test_a_large_body_goes_out_as_the_windows_open() -> None:
    body = os.urandom(10 * 2**20)

    async def play(stream: StreamWire, asked: Asked) -> None:
        await stream.reply(hashlib.sha256(asked.body).hexdigest().encode())

    async with http2_server(play, settings={SettingCodes.INITIAL_WINDOW_SIZE: 20_000}) as server:
        pool = pool_of(server)
        asking = [asyncio.create_task(pool.request("POST", "/", body=body)) for _ in range(2)]
        await server.until(lambda seen: bool(seen.peers) and seen.peers[0].num_settings_acknowledged == 2)
        server.peers[0].h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10, SettingCodes.MAX_FRAME_SIZE: 65536})
        server.peers[0].flush()
        await asyncio.sleep(0.05)
        server.peers[0].h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**20})
        server.peers[0].flush()
        small = await pool.request("POST", "/", body=b"x")
        assert small.body == hashlib.sha256(b"x").hexdigest().encode()
        for answer in await asyncio.gather(*asking):
            assert answer.body == hashlib.sha256(body).hexdigest().encode()
        assert server.num_accepted == 1
        await pool.close()


async def test_a_long_stream_takes_no_more_memory_than_a_short_one() -> None:
    num_bytes = 100 * 2**20

    async def play(stream: StreamWire, asked: Asked) -> None:
        stream.head()
        for _ in range(num_bytes // 65536):
            await stream.piece(bytes(65536))
        await stream.piece(b"", end=True)

    async with http2_server(play) as server:
        pool = pool_of(server)
        process = psutil.Process()
        num_read, before, most = 0, 0, 0
        async with pool.stream("GET", "/") as answer:
            async for chunk in answer.chunks():
                num_read += len(chunk)
                if num_read > 2**22:
                    before = before or process.memory_info().rss
                    most = max(most, process.memory_info().rss)
        assert num_read == num_bytes
        assert most - before < 16 * 2**20
        await pool.close()


async def test_what_surrounds_an_answer_is_understood() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/announced":
            stream.peer.h2.send_headers(stream.id, [(":status", "100")])
            stream.peer.h2.send_headers(stream.id, [(":status", "103"), ("link", "x")])
            await stream.reply(b"after")
        elif asked.path == "/trailers":
            stream.head(grpc_status="no")
            await stream.piece(b"body")
            stream.trailers(checksum="1")
        elif asked.path == "/empty":
            stream.head(204, end=True)
        elif asked.path == "/padded":
            stream.head()
            stream.peer.h2.send_data(stream.id, b"padded", pad_length=200)
            await stream.piece(b"", end=True)
        elif asked.path == "/twice":
            stream.peer.h2.send_headers(stream.id, [(":status", "200"), ("x-a", "1"), ("x-a", "2")], end_stream=True)
            stream.peer.flush()

    async with http2_server(play) as server:
        pool = pool_of(server)
        assert (await pool.request("GET", "/announced")).body == b"after"
        trailed = await pool.request("GET", "/trailers")
        assert (trailed.body, dict(trailed.headers)) == (b"body", {"grpc-status": "no"})
        empty = await pool.request("GET", "/empty")
        assert (empty.status, empty.body) == (204, b"")
        assert (await pool.request("GET", "/padded")).body == b"padded"
        assert (await pool.request("GET", "/twice")).headers["x-a"] == "1, 2"
        assert server.num_accepted == 1
        await pool.close()


async def test_an_answer_before_the_whole_request_ends_the_upload() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/other":
            await stream.reply(b"ok")
            return
        await stream.reply(b'{"error": "too many"}', status=429, retry_after="7")
        if asked.path == "/polite":
            stream.reset(ErrorCodes.NO_ERROR)

    async with http2_server(play, is_eager=True, settings={SettingCodes.INITIAL_WINDOW_SIZE: 1000}) as server:
        pool = pool_of(server)
        for path in ("/polite", "/half-closed"):
            with pytest.raises(OverloadedError, match="too many") as caught:
                await pool.request("POST", path, body=bytes(2**22))
            assert caught.value.retry_after == 7
        assert (await pool.request("GET", "/other")).body == b"ok"
        assert server.num_accepted == 1
        await pool.close()


async def test_time_limits_are_kept_for_each_stream_alone() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path != "/late":
            stream.head()
        if asked.path == "/silent":
            await stream.piece(b"x")
        if asked.path == "/fine":
            await stream.piece(b"x", end=True)
        await stream.until_gone()

    async with http2_server(play) as server:
        pool = pool_of(server)
        for path, timeouts, words in (
            ("/late", Timeouts(first_token=0.05), "did not begin to answer within 0.05 s"),
            ("/no-token", Timeouts(first_token=0.05), "fell silent for 0.05 s"),
            ("/silent", Timeouts(read=0.05), "fell silent for 0.05 s"),
        ):
            with pytest.raises(ProviderTimeout, match=words):
                async with pool.stream("GET", path, timeouts=timeouts) as answer:
                    _ = [chunk async for chunk in answer.chunks()]
        assert (await pool.request("GET", "/fine")).body == b"x"
        await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL] * 3)
        assert server.num_accepted == 1
        await pool.close()
