"""Clients come, read slowly, and leave; the work behind them is given up when they do, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from server_harness import PATIENCE, QUESTION, Server, parse_reply, request_bytes, running_server, sse_events, until

from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import Metrics
from autobot_llm.providers.scripted import Script, ScriptedProvider
from autobot_llm.server.app import create_app
from autobot_llm.settings import Settings
from autobot_llm.types import LLMRequest

CHAT = "/v1/chat/completions"
STREAM = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}'
WHOLE = b'{"messages": [{"role": "user", "content": "hi"}]}'
ENDLESS = ["word "] * 100_000


@pytest.mark.parametrize(
    ("path", "body", "num_streams"),
    [
        (CHAT, STREAM, 1),
        (CHAT, WHOLE, 1),
        ("/v1/completions", b'{"prompt": ["a", "b", "c"], "stream": true}', 3),
        ("/v1/completions", b'{"prompt": ["a", "b", "c"]}', 3),
    ],
)
async def test_a_client_that_leaves_closes_its_streams_at_once(path: str, body: bytes, num_streams: int) -> None:
    async with running_server(ENDLESS, delay=0.01) as server:
        _, writer = await server.connect()
        writer.write(request_bytes("POST", path, body))
        await until(lambda: server.provider.num_open_streams == num_streams)
        writer.close()
        await until(lambda: server.provider.num_closed_streams == num_streams)
        assert server.provider.num_open_streams == 0
        page = (await server.get("/metrics")).body.decode()
    assert f'autobot_llm_requests_total{{endpoint="{path}"' in page
    assert 'status="499"} 1.0' in page


async def test_a_client_that_leaves_before_the_first_piece_closes_its_stream() -> None:
    async with running_server(["late"], delay=60) as server:
        _, writer = await server.connect()
        writer.write(request_bytes("POST", CHAT, STREAM))
        await until(lambda: server.provider.num_open_streams == 1)
        writer.close()
        await until(lambda: server.provider.num_open_streams == 0)


async def test_a_client_that_leaves_after_a_body_larger_than_the_connections_buffer_is_noticed() -> None:
    async with running_server(ENDLESS, delay=0.01) as server:
        _, writer = await server.connect()
        question = {"role": "user", "content": "why " * 200_000}
        writer.write(request_bytes("POST", CHAT, json.dumps({"messages": [question]}).encode()))
        await until(lambda: server.provider.num_open_streams == 1)
        writer.close()
        await until(lambda: server.provider.num_open_streams == 0)


async def test_any_asgi_server_can_tell_that_the_client_has_left() -> None:
    provider = ScriptedProvider(ENDLESS, name="native", delay=0.01)
    settings = Settings()
    has_left = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not provider.requests:
            return {"type": "http.request", "body": STREAM, "more_body": False}
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with LLMInterface(settings, providers={"native": provider}) as llm:
        app = create_app(llm, settings, Metrics())
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        answering = asyncio.create_task(app(scope, receive, send))
        await until(lambda: len(sent) > 2)
        has_left.set()
        await asyncio.wait_for(answering, PATIENCE)
    assert provider.num_open_streams == 0
    assert sent[-1]["more_body"], "nobody is told the end of a stream that was given up"


async def test_a_client_that_resets_in_the_middle_of_its_body_costs_nothing() -> None:
    async with running_server() as server:
        _, writer = await server.connect()
        writer.write(request_bytes("POST", CHAT, WHOLE)[:-10])
        await asyncio.sleep(0.02)
        writer.transport.abort()
        assert (await server.post(CHAT, {"messages": QUESTION})).status == 200
    assert len(server.provider.requests) == 1


@pytest.mark.parametrize("body", [STREAM, WHOLE])
async def test_a_client_that_pipelines_a_second_request_and_leaves_closes_the_first(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(ENDLESS, delay=0.01) as server:
        _, writer = await server.connect()
        writer.write(request_bytes("POST", CHAT, body))
        await until(lambda: server.provider.num_open_streams == 1)
        writer.write(request_bytes("POST", CHAT, body))
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await until(lambda: server.provider.num_open_streams == 0)
    assert caplog.records == []


async def test_pipelined_requests_are_answered_one_after_the_other() -> None:
    async with running_server() as server:
        reader, writer = await server.connect()
        last = request_bytes("GET", "/health", b"", {"connection": "close"})
        writer.write(request_bytes("POST", CHAT, WHOLE) + last)
        data = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
    first, second = data.split(b"HTTP/1.1 ")[1:]
    assert b'"content":"The answer."' in first
    assert b'"status":"ready"' in second


async def test_a_connection_is_used_again_after_a_stream_and_after_an_error() -> None:
    async with running_server() as server:
        reader, writer = await server.connect()
        for body, ending in ((STREAM, b"0\r\n\r\n"), (b"{}", b"}"), (STREAM, b"0\r\n\r\n")):
            writer.write(request_bytes("POST", CHAT, body))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            length = parse_reply(head.replace(b"chunked", b"")).headers.get("content-length")
            rest = await (reader.readexactly(int(length)) if length else reader.readuntil(b"0\r\n\r\n"))
            assert rest.endswith(ending)
        writer.close()


async def test_a_reader_that_does_not_read_holds_back_only_itself() -> None:
    def script(request: LLMRequest) -> Script:
        return ["x" * 65_536] * 2_000 if request.n == 1 and request.max_tokens == 1 else ["quick"]

    flood = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 1}'
    async with running_server(script) as server:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stuck, ("127.0.0.1", server.port))
        await loop.sock_sendall(stuck, request_bytes("POST", CHAT, flood))
        await until(lambda: server.provider.num_open_streams == 1)
        for _ in range(5):
            assert (await server.post(CHAT, {"messages": QUESTION})).status == 200
        assert server.provider.num_open_streams == 1, "131 MB were not gathered in memory for it"
        stuck.close()
        await until(lambda: server.provider.num_open_streams == 0)


async def test_two_hundred_streams_at_once_each_get_their_own_answer() -> None:
    def script(request: LLMRequest) -> Script:
        assert request.messages is not None
        return [f"{request.messages[0].content}:{position} " for position in range(10)]

    async with running_server(script, delay=0.01) as server:
        replies = await asyncio.gather(*(ask(server, f"client {number}") for number in range(200)))
    for number, text in enumerate(replies):
        assert text == "".join(f"client {number}:{position} " for position in range(10))
    assert (server.provider.num_open_streams, server.provider.num_closed_streams) == (0, 200)


async def ask(server: Server, question: str) -> str:
    body = {"messages": [{"role": "user", "content": question}], "stream": True}
    *chunks, done = sse_events((await server.post(CHAT, body)).body)
    assert done == "[DONE]"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def test_no_task_is_left_behind() -> None:
    async with running_server(ENDLESS, delay=0.001) as server:
        before = asyncio.all_tasks()
        writers = [(await server.connect())[1] for _ in range(20)]
        for writer in writers:
            writer.write(request_bytes("POST", CHAT, STREAM))
        await until(lambda: server.provider.num_open_streams == 20)
        for writer in writers:
            writer.transport.abort()
        await until(lambda: server.provider.num_closed_streams == 20)
        await until(lambda: asyncio.all_tasks() <= before)
