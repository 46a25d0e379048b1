"""Write OpenAI messages as Anthropic's system prompt and turns. Knows how the two order a conversation.

Format: https://platform.claude.com/docs/en/build-with-claude/working-with-messages, and the pages beside it on tools,
vision and mid-conversation system messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from autobot_llm.dialects.anthropic.blocks import CARRIED, IMAGE_TYPES, THINKING, Block, Part, marks_of
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage

_DATA_URL = re.compile(r"data:(?P<kind>[^;,]*);base64,(?P<data>.*)", re.DOTALL)
_NO_ID = re.compile(r"[^a-zA-Z0-9_-]")
_DETAILS = (None, "auto", "high")  # what OpenAI's `detail` may say: Anthropic always looks closely

Turn = dict[str, Any]


def write_conversation(messages: Sequence[ChatMessage], *, system_turns: bool) -> tuple[list[Block], list[Turn]]:
    """The system prompt's blocks, and the turns, consecutive ones of a role merged into one.

    System messages go into the system prompt; with `system_turns` one that directly follows a user's turn keeps its
    place. Reasoning without its maker's signature is left out, since Anthropic refuses it. Errors:
    InvalidRequestError and UnsupportedError with the place in `param`.
    """
    system: list[Block] = []
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if message.name is not None and message.role != "tool":
            raise UnsupportedError(f"{place}.name: Anthropic does not tell participants apart", param=f"{place}.name")
        blocks = _WRITERS[message.role](place, message)
        role = _ROLES[message.role]
        keeps_its_place = system_turns and turns and turns[-1]["role"] in ("user", "system")
        if role == "system" and not keeps_its_place:
            system += blocks
        else:
            _append(turns, role, blocks)
    if not turns:
        raise InvalidRequestError("messages: Anthropic needs a message beside system messages", param="messages")
    return system, turns


def _append(turns: list[Turn], role: str, blocks: list[Block]) -> None:
    if not blocks:
        return
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += blocks
    else:
        turns.append({"role": role, "content": blocks})


def _system(place: str, message: ChatMessage) -> list[Block]:
    blocks = _blocks(f"{place}.content", message.content)
    if any(block["type"] != "text" for block in blocks):
        raise UnsupportedError(f"{place}.content: a system message is text only", param=f"{place}.content")
    return blocks


def _user(place: str, message: ChatMessage) -> list[Block]:
    blocks = _blocks(f"{place}.content", message.content)
    if not blocks:
        raise InvalidRequestError(f"{place}.content: Anthropic takes no empty message", param=f"{place}.content")
    return blocks


def _assistant(place: str, message: ChatMessage) -> list[Block]:
    """An empty answer has nothing to tell: its turn is left out."""
    calls = message.tool_calls or ()
    written = [_tool_use(f"{place}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return _blocks(f"{place}.content", message.content) + written


def _tool(place: str, message: ChatMessage) -> list[Block]:
    if message.tool_call_id is None:
        raise InvalidRequestError(f"{place}.tool_call_id: this field is required", param=f"{place}.tool_call_id")
    result: Block = {"type": "tool_result", "tool_use_id": _valid_id(message.tool_call_id)}
    parts = message.content
    if isinstance(parts, list) and any(part.get("is_error") for part in parts):
        result["is_error"] = True
    if isinstance(parts, list) and parts and marks_of(parts[-1]):
        result |= marks_of(parts[-1])
        parts = [*parts[:-1], {name: value for name, value in parts[-1].items() if name != "cache_control"}]
    if blocks := _blocks(f"{place}.content", parts):
        result["content"] = blocks
    return [result]


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "user"}
_WRITERS = {"system": _system, "developer": _system, "user": _user, "assistant": _assistant, "tool": _tool}


def _blocks(place: str, content: str | list[Part] | None) -> list[Block]:
    """The content's blocks, without empty texts, which Anthropic refuses."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    blocks = [_block(f"{place}[{i}]", part) for i, part in enumerate(parts)]
    return [block for block in blocks if block.get("text") != ""]


def _block(place: str, part: Part) -> Block:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"], **marks_of(part)}
    if kind == "image_url":
        return {"type": "image", "source": _image_source(f"{place}.image_url", part.get("image_url")), **marks_of(part)}
    if kind == THINKING or kind in CARRIED:
        block = {name: value for name, value in part.items() if name != "is_error"}
        if block.get("citations") and block["citations"] != {"enabled": False}:
            raise UnsupportedError(f"{place}.citations: answers carry no citations", param=f"{place}.citations")
        return block
    raise UnsupportedError(
        f"{place}.type: {kind!r}: Anthropic takes parts of type text and image_url", param=f"{place}.type"
    )


def _image_source(place: str, image: object) -> Block:
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(image, dict) and image.get("detail") not in _DETAILS:
        raise UnsupportedError(
            f"{place}.detail: {image['detail']!r}: Anthropic has no such choice; expected auto", param=f"{place}.detail"
        )
    if isinstance(url, str):
        if url.startswith("https://"):
            return {"type": "url", "url": url}
        found = _DATA_URL.fullmatch(url)
        if found is not None and found["kind"] in IMAGE_TYPES:
            return {"type": "base64", "media_type": found["kind"], "data": found["data"]}
    raise InvalidRequestError(
        f"{place}.url: expected an https address, or a data: URL in base64 of {', '.join(IMAGE_TYPES)}",
        param=f"{place}.url",
    )


def _tool_use(place: str, call: dict[str, Any]) -> Block:
    match call:
        case {"id": str(call_id), "function": {"name": str(name), "arguments": str(text)}}:
            arguments = _arguments(f"{place}.function.arguments", text)
            return {"type": "tool_use", "id": _valid_id(call_id), "name": name, "input": arguments, **marks_of(call)}
    raise InvalidRequestError(f"{place}: expected an id, and a function with name and arguments", param=place)


def _arguments(place: str, text: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(text) if text else {}
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidRequestError(f"{place}: expected the JSON text of an object: {exc}", param=place) from exc
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{place}: expected the JSON text of an object", param=place)
    return arguments


def _valid_id(call_id: str) -> str:
    """Other providers' ids may have characters that Anthropic refuses; call and result stay a pair."""
    return _NO_ID.sub("_", call_id)
