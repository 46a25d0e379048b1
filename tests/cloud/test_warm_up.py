"""Providers that are set up are connected at the start where that is asked for; nothing waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import pytest
from raw_server import PATIENCE, Asked, Wire, raw_server

from autobot_llm.interface import LLMInterface
from autobot_llm.settings import load_settings

ANSWER = (
    b'{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, '
    b'"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}'
)


async def answer(wire: Wire, asked: Asked) -> None:
    await wire.reply(ANSWER)


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1000):
            pass
    writer.close()


async def until(condition: object) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)


async def test_every_provider_that_is_set_up_is_connected_and_a_dead_one_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    tasks_before = set(asyncio.all_tasks())
    async with raw_server(answer) as one, raw_server(answer) as two:
        settings = load_settings(
            environ={
                "AUTOBOT_LLM_PROVIDER": "cloud",
                "AUTOBOT_DEFAULT_LLM_MODEL": "one/m",
                "AUTOBOT_CLOUD_WARM_UP": "true",
                "AUTOBOT_CLOUD_ONE_ENDPOINT": one.url,
                "AUTOBOT_CLOUD_TWO_ENDPOINT": two.url,
                "AUTOBOT_CLOUD_DEAD_ENDPOINT": "http://127.0.0.1:1",
                "AUTOBOT_CLOUD_SILENT_ENDPOINT": f"https://127.0.0.1:{silent.sockets[0].getsockname()[1]}",
                "AUTOBOT_CACHE_ENABLED": "false",
            },
            env_file=None,
        )
        llm = LLMInterface(settings)
        with caplog.at_level(logging.WARNING, "autobot_llm.cloud"):
            begin = time.monotonic()
            await llm.initialize()
            await until(lambda: one.num_open == two.num_open == 1 and caplog.records)
            for name in ("one", "two"):
                assert (await llm.generate_response("hello", model=f"{name}/m")).content == "hi"
            assert time.monotonic() - begin < 5, "the silent one is still being connected to"
        (record,) = caplog.records
        assert "dead is not connected ahead of its first request" in record.message
        assert (one.num_accepted, two.num_accepted) == (1, 1), "what was connected is what is asked"
        assert llm.get_metrics()["one"]["num_connects"] == 1
        async with asyncio.timeout(PATIENCE):
            await llm.aclose()
        await until(lambda: one.num_open == two.num_open == 0)
        await until(lambda: {task for task in asyncio.all_tasks() if task not in tasks_before} == set())
    silent.close()


async def test_nothing_is_connected_unless_it_is_asked_for() -> None:
    async with raw_server(answer) as server:
        settings = load_settings(
            environ={"AUTOBOT_LLM_PROVIDER": "cloud", "AUTOBOT_CLOUD_ONE_ENDPOINT": server.url}, env_file=None
        )
        async with LLMInterface(settings):
            await asyncio.sleep(0.05)
            assert server.num_accepted == 0
