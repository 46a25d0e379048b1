"""Stopping drains: running answers go on, new ones are refused, and what does not end in time is ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

import pytest
from server_harness import PATIENCE, QUESTION, Server, parse_reply, request_bytes, running_server, sse_events, until

from autobot_llm.errors import ConfigurationError

CHAT = "/v1/chat/completions"
STREAM = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}'


async def start_stream(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a stream and return when its first piece is here."""
    reader, writer = await server.connect()
    writer.write(request_bytes("POST", CHAT, STREAM, {"connection": "close"}))
    await until(lambda: server.provider.num_open_streams >= 1)
    return reader, writer


async def stop_by(number: int, server: Server) -> None:
    os.kill(os.getpid(), number)
    await asyncio.sleep(0)  # lets the loop take note
    assert (await server.get("/health")).json["status"] == "draining"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_running_streams_finish_while_new_requests_are_refused(number: int) -> None:
    async with running_server(["one ", "two ", "three"], delay=0.2) as server:
        reader, _ = await start_stream(server)
        await stop_by(number, server)
        refused = await server.post(CHAT, {"messages": QUESTION})
        health = await server.get("/health")
        events = sse_events(parse_reply(await asyncio.wait_for(reader.read(), PATIENCE)).body)
        await asyncio.wait_for(server.task, PATIENCE)
        with pytest.raises(OSError):
            await server.connect()
    assert (refused.status, refused.json["error"]["code"]) == (503, "shutting_down")
    assert (health.status, health.json["num_running"]) == (503, 1)
    assert events[-1] == "[DONE]"
    assert len(server.provider.requests) == 1


async def test_an_idle_server_stops_at_once() -> None:
    async with running_server() as server:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(server.task, 2)
    assert server.provider.status().state == "stopped"


async def test_what_outlasts_the_grace_is_ended_with_an_error() -> None:
    async with running_server(["word "] * 1000, delay=0.02, shutdown_grace=0.2) as server:
        reader, _ = await start_stream(server)
        os.kill(os.getpid(), signal.SIGTERM)
        events = sse_events(parse_reply(await asyncio.wait_for(reader.read(), PATIENCE)).body)
        await asyncio.wait_for(server.task, PATIENCE)
    assert events[-1]["error"]["code"] == "shutting_down"
    assert server.provider.num_open_streams == 0


async def test_a_second_signal_does_not_wait() -> None:
    async with running_server(["late"], delay=60, shutdown_grace=60) as server:
        reader, _ = await start_stream(server)
        await stop_by(signal.SIGINT, server)
        os.kill(os.getpid(), signal.SIGINT)
        reply = parse_reply(await asyncio.wait_for(reader.read(), PATIENCE))
        await asyncio.wait_for(server.task, PATIENCE)
    assert (reply.status, reply.json["error"]["code"]) == (503, "shutting_down")
    assert server.provider.num_open_streams == 0


async def test_the_signal_handlers_of_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with running_server() as server:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(server.task, 2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def test_cancelling_the_server_ends_it_and_closes_its_port() -> None:
    async with running_server(["word "] * 1000, delay=0.02) as server:
        reader, _ = await start_stream(server)
        server.task.cancel()
        await asyncio.wait_for(reader.read(), PATIENCE)
        with contextlib.suppress(asyncio.CancelledError):
            await server.task
        with pytest.raises(OSError):
            await server.connect()
    assert server.provider.num_open_streams == 0


async def test_a_port_in_use_and_an_impossible_host_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"AUTOBOT_PORT={port}.*another program"):
            async with running_server(port=port):
                pass
    with pytest.raises(ConfigurationError, match=r"AUTOBOT_HOST='no\.such\.host\.invalid'"):
        async with running_server(host="no.such.host.invalid"):
            pass


async def test_health_tells_a_failed_provider() -> None:
    async with running_server() as server:
        assert (await server.get("/health")).json["status"] == "ready"
        await server.provider.close()
        reply = await server.get("/health")
    assert (reply.status, reply.json["status"]) == (503, "stopped")
