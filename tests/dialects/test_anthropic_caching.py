"""Marks for Anthropic's prompt cache stand where the prefix is stable, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic_reference import check_messages
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.dialects.anthropic.caching import has_marks, place_marks
from autobot_llm.dialects.anthropic.models import facts_about
from autobot_llm.dialects.anthropic.requests import write_request
from autobot_llm.types import ChatMessage, LLMRequest

LONG = "Every answer is as short as its question allows. " * 200  # about 2,500 tokens
MARK = {"type": "ephemeral"}


def body_of(*turns: tuple[str, str], system: str = "", tool: str = "") -> dict[str, Any]:
    messages = [ChatMessage(role="system", content=system)] if system else []
    messages += [ChatMessage(role=role, content=content) for role, content in turns]  # type: ignore[arg-type]
    tools = [{"type": "function", "function": {"name": "f", "description": tool}}] if tool else None
    return write_request(LLMRequest(messages=messages, tools=tools), "claude-sonnet-5").body


def marked(body: dict[str, Any]) -> list[str]:
    """Where the marks are."""
    places = [f"tools.{i}" for i, tool in enumerate(body.get("tools", ())) if "cache_control" in tool]
    places += [f"system.{i}" for i, block in enumerate(body.get("system", ())) if "cache_control" in block]
    for i, turn in enumerate(body["messages"]):
        places += [f"messages.{i}.{j}" for j, block in enumerate(turn["content"]) if "cache_control" in block]
    return places


def test_tools_and_system_are_marked_and_a_first_question_is_not() -> None:
    body = body_of(("user", LONG), system=LONG, tool=LONG)
    assert place_marks(body, 1024) == 2
    assert marked(body) == ["tools.0", "system.0"]
    check_messages(body)


def test_a_conversation_that_goes_on_is_marked_where_its_last_request_ended_and_at_its_end() -> None:
    turns = [("user", LONG), ("assistant", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    body = body_of(*turns, system=LONG, tool=LONG)
    assert place_marks(body, 1024) == 4
    assert marked(body) == ["tools.0", "system.0", "messages.2.0", "messages.4.0"]
    check_messages(body)
    shorter = body_of(*turns[:3], system=LONG, tool=LONG)
    place_marks(shorter, 1024)
    assert marked(shorter)[-1] == "messages.2.0"  # what the longer one reads was written here


def test_a_prefix_too_short_for_the_model_is_left_alone() -> None:
    body = body_of(("user", "a"), ("assistant", "b"), ("user", "c"), system="Be brief.", tool="t")
    assert place_marks(body, 1024) == 0
    assert marked(body) == []
    long = body_of(("user", "a"), system=LONG)
    assert place_marks(long, facts_about("claude-opus-4-6").min_cacheable_tokens) == 0
    assert place_marks(long, facts_about("claude-opus-4-7").min_cacheable_tokens) == 1


def test_reasoning_is_never_marked() -> None:
    thinking = {"type": "thinking", "thinking": LONG, "signature": "s"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": LONG}, thinking]},
        {"role": "user", "content": [{"type": "text", "text": "b"}, thinking]},
    ]
    body: dict[str, Any] = {"messages": turns}
    place_marks(body, 1)
    assert marked(body) == ["messages.0.0", "messages.2.0"]


def test_a_prefilled_answer_is_not_marked() -> None:
    body = body_of(("user", LONG), ("assistant", "The answer is"))
    assert place_marks(body, 1024) == 1
    assert marked(body) == ["messages.0.0"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": MARK}]}]},
        {"messages": [], "system": [{"type": "text", "text": "a", "cache_control": MARK}]},
        {"messages": [], "tools": [{"name": "f", "cache_control": MARK}]},
        {"messages": [], "cache_control": MARK},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "content": [{"type": "text", "cache_control": MARK}]}],
                }
            ]
        },
    ],
)
def test_marks_of_the_callers_own_are_seen(body: dict[str, Any]) -> None:
    assert has_marks(body)


def test_a_body_without_marks_has_none() -> None:
    assert not has_marks(body_of(("user", "a"), system="b", tool="c"))


ROLES = st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=12)


@given(ROLES, st.booleans(), st.booleans(), st.integers(0, 3000))
def test_there_are_never_more_than_four_marks_and_the_request_stays_valid(
    roles: list[str], has_system: bool, has_tool: bool, min_tokens: int
) -> None:
    turns = [(role, LONG) for role in roles]
    body = body_of(*turns, system=LONG * has_system, tool=LONG * has_tool)
    plain = body_of(*turns, system=LONG * has_system, tool=LONG * has_tool)
    assert place_marks(body, min_tokens) == len(marked(body)) <= 4
    check_messages(body)
    for field in ("tools", "system"):
        for block in body.get(field, ()):
            block.pop("cache_control", None)
    for turn in body["messages"]:
        for block in turn["content"]:
            block.pop("cache_control", None)
    assert body == plain
