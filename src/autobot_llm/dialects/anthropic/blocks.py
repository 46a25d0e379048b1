"""Anthropic's content blocks as parts of an OpenAI message. Knows single blocks; knows nothing of conversations."""

from __future__ import annotations

from typing import Any

import msgspec

from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage

IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
REDACTED = "redacted_thinking"
THINKING = "thinking"
# Blocks with no counterpart in OpenAI's format: they travel as they are, to Anthropic or to a provider's refusal.
CARRIED = ("document", "search_result", REDACTED)
NOT_CACHEABLE = (THINKING, REDACTED)

Block = dict[str, Any]
Part = dict[str, Any]

_TEXT_FIELDS = frozenset({"type", "text", "cache_control"})
_IMAGE_FIELDS = frozenset({"type", "source", "cache_control"})


def read_parts(place: str, blocks: list[Block]) -> list[Part]:
    """Blocks that are neither tool calls nor tool results, as content parts."""
    return [read_part(f"{place}[{i}]", block) for i, block in enumerate(blocks)]


def read_part(place: str, block: Block) -> Part:
    """One block as a content part. Errors: InvalidRequestError, UnsupportedError, with `place` and the field."""
    kind = block.get("type")
    if kind == "text":
        return _text(place, block)
    if kind == "image":
        return _image(place, block)
    if kind == THINKING:
        return _thinking(place, block)
    if kind in CARRIED:
        return block
    raise UnsupportedError(f"{place}.type: blocks of type {kind!r} are not supported here", param=f"{place}.type")


def refuse_unknown(place: str, block: Block, known: frozenset[str]) -> None:
    for name in block.keys() - known:
        if block[name]:  # null and an empty list say nothing
            raise UnsupportedError(f"{place}.{name}: this field is not supported", param=f"{place}.{name}")


def marks_of(block: Block) -> Part:
    """The block's cache_control, to be kept."""
    return {"cache_control": block["cache_control"]} if block.get("cache_control") else {}


def joined(parts: list[Part]) -> str | list[Part]:
    """A single text part that says nothing else is a string, the form that every provider reads."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts


def mark_last_block(messages: list[ChatMessage], cache_control: dict[str, Any]) -> None:
    """Put `cache_control` where Anthropic puts the one of a whole request: on the last block that can have it.

    A mark that is there already is the caller's, and stays.
    """
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if message.tool_calls:
            message.tool_calls[-1].setdefault("cache_control", cache_control)
            return
        content = message.content
        parts: list[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        cacheable = [part for part in parts if part.get("type") not in NOT_CACHEABLE]
        if cacheable:
            cacheable[-1].setdefault("cache_control", cache_control)
            messages[place] = msgspec.structs.replace(message, content=parts)
            return


def _text(place: str, block: Block) -> Part:
    text = block.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{place}.text: expected a text", param=f"{place}.text")
    refuse_unknown(place, block, _TEXT_FIELDS)
    return {"type": "text", "text": text, **marks_of(block)}


def _image(place: str, block: Block) -> Part:
    refuse_unknown(place, block, _IMAGE_FIELDS)
    source = block.get("source")
    match source:
        case {"type": "base64", "media_type": str(kind), "data": str(data)} if kind in IMAGE_TYPES:
            url = f"data:{kind};base64,{data}"
        case {"type": "base64"}:
            raise InvalidRequestError(
                f"{place}.source: expected data and a media_type of {', '.join(IMAGE_TYPES)}", param=f"{place}.source"
            )
        case {"type": "url", "url": str(url)}:
            pass
        case {"type": "file"}:
            raise UnsupportedError(f"{place}.source: there are no uploaded files here", param=f"{place}.source")
        case _:
            raise InvalidRequestError(f"{place}.source: expected type base64 or url", param=f"{place}.source")
    return {"type": "image_url", "image_url": {"url": url}, **marks_of(block)}


def _thinking(place: str, block: Block) -> Part:
    for name in ("thinking", "signature"):
        if not isinstance(block.get(name), str):
            raise InvalidRequestError(f"{place}.{name}: expected a text", param=f"{place}.{name}")
    return {"type": THINKING, "thinking": block["thinking"], "signature": block["signature"]}
