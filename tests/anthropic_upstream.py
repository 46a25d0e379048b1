"""A server that answers as Anthropic does, and refuses what its reference forbids. For tests of several folders."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from anthropic_reference import Violation, check_count, check_headers, check_messages
from raw_server import Asked, RawServer, Wire, raw_server

from autobot_llm.providers.anthropic import AnthropicProvider
from autobot_llm.settings import Settings
from autobot_llm.types import ChatMessage, LLMRequest

KEY = "sk-ant-secret"
MODEL = "claude-opus-5-5"
USAGE = {"input_tokens": 12, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0, "output_tokens": 1}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


def message_start(**usage: int) -> bytes:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": USAGE | usage,
    }
    return event("message_start", message=message)


def text_block(*pieces: str, index: int = 0) -> list[bytes]:
    return [
        event("content_block_start", index=index, content_block={"type": "text", "text": ""}),
        *(event("content_block_delta", index=index, delta={"type": "text_delta", "text": piece}) for piece in pieces),
        event("content_block_stop", index=index),
    ]


def ending(reason: str = "end_turn", *, sequence: str | None = None, output_tokens: int = 3) -> list[bytes]:
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return [event("message_delta", delta=delta, usage={"output_tokens": output_tokens}), event("message_stop")]


def answer(*pieces: str, **usage: int) -> list[bytes]:
    return [message_start(**usage), event("ping"), *text_block(*pieces), *ending()]


def error(kind: str, message: str) -> bytes:
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}).encode()


async def send_events(wire: Wire, events: list[bytes]) -> None:
    """Send a whole stream, one chunk for each event."""
    await wire.begin_stream("text/event-stream; charset=utf-8", request_id="req_1")
    for data in events:
        await wire.piece(data)
    await wire.end_stream()


Script = list[bytes] | Callable[[Wire, Asked], Any]


@contextlib.asynccontextmanager
async def upstream(script: Script, **settings: Any) -> AsyncIterator[tuple[RawServer, AnthropicProvider]]:
    """The server, and a started provider that asks it. Every request is checked before `script` answers it."""

    async def play(wire: Wire, asked: Asked) -> None:
        try:
            check(asked)
        except Violation as violation:
            await wire.reply(
                error("invalid_request_error", str(violation)), status=400, content_type="application/json"
            )
            return
        if callable(script):
            await script(wire, asked)
        else:
            await send_events(wire, script)

    async with raw_server(play) as server:
        values = {"anthropic_endpoint": server.url, "anthropic_api_key": KEY} | settings
        provider = AnthropicProvider(Settings(**values))
        await provider.start()
        try:
            yield server, provider
        finally:
            await provider.close()


def check(asked: Asked) -> None:
    body = json.loads(asked.body) if asked.body else {}
    check_headers(asked.headers, body, KEY)
    match asked.method, asked.path.partition("?")[0]:
        case "POST", "/v1/messages":
            check_messages(body)
        case "POST", "/v1/messages/count_tokens":
            check_count(body)
        case "GET", "/v1/models":
            pass
        case where:
            raise Violation(f"there is no {where}")


def request(*messages: ChatMessage, **fields: Any) -> LLMRequest:
    options = {"model": MODEL, "request_id": "r"} | fields
    return LLMRequest(messages=list(messages) or [ChatMessage(role="user", content="Hi")], **options)
