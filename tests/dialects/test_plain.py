"""What Anthropic's clients add to a conversation does not reach providers that know nothing of it."""

from __future__ import annotations

from typing import Any

import pytest

from autobot_llm.dialects.plain import plain_messages, plain_tools
from autobot_llm.errors import UnsupportedError
from autobot_llm.types import ChatMessage

MARK = {"cache_control": {"type": "ephemeral"}}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def test_a_conversation_that_has_nothing_of_the_kind_is_passed_on_as_it_is() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        ChatMessage(role="system", content="a"),
        ChatMessage(role="user", content=[text("b")]),
        ChatMessage(role="assistant", tool_calls=calls),
        ChatMessage(role="tool", content="c", tool_call_id="c"),
    ]
    assert plain_messages(messages) is messages
    assert plain_tools(None) is None


def test_marks_and_notes_are_taken_off_and_nothing_else() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, **MARK}]
    image = {"type": "image_url", "image_url": {"url": "https://example.com"}}
    messages = [
        ChatMessage(role="user", content=[text("a", **MARK), image | MARK]),
        ChatMessage(role="assistant", content=None, tool_calls=calls),
        ChatMessage(role="tool", content=[text("b", is_error=True)], tool_call_id="c"),
    ]
    plain = plain_messages(messages)
    assert plain[0].content == [text("a"), image]
    assert plain[1].tool_calls == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert plain[2] == ChatMessage(role="tool", content=[text("b")], tool_call_id="c")
    assert messages[0].content == [text("a", **MARK), image | MARK]
    tool = {"type": "function", "function": {"name": "f"}}
    assert plain_tools([tool | MARK | {"eager_input_streaming": True}]) == [tool]


def test_signed_reasoning_is_plain_reasoning_and_encrypted_reasoning_is_left_out() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    redacted = {"type": "redacted_thinking", "data": "d"}
    spoken = ChatMessage(role="assistant", content=[thinking, redacted, text("a")])
    assert plain_messages([spoken]) == [ChatMessage(role="assistant", content=[text("a")], reasoning_content="hm")]
    silent = ChatMessage(role="assistant", content=[redacted])
    assert plain_messages([silent]) == [ChatMessage(role="assistant", content="")]


@pytest.mark.parametrize("kind", ["document", "search_result"])
def test_content_that_only_anthropic_reads_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind) as caught:
        plain_messages([ChatMessage(role="user", content=[text("a"), {"type": kind}])])
    assert caught.value.param == "messages[0].content[1].type"
