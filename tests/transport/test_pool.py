"""The pool keeps its connections, its limits and its promises, whatever the server does."""

from __future__ import annotations

import asyncio
import base64
import gzip
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from raw_server import PATIENCE, Asked, RawServer, Wire, raw_server, silent_address

from autobot_llm.errors import (
    ConfigurationError,
    LLMError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
)
from autobot_llm.transport.pool import HttpPool, PoolLimits, Timeouts

SECRET = "sk-very-secret"
BOMB = gzip.compress(gzip.compress(bytes(2**30), 9), 9)


def pool_of(server: RawServer, path: str = "", **limits: float) -> HttpPool:
    return HttpPool(
        server.url + path,
        headers={"Authorization": f"Bearer {SECRET}"},
        limits=PoolLimits(**limits),  # type: ignore[arg-type]
        name="test",
    )


async def echo(wire: Wire, asked: Asked) -> None:
    await wire.reply(f"{asked.method} {asked.path} ".encode() + asked.body)


async def endless(wire: Wire, asked: Asked) -> None:
    await wire.begin_stream()
    while True:
        await wire.piece(b"data: more\n\n")
        await asyncio.sleep(0.001)


async def test_requests_reuse_a_connection_and_carry_path_query_headers_and_body() -> None:
    async with raw_server(echo) as server:
        pool = pool_of(server, "/v1/?api-version=7")
        first = await pool.request("POST", "/chat", body=b"hi", headers={"x-other": "1"})
        second = await pool.request("GET", "/models")
        await pool.close()
        await server.until(lambda seen: seen.num_open == 0)
    assert first.body == b"POST /v1/chat?api-version=7 hi"
    assert second.body == b"GET /v1/models?api-version=7 "
    assert server.num_accepted == 1
    headers = server.asked[0].headers
    assert headers["host"] == server.url.removeprefix("http://")
    assert (headers["authorization"], headers["x-other"]) == (f"Bearer {SECRET}", "1")
    assert pool.metrics() == {
        "num_waiting_requests": 0, "num_connections": 0, "num_idle_connections": 0,
        "num_connects": 1, "num_http_requests": 2,
    }  # fmt: skip


async def test_a_stream_is_read_as_it_comes_and_its_connection_is_kept() -> None:
    go_on = asyncio.Event()

    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream(x_custom="yes")
        await wire.piece(b"one")
        await go_on.wait()
        await wire.piece(b"two")
        await wire.end_stream()

    async with raw_server(play) as server:
        pool = pool_of(server)
        for _ in range(2):
            go_on.clear()
            async with pool.stream("POST", "/", body=b"") as answer:
                assert (answer.status, answer.headers["x-custom"]) == (200, "yes")
                chunks = answer.chunks()
                assert await anext(chunks) == b"one"
                go_on.set()
                assert [chunk async for chunk in chunks] == [b"two"]
        assert (server.num_accepted, pool.metrics()["num_idle_connections"]) == (1, 1)
        await pool.close()


async def test_leaving_a_stream_early_closes_it_at_once() -> None:
    async with raw_server(endless) as server:
        pool = pool_of(server)
        async with pool.stream("POST", "/") as answer:
            await anext(answer.chunks())
        await server.until(lambda seen: seen.num_open == 0)
        await pool.close()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_cancelling_the_reader_closes_the_stream_at_once(has_begun: bool) -> None:
    async def silent(wire: Wire, asked: Asked) -> None:
        if has_begun:
            await wire.begin_stream()
        await wire.until_gone()

    async with raw_server(silent) as server:
        pool = pool_of(server)

        async def read() -> None:
            async with pool.stream("POST", "/") as answer:
                _ = [chunk async for chunk in answer.chunks()]

        task = asyncio.create_task(read())
        await server.until(lambda seen: len(seen.asked) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.until(lambda seen: seen.num_open == 0)
        assert pool.metrics()["num_connections"] == 0
        await pool.close()


async def test_a_stream_that_says_its_last_word_leaves_its_connection_for_the_next() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"data: [DONE]\n\n")
        if asked.path == "/ends":
            await asyncio.sleep(0.005)
            await wire.end_stream()
        else:
            await wire.until_gone()

    async with raw_server(play) as server:
        pool = pool_of(server)
        for path, num_idle in (("/ends", 1), ("/does-not", 0)):
            async with pool.stream("POST", path) as answer:
                await anext(answer.chunks())
                await answer.end()
            assert pool.metrics()["num_idle_connections"] == num_idle
        await server.until(lambda seen: seen.num_open == 0)
        assert server.num_accepted == 1
        await pool.close()


async def test_no_more_connections_than_the_limit_and_no_more_idle_ones() -> None:
    release = asyncio.Event()

    async def play(wire: Wire, asked: Asked) -> None:
        await release.wait()
        await wire.reply(b"ok")

    async with raw_server(play) as server:
        pool = pool_of(server, max_connections=4, max_idle=2, surplus_seconds=0.02)
        tasks = [asyncio.create_task(pool.request("GET", "/")) for _ in range(10)]
        await server.until(lambda seen: len(seen.asked) == 4)
        assert pool.metrics()["num_connections"] == 4
        tasks.pop().cancel()  # one that waits for its turn
        release.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.body for answer in answers] == [b"ok"] * 9
        assert server.num_accepted == 4
        await server.until(lambda seen: seen.num_open == 2)
        assert pool.metrics()["num_idle_connections"] == 2
        await pool.close()


async def test_a_connection_that_has_been_idle_too_long_is_not_used_again() -> None:
    async with raw_server(echo) as server:
        pool = pool_of(server, idle_seconds=0.0)
        for _ in range(2):
            await pool.request("GET", "/")
            await asyncio.sleep(0.002)
        assert server.num_accepted == 2
        await pool.close()


async def test_a_request_that_meets_a_connection_just_closed_is_sent_again_once() -> None:
    async def close_on_second_use(wire: Wire, asked: Asked) -> None:
        if asked.path == "/second" and len(server.asked) == 2:
            wire.close()
            raise ConnectionError
        await wire.reply(b"ok")

    async def never(wire: Wire, asked: Asked) -> None:
        wire.close()
        raise ConnectionError

    async with raw_server(close_on_second_use) as server:
        pool = pool_of(server)
        await pool.request("GET", "/first")
        assert (await pool.request("POST", "/second", body=b"x")).body == b"ok"
        assert [asked.path for asked in server.asked] == ["/first", "/second", "/second"]
        await pool.close()
    async with raw_server(never) as server:
        pool = pool_of(server)
        with pytest.raises(ProviderUnavailable, match="test gave no answer"):
            await pool.request("POST", "/", body=b"x")
        assert len(server.asked) == 1, "a new connection that fails is no stale one"
        await pool.close()


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with raw_server(echo) as server:
        pool = pool_of(server)
    with pytest.raises(ProviderUnavailable, match="test cannot be reached at 127.0.0.1:"):
        await pool.request("GET", "/")
    with pytest.raises(ProviderUnavailable, match="cannot be reached"):
        await HttpPool("http://nowhere.invalid", name="test").request("GET", "/")
    await pool.close()
    with pytest.raises(ProviderUnavailable, match="closed"):
        await pool.request("GET", "/")


async def test_a_server_that_hangs_up_at_once_leaves_nothing_to_wait_for() -> None:
    listener = await asyncio.start_server(lambda reader, writer: writer.transport.abort(), "127.0.0.1", 0)
    pool = HttpPool(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", name="test")
    requests = [pool.request("GET", "/") for _ in range(50)]
    answers = await asyncio.gather(*requests, return_exceptions=True)
    assert {type(answer) for answer in answers} == {ProviderUnavailable}
    async with asyncio.timeout(PATIENCE):
        await pool.close()
    assert pool.metrics()["num_connections"] == 0
    listener.close()
    await listener.wait_closed()


async def test_closing_the_pool_ends_what_is_under_way() -> None:
    async with raw_server(endless) as server:
        pool = pool_of(server)
        async with pool.stream("POST", "/") as answer:
            chunks = answer.chunks()
            await anext(chunks)
            await pool.close()
            with pytest.raises(ProviderError, match="broke its answer off"):
                _ = [chunk async for chunk in chunks]
        await server.until(lambda seen: seen.num_open == 0)


def says(data: bytes, *, then: Callable[[Wire], Awaitable[None]] | None = None) -> Callable[..., Awaitable[None]]:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.send(data)
        if then is None:
            wire.close()
            raise ConnectionError
        await then(wire)

    return play


async def reset(wire: Wire) -> None:
    await asyncio.sleep(0.01)
    wire.reset()
    raise ConnectionError


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("play", "kind", "words"),
    [
        (says(b""), ProviderUnavailable, "closed by the server"),
        (says(b"SSH-2.0-OpenSSH_9.2\r\n"), ProviderUnavailable, "no valid HTTP"),
        (says(OK + b"x: " + b"y" * 300_000), ProviderUnavailable, "head is larger"),
        (says(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n"), ProviderUnavailable, "another protocol"),
        (says(OK + b"content-length: 100\r\n\r\nhalf"), ProviderError, "broke its answer off"),
        (says(CHUNKED + b"5\r\nhello\r\n"), ProviderError, "broke its answer off"),
        (says(CHUNKED + b"5\r\nhello\r\n", then=reset), ProviderError, "broke its answer off"),
        (says(CHUNKED + b"zz\r\nhello\r\n"), ProviderError, "no valid HTTP"),
        (says(OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok"), ProviderUnavailable, "no valid HTTP"),
        (says(OK + b"content-encoding: br\r\ncontent-length: 2\r\n\r\nok"), ProviderError, "'br', which was not asked"),
        (says(OK + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\nok"), ProviderError, "not compressed as"),
        (says(b"HTTP/1.1 302 Found\r\nlocation: http://evil/\r\ncontent-length: 0\r\n\r\n"), ProviderError, "http://evil/"),
    ],
)  # fmt: skip
async def test_what_is_no_answer_is_an_error_that_names_the_provider(
    play: Callable[[Wire, Asked], Awaitable[None]], kind: type[LLMError], words: str
) -> None:
    async with raw_server(play) as server:
        pool = pool_of(server)
        with pytest.raises(kind, match="test") as caught:
            await pool.request("GET", "/")
        assert words in caught.value.message
        assert type(caught.value) is kind
        await server.until(lambda seen: seen.num_open == 0 and pool.metrics()["num_connections"] == 0)
        await pool.close()


@pytest.mark.parametrize(
    "play",
    [
        says(OK + b"\r\nto the end"),
        says(b"HTTP/1.0 200 OK\r\n\r\nto the end"),
        says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK + b"\r\nto the end"),
        says(OK + b"content-encoding: gzip\r\n\r\n" + gzip.compress(b"to the end")),
        says(OK + b"connection: close\r\ncontent-length: 10\r\n\r\nto the end"),
    ],
)
async def test_every_way_to_end_an_answer_is_understood(play: Callable[[Wire, Asked], Awaitable[None]]) -> None:
    async with raw_server(play) as server:
        pool = pool_of(server)
        assert (await pool.request("GET", "/")).body == b"to the end"
        assert pool.metrics()["num_idle_connections"] == 0
        await pool.close()


async def test_words_that_nobody_asked_for_are_no_answer_to_the_next_request() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(b"mine")
        await asyncio.sleep(0.005)
        await wire.reply(b"poison")

    async with raw_server(play) as server:
        pool = pool_of(server)
        assert (await pool.request("GET", "/")).body == b"mine"
        await server.until(lambda seen: seen.num_open == 0)
        assert (await pool.request("GET", "/")).body == b"mine"
        await pool.close()


async def test_time_limits_are_kept_for_connection_first_byte_silence_and_the_whole() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        if asked.path == "/late":
            await wire.until_gone()
        await wire.begin_stream()
        if asked.path != "/no-token":
            await wire.piece(b"x")
        if asked.path == "/drip":
            while True:
                await wire.piece(b"x")
                await asyncio.sleep(0.005)
        await wire.until_gone()

    async with raw_server(play) as server:
        pool = pool_of(server)
        for path, timeouts, words in (
            ("/late", Timeouts(first_token=0.05), "did not begin to answer within 0.05 s"),
            ("/no-token", Timeouts(first_token=0.05), "fell silent for 0.05 s"),
            ("/silent", Timeouts(read=0.05), "fell silent for 0.05 s"),
        ):
            with pytest.raises(ProviderTimeout, match=words):
                async with pool.stream("GET", path, timeouts=timeouts) as answer:
                    _ = [chunk async for chunk in answer.chunks()]
        with pytest.raises(ProviderTimeout, match=r"did not answer within 0.05 s"):
            await pool.request("GET", "/drip", timeout=0.05)
        await server.until(lambda seen: seen.num_open == 0)
        await pool.close()


async def test_a_server_that_cannot_be_connected_to_in_time_is_unavailable() -> None:
    with silent_address() as (_, port):
        pool = HttpPool(f"http://127.0.0.1:{port}", name="test")
        with pytest.raises(ProviderUnavailable, match=r"could not be reached at 127.0.0.1:\d+ within 0.1 s"):
            async with pool.stream("GET", "/", timeouts=Timeouts(connect=0.1)):
                pass
        await pool.close()


async def test_large_answers_and_bombs_are_cut_off() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        if asked.path == "/bomb":
            await wire.reply(gzip.decompress(BOMB), content_encoding="gzip")
        else:
            await wire.begin_stream()
            for _ in range(1600):
                await wire.piece(bytes(65536))
            await wire.end_stream()

    async with raw_server(play) as server:
        pool = pool_of(server, max_body_bytes=2**20, max_stream_bytes=2**22)
        for path in ("/bomb", "/large"):
            with pytest.raises(ProviderError, match="more than 1048576 bytes"):
                await pool.request("GET", path)
            with pytest.raises(ProviderError, match="more than 4194304 bytes"):
                async with pool.stream("GET", path) as answer:
                    async for chunk in answer.chunks():
                        assert len(chunk) <= 2**19
        await server.until(lambda seen: seen.num_open == 0)
        await pool.close()


async def test_a_slow_reader_holds_the_server_back() -> None:
    num_sent = 0

    async def play(wire: Wire, asked: Asked) -> None:
        nonlocal num_sent
        await wire.begin_stream()
        for _ in range(400):
            await wire.piece(bytes(65536))
            num_sent += 65536
        await wire.end_stream()

    async with raw_server(play) as server:
        pool = pool_of(server)
        async with pool.stream("GET", "/") as answer:
            chunks = answer.chunks()
            num_read = len(await anext(chunks))
            await asyncio.sleep(0.1)
            assert num_sent < 15 * 2**20, "socket buffers and ours, not the whole answer"
            async for chunk in chunks:
                num_read += len(chunk)
        assert num_read == 400 * 65536
        assert pool.metrics()["num_idle_connections"] == 1
        await pool.close()


async def test_an_api_key_that_the_provider_repeats_is_not_passed_on() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        body = b'{"error": {"message": "Incorrect API key: ' + SECRET.encode() + b'"}}'
        await wire.reply(body, status=401)

    async with raw_server(play) as server:
        pool = pool_of(server)
        with pytest.raises(ProviderError, match="Incorrect API key") as caught:
            await pool.request("GET", "/")
        assert SECRET not in caught.value.message + repr(caught.value) + repr(pool)
        assert (await _status_of(pool)) == 502
        assert server.num_accepted == 1, "a refusal is an answer like others, its connection is kept"
        await pool.close()


async def _status_of(pool: HttpPool) -> int:
    with pytest.raises(ProviderError) as caught:
        await pool.request("GET", "/")
    return caught.value.status


async def test_a_header_or_path_cannot_smuggle_a_second_request() -> None:
    async with raw_server(echo) as server:
        pool = pool_of(server)
        with pytest.raises(ConfigurationError, match="line end"):
            await pool.request("GET", "/", headers={"x": "1\r\n\r\nGET /evil HTTP/1.1"})
        with pytest.raises(ProviderError, match="cannot be asked for"):
            await pool.request("GET", "/models/a b\r\n")
        assert server.asked == []


async def test_an_address_may_carry_a_user_and_a_password_and_no_error_repeats_them() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(b'{"error": "no entry for ann with p@ss"}', status=403)

    async with raw_server(play) as server:
        url = server.url.replace("http://", "http://ann:p%40ss@")
        pool = HttpPool(url, name="test")
        with pytest.raises(ProviderError, match="no entry for ann") as caught:
            await pool.request("GET", "/")
        await pool.close()
    assert "p@ss" not in caught.value.message
    headers = server.asked[0].headers
    assert headers["host"] == server.url.removeprefix("http://")
    assert base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"ann:p@ss"
    for wrong in ("ftp://ann:secret@x", "http://ann:secret@x:port", "http://"):
        with pytest.raises(ConfigurationError, match="the address is not") as refused:
            HttpPool(wrong, name="test")
        assert "secret" not in refused.value.message


async def test_tls_is_verified_and_spoken(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(  # noqa: ASYNC221
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(certificate, key)
    async with raw_server(echo, tls=served) as server:
        with pytest.raises(ProviderUnavailable, match="certificate verify failed"):
            await HttpPool(server.url, name="test").request("GET", "/")
        pool = HttpPool(server.url, name="test", tls=ssl.create_default_context(cafile=certificate))
        for _ in range(2):
            assert (await pool.request("GET", "/x")).body == b"GET /x "
        assert pool.metrics()["num_connects"] == 1
        await pool.close()


async def test_three_hundred_exchanges_with_failures_and_cancellations_leave_nothing_behind() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        if asked.path == "/reset":
            wire.reset()
            raise ConnectionError
        if asked.path == "/silent":
            await wire.until_gone()
        await wire.begin_stream()
        for _ in range(5):
            await wire.piece(b"data: x\n\n")
        await wire.end_stream()

    async with raw_server(play) as server:
        pool = pool_of(server)
        tasks_before = len(asyncio.all_tasks())

        async def read(path: str) -> bytes:
            async with pool.stream("POST", path, body=b"{}") as answer:
                return await answer.body(1000)

        kinds = ["/reset", "/silent", *["/fine"] * 18]
        for _ in range(15):
            tasks = {asyncio.create_task(read(path)): path for path in kinds}
            done, pending = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
            while any(tasks[task] != "/silent" for task in pending):
                more, pending = await asyncio.wait(pending, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            for task in pending:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(result == b"data: x\n\n" * 5 for result in results) == 18
            assert sum(isinstance(result, ProviderUnavailable) for result in results) == 1
        assert pool.metrics()["num_connections"] <= 20
        await pool.close()
        await server.until(lambda seen: seen.num_open == 0)
    assert len(asyncio.all_tasks()) <= tasks_before
