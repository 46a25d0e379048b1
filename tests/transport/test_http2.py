"""Over HTTP/2 the pool keeps the promises that it keeps over HTTP/1.1, and requests share a connection."""

from __future__ import annotations

import asyncio

import pytest
from certificates import served, trusting
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from http2_server import SECRET, StreamWire, http2_server, pool_of
from raw_server import PATIENCE, Asked, Wire, raw_server

from autobot_llm.errors import ProviderError, ProviderUnavailable
from autobot_llm.transport.network import Network
from autobot_llm.transport.pool import HttpPool


async def echo(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(f"{asked.method} {asked.path} ".encode() + asked.body)


async def endless(stream: StreamWire, asked: Asked) -> None:
    stream.head()
    while True:
        await stream.piece(b"data: more\n\n")
        await asyncio.sleep(0.001)


async def test_requests_share_one_connection_whose_version_the_server_confirms() -> None:
    go_on = asyncio.Event()

    async def play(stream: StreamWire, asked: Asked) -> None:
        await go_on.wait()
        await echo(stream, asked)

    async with http2_server(play) as server:
        pool = pool_of(server, "/v1/?api-version=7")
        asking = [
            asyncio.create_task(pool.request("POST", f"/{n}", body=b"hi", headers={"X-Other": "1"})) for n in range(50)
        ]
        await server.until(lambda seen: seen.num_running == 50)
        assert pool.metrics()["num_connections"] == 1
        go_on.set()
        answers = await asyncio.gather(*asking)
        assert [answer.body for answer in answers] == [f"POST /v1/{n}?api-version=7 hi".encode() for n in range(50)]
        assert (server.protocols, pool.metrics()["num_idle_connections"]) == (["h2"], 1)
        await pool.close()
        await server.until(lambda seen: seen.num_open == 0)
    headers = server.asked[0].headers
    assert headers[":authority"] == server.url.removeprefix("https://")
    assert (headers["authorization"], headers["x-other"], headers["content-length"]) == (f"Bearer {SECRET}", "1", "2")
    assert {"host", "connection", "transfer-encoding"}.isdisjoint(headers)


@pytest.mark.parametrize(("version", "expected"), [("auto", "h2"), ("1.1", "http/1.1"), ("2", "h2")])
async def test_the_setting_decides_what_is_offered(version: str, expected: str) -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(b"old")

    network = Network(http_version=version)  # type: ignore[arg-type]
    async with http2_server(echo, protocols=("h2", "http/1.1")) as server:
        pool = pool_of(server, network=network)
        assert (await pool.request("GET", "/")).body == (b"GET / " if expected == "h2" else b"old")
        assert server.protocols == [expected]
        await pool.close()
    async with raw_server(play, tls=served("http/1.1")) as old:
        pool = HttpPool(old.url, name="test", network=network, tls=trusting())
        if version == "2":
            with pytest.raises(ProviderError, match=r"does not speak HTTP/2 at 127.*_HTTP_VERSION=2|ALERT"):
                await pool.request("GET", "/")
        else:
            answers = await asyncio.gather(*(pool.request("GET", "/") for _ in range(5)))
            assert {answer.body for answer in answers} == {b"old"}
        await pool.close()
        await old.until(lambda seen: seen.num_open == 0)


@pytest.mark.parametrize(("max_connections", "num_connections"), [(1, 1), (3, 3)])
async def test_no_more_streams_than_the_server_takes_and_no_more_connections_than_allowed(
    max_connections: int, num_connections: int
) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        await asyncio.sleep(0.02)
        await stream.reply(b"ok")

    async with http2_server(play, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 3}) as server:
        pool = pool_of(server, max_connections=max_connections)
        await pool.request("GET", "/first")  # the server has said its limit
        asking = [asyncio.create_task(pool.request("GET", "/")) for _ in range(30)]
        await server.until(lambda seen: seen.num_running == 3 * num_connections)
        asking.pop().cancel()  # one that waits for its turn
        assert [answer.body for answer in await asyncio.gather(*asking)] == [b"ok"] * 29
        assert (server.most_running, server.num_accepted) == (3 * num_connections, num_connections)
        await pool.close()
        await server.until(lambda seen: seen.num_open == 0)


async def test_idle_connections_above_the_limit_are_closed() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        await asyncio.sleep(0.05)
        await stream.reply(b"ok")

    async with http2_server(play, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as server:
        pool = pool_of(server, max_idle=2, surplus_seconds=0.02)
        await pool.request("GET", "/")
        await asyncio.gather(*(pool.request("GET", "/") for _ in range(6)))
        assert server.num_accepted > 2
        await server.until(lambda seen: seen.num_open == 2)
        assert pool.metrics()["num_idle_connections"] == 2
        await pool.close()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_cancelling_a_reader_resets_its_stream_and_leaves_the_connection(has_begun: bool) -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/other":
            await echo(stream, asked)
            return
        if has_begun:
            stream.head()
        await stream.until_gone()

    async with http2_server(play) as server:
        pool = pool_of(server)

        async def read() -> None:
            async with pool.stream("POST", "/") as answer:
                _ = [chunk async for chunk in answer.chunks()]

        task = asyncio.create_task(read())
        await server.until(lambda seen: len(seen.asked) == 1)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL])
        assert (await pool.request("GET", "/other")).body == b"GET /other "
        assert (server.num_accepted, server.num_open) == (1, 1)
        await pool.close()


async def test_leaving_a_stream_early_ends_it_while_others_go_on() -> None:
    async with http2_server(endless) as server:
        pool = pool_of(server)
        async with pool.stream("POST", "/") as other:
            await other.read()
            async with pool.stream("POST", "/") as answer:
                await answer.read()
            await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL])
            for _ in range(20):
                assert await other.read()
        assert server.num_accepted == 1
        await pool.close()


async def test_an_announced_end_lets_taken_requests_finish_and_repeats_the_others() -> None:
    go_on = asyncio.Event()

    async def play(stream: StreamWire, asked: Asked) -> None:
        if stream.peer is server.peers[0]:
            await go_on.wait()
        await stream.reply(b"%d" % server.peers.index(stream.peer))

    async with http2_server(play) as server:
        pool = pool_of(server)
        asking = [asyncio.create_task(pool.request("POST", f"/{n}", body=b"x")) for n in range(6)]
        await server.until(lambda seen: len(seen.asked) == 6)
        server.peers[0].go_away(2**31 - 1)  # "soon": nothing more is begun here
        await asyncio.sleep(0.02)
        assert (await pool.request("GET", "/later")).body == b"1"
        server.peers[0].go_away(5)  # streams 1, 3 and 5 were taken
        answers = [await task for task in asking[3:]]
        assert [answer.body for answer in answers] == [b"1"] * 3
        go_on.set()
        answers = [await task for task in asking[:3]]
        assert [answer.body for answer in answers] == [b"0"] * 3
        await server.until(lambda seen: seen.peers[0].is_gone)
        assert server.num_accepted == 2
        await pool.close()


async def test_a_refused_stream_is_asked_for_again_a_few_times_only() -> None:
    num_refusals = 2

    async def play(stream: StreamWire, asked: Asked) -> None:
        nonlocal num_refusals
        if num_refusals:
            num_refusals -= 1
            stream.reset(ErrorCodes.REFUSED_STREAM)
        else:
            await stream.reply(b"ok")

    async with http2_server(play) as server:
        pool = pool_of(server)
        async with pool.stream("POST", "/", body=b"x", may_repeat=False) as answer:
            assert await answer.body(10) == b"ok"
        assert (len(server.asked), server.num_accepted) == (3, 1)
        num_refusals = 1000
        with pytest.raises(
            ProviderUnavailable, match="gave no answer: the server gave it up: REFUSED_STREAM"
        ) as caught:
            await pool.request("POST", "/", body=b"x")
        assert not caught.value.may_have_begun
        assert len(server.asked) == 3 + 4
        await pool.close()


async def test_a_server_that_wants_the_older_version_gets_it() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        stream.reset(ErrorCodes.HTTP_1_1_REQUIRED)

    async with http2_server(play, protocols=("h2", "http/1.1")) as server:
        pool = pool_of(server)
        assert (await pool.request("GET", "/")).body == b"old"
        assert server.protocols == ["h2", "http/1.1"]
        await pool.close()


async def test_pings_are_answered_and_settings_may_change_at_any_time() -> None:
    go_on = asyncio.Event()

    async def play(stream: StreamWire, asked: Asked) -> None:
        await go_on.wait()
        await stream.reply(b"ok")

    async with http2_server(play, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 2}) as server:
        pool = pool_of(server, max_connections=1)
        go_on.set()
        await pool.request("GET", "/first")  # the server has said its limit
        go_on.clear()
        asking = [asyncio.create_task(pool.request("GET", "/")) for _ in range(6)]
        await server.until(lambda seen: seen.num_running == 2)
        peer = server.peers[0]
        peer.h2.ping(b"are you?")
        peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 100, SettingCodes.HEADER_TABLE_SIZE: 0})
        peer.flush()
        await server.until(lambda seen: seen.num_running == 6 and peer.num_pings_answered == 1)
        go_on.set()
        assert [answer.body for answer in await asyncio.gather(*asking)] == [b"ok"] * 6
        await pool.close()


async def test_a_request_that_meets_a_connection_just_lost_is_sent_again_once() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/lost" and stream.peer is server.peers[0]:
            stream.peer.transport.abort()
        else:
            await stream.reply(b"ok")

    async with http2_server(play) as server:
        pool = pool_of(server)
        await pool.request("GET", "/first")
        answers = await asyncio.gather(*(pool.request("POST", "/lost", body=b"x") for _ in range(10)))
        assert {answer.body for answer in answers} == {b"ok"}
        assert server.num_accepted == 2, "all of them share the new one"
        await pool.close()
    async with http2_server(play) as server:
        pool = pool_of(server)
        await pool.request("GET", "/first")
        with pytest.raises(ProviderUnavailable, match="gave no answer: the connection was lost"):
            async with pool.stream("POST", "/lost", may_repeat=False):
                pass
        await pool.close()


async def test_closing_the_pool_ends_what_is_under_way_and_leaves_nothing() -> None:
    async with http2_server(endless) as server:
        pool = pool_of(server)
        async with pool.stream("POST", "/") as answer:
            await answer.read()
            waiting = asyncio.create_task(pool.request("GET", "/"))
            await asyncio.sleep(0.01)
            await pool.close()
            with pytest.raises(ProviderError, match="broke its answer off"):
                _ = [chunk async for chunk in answer.chunks()]
            with pytest.raises(ProviderError):
                await waiting
        with pytest.raises(ProviderUnavailable, match="closed"):
            await pool.request("GET", "/")
        await server.until(lambda seen: seen.num_open == 0)
        assert pool.metrics()["num_connections"] == 0


async def test_three_hundred_exchanges_with_failures_and_cancellations_leave_nothing_behind() -> None:
    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/reset":
            stream.reset(ErrorCodes.INTERNAL_ERROR)
            return
        if asked.path == "/silent":
            await stream.until_gone()
            return
        stream.head()
        for _ in range(5):
            await stream.piece(b"data: x\n\n")
        await stream.piece(b"", end=True)

    async with http2_server(play) as server:
        pool = pool_of(server)
        tasks_before = len(asyncio.all_tasks())

        async def read(path: str) -> bytes:
            async with pool.stream("POST", path, body=b"{}") as answer:
                return await answer.body(1000)

        kinds = ["/reset", "/silent", *["/fine"] * 18]
        for number in range(1, 16):
            tasks = [asyncio.create_task(read(path)) for path in kinds]
            fine = await asyncio.wait_for(asyncio.gather(*tasks[2:]), PATIENCE)
            assert fine == [b"data: x\n\n" * 5] * 18
            await server.until(lambda seen, number=number: len(seen.asked) == 20 * number)  # type: ignore[misc]
            tasks[1].cancel()
            results = await asyncio.gather(*tasks[:2], return_exceptions=True)
            assert [type(result) for result in results] == [ProviderUnavailable, asyncio.CancelledError]
        assert server.num_accepted == 1
        await server.until(lambda seen: seen.resets == [ErrorCodes.CANCEL] * 15)
        await pool.close()
        await server.until(lambda seen: seen.num_open == 0 and not seen.tasks)
    assert len(asyncio.all_tasks()) <= tasks_before
