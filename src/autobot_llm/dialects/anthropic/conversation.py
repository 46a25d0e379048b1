"""Read Anthropic's system prompt and turns as OpenAI messages. Knows how the two order a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from autobot_llm.dialects.anthropic.blocks import (
    THINKING,
    Block,
    Part,
    joined,
    marks_of,
    read_part,
    read_parts,
    refuse_unknown,
)
from autobot_llm.errors import InvalidRequestError
from autobot_llm.types import ChatMessage

_CALL_FIELDS = frozenset({"type", "id", "name", "input", "cache_control", "caller"})
_RESULT_FIELDS = frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"})
DIRECT = {"type": "direct"}  # called by the model itself, and not by code that it runs at Anthropic

Content = str | list[Block]


def read_conversation(system: Content | None, turns: Sequence[tuple[str, Content]]) -> list[ChatMessage]:
    """The messages of (role, content) `turns` after `system`. Errors: InvalidRequestError with the place in `param`.

    A turn with results of tools becomes one message for each result and one for what else it has. Reasoning that its
    maker has signed is kept as a part; other reasoning is `reasoning_content`.
    """
    messages = [] if not system else [ChatMessage(role="system", content=_content("system", system))]
    for i, (role, content) in enumerate(turns):
        place = f"messages[{i}]"
        match role:
            case "user":
                messages += _user_turn(f"{place}.content", content)
            case "assistant":
                messages.append(_assistant_turn(f"{place}.content", content))
            case "system":
                messages.append(ChatMessage(role="system", content=_content(f"{place}.content", content)))
            case _:
                raise InvalidRequestError(
                    f"{place}.role: {role!r}: expected user, assistant or system", param=f"{place}.role"
                )
    return messages


def _content(place: str, content: Content) -> str | list[Part]:
    return content if isinstance(content, str) else joined(read_parts(place, content))


def _user_turn(place: str, content: Content) -> list[ChatMessage]:
    if isinstance(content, str):
        return [ChatMessage(role="user", content=content)]
    messages: list[ChatMessage] = []
    parts: list[Part] = []
    for i, block in enumerate(content):
        if block.get("type") != "tool_result":
            parts.append(read_part(f"{place}[{i}]", block))
            continue
        if parts:
            messages.append(ChatMessage(role="user", content=joined(parts)))
            parts = []
        messages.append(_tool_result(f"{place}[{i}]", block))
    if parts or not messages:
        messages.append(ChatMessage(role="user", content=joined(parts)))
    return messages


def _tool_result(place: str, block: Block) -> ChatMessage:
    refuse_unknown(place, block, _RESULT_FIELDS)
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str):
        raise InvalidRequestError(f"{place}.tool_use_id: expected a text", param=f"{place}.tool_use_id")
    content = block.get("content") or ""
    if isinstance(content, str):
        parts: list[Part] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = read_parts(f"{place}.content", content)
    else:
        raise InvalidRequestError(f"{place}.content: expected a text or content blocks", param=f"{place}.content")
    parts[-1] |= marks_of(block)
    if block.get("is_error"):
        parts[-1] |= {"is_error": True}
    return ChatMessage(role="tool", content=joined(parts), tool_call_id=call_id)


def _assistant_turn(place: str, content: Content) -> ChatMessage:
    if isinstance(content, str):
        return ChatMessage(role="assistant", content=content)
    parts: list[Part] = []
    calls: list[dict[str, Any]] = []
    unsigned: list[str] = []
    for i, block in enumerate(content):
        if block.get("type") == "tool_use":
            calls.append(_tool_call(f"{place}[{i}]", block))
            continue
        part = read_part(f"{place}[{i}]", block)
        if part["type"] == THINKING and not part["signature"]:
            unsigned.append(part["thinking"])
        else:
            parts.append(part)
    return ChatMessage(
        role="assistant",
        content=joined(parts) if parts or not calls else None,
        tool_calls=calls or None,
        reasoning_content="".join(unsigned) or None,
    )


def _tool_call(place: str, block: Block) -> dict[str, Any]:
    refuse_unknown(place, block, _CALL_FIELDS if block.get("caller") in (None, DIRECT) else _CALL_FIELDS - {"caller"})
    match block:
        case {"id": str(call_id), "name": str(name), "input": dict(arguments)}:
            function = {"name": name, "arguments": msgspec.json.encode(arguments).decode()}
            return {"id": call_id, "type": "function", "function": function, **marks_of(block)}
    raise InvalidRequestError(f"{place}: a tool_use block has an id, a name and an input (an object)", param=place)
