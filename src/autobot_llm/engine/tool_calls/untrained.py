"""Tools for a model whose chat template has no place for them: a conversation in words that it can read. Knows
messages; knows nothing of templates.

The tools are described in the first system message, calls and results of earlier turns are written out in the Hermes
form. A model that was not trained to call functions rarely does so by itself; forced, it does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autobot_llm.engine.chat_template import Message, plain_text

_INSTRUCTION = (
    "You may call these functions:\n{tools}\n"
    'A call is written as\n<tool_call>\n{{"name": FUNCTION, "arguments": {{ARGUMENTS}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    content: str | list[dict[str, Any]] | None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


def in_words(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The same conversation without tools, tool calls and tool messages."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    turns: list[Message] = [_plain(message) for message in messages]
    if tools:
        instruction = _INSTRUCTION.format(tools=described)
        if turns and turns[0].role in ("system", "developer"):
            instruction = "\n\n".join(part for part in (_text(turns[0].content), instruction) if part)
            turns = turns[1:]
        turns.insert(0, _Turn("system", instruction))
    return turns


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return _Turn("user", f"<tool_response>\n{_text(message.content)}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [_call(call) for call in message.tool_calls]
    return _Turn("assistant", "\n".join(part for part in (_text(message.content), *calls) if part))


def _call(call: dict[str, Any]) -> str:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function.get("name"))}, "arguments": {text}}}\n</tool_call>'


def _text(content: str | list[dict[str, Any]] | None) -> str:
    """A message's text. Raises UnsupportedError for a part that is none."""
    return plain_text(content, "messages") or ""
