"""A conversation in OpenAI's own words, for those who know no others. Knows what Anthropic's clients add to it.

What is left out changes no answer: marks for Anthropic's prompt cache, how finely a call is streamed, the note that a
tool's result is an error (its text says so too), and reasoning that Anthropic has encrypted for itself. Signed
reasoning is plain reasoning here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from autobot_llm.errors import UnsupportedError
from autobot_llm.types import ChatMessage

_NOTES = ("cache_control", "eager_input_streaming", "is_error")
_FOREIGN = ("document", "search_result")


def plain_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The messages without what is Anthropic's; the list itself where there is nothing of the kind.

    Raises UnsupportedError for content that only Anthropic's models read.
    """
    plain = [_plain_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    return messages if all(one is other for one, other in zip(plain, messages, strict=True)) else plain


def plain_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools without what is Anthropic's."""
    return None if tools is None else _without_notes(tools)


def _plain_message(place: str, message: ChatMessage) -> ChatMessage:
    changes: dict[str, Any] = {}
    if isinstance(message.content, list):
        _refuse_foreign(f"{place}.content", message.content)
        parts = [part for part in message.content if part.get("type") not in ("thinking", "redacted_thinking")]
        thoughts = [part.get("thinking", "") for part in message.content if part.get("type") == "thinking"]
        if thoughts:
            changes["reasoning_content"] = "".join([*thoughts, message.reasoning_content or ""])
        plain = _without_notes(parts)
        if len(parts) < len(message.content) or plain is not parts:
            changes["content"] = plain or ("" if not message.tool_calls else None)
    if message.tool_calls is not None and (calls := _without_notes(message.tool_calls)) is not message.tool_calls:
        changes["tool_calls"] = calls
    return msgspec.structs.replace(message, **changes) if changes else message


def _refuse_foreign(place: str, parts: list[dict[str, Any]]) -> None:
    for i, part in enumerate(parts):
        if (kind := part.get("type")) in _FOREIGN:
            raise UnsupportedError(f"{place}[{i}].type: only Anthropic reads a {kind}", param=f"{place}[{i}].type")


def _without_notes(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not any(note in item for item in items for note in _NOTES):
        return items
    return [{name: value for name, value in item.items() if name not in _NOTES} for item in items]
