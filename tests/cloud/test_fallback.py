"""Another model answers where the one that was asked for cannot, and the answer says so."""

from __future__ import annotations

from typing import Any

import pytest

from autobot_llm import LLMInterface, Settings
from autobot_llm.cloud.fallback import FallbackTable
from autobot_llm.errors import InvalidRequestError, LLMError, OverloadedError, ProviderError, ProviderUnavailable
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.types import LLMRequest, TextDelta

HELLO = [{"role": "user", "content": "hello"}]
DOWN = ProviderUnavailable("first is down")


def interface(*providers: ScriptedProvider, **settings: Any) -> LLMInterface:
    given = {"cloud_retry_max_attempts": 0, "cache_enabled": False, **settings}
    return LLMInterface(Settings(**given), providers={provider.name: provider for provider in providers})


def test_the_most_exact_line_of_the_table_counts() -> None:
    table = FallbackTable(["* > native/tiny", "openai/* > x", "m > y", "openai/m > z > w", "openai/m>v"])
    assert table.of("openai", "m") == ("z", "w", "v")
    assert table.of("groq", "m") == ("y",)
    assert table.of("openai", "other") == ("x",)
    assert table.of("openai", None) == ("x",)
    assert table.of("groq", None) == ("native/tiny",)
    assert FallbackTable([]).of("openai", "m") == ()


async def test_the_next_model_answers_and_the_answer_is_marked() -> None:
    first, second, third = (
        ScriptedProvider([DOWN], name="first"),
        ScriptedProvider([OverloadedError("busy", retry_after=1)], name="second", models=["b"]),
        ScriptedProvider(["from the third"], name="third", models=["c"]),
    )
    async with interface(first, second, third, fallbacks=("first/* > second/b > third/c",)) as llm:
        response = await llm.chat_completion(HELLO)
    assert (response.content, response.provider, response.model) == ("from the third", "third", "c")
    assert response.fallback_used
    (line,) = (one for one in response.optimizations if one.name == "fallback")
    assert line.applied
    assert "third/c answered instead of first's model" in line.reason
    assert "first is down" in line.reason


async def test_an_answer_of_the_model_that_was_asked_for_is_not_marked() -> None:
    first, second = ScriptedProvider(["mine"], name="first"), ScriptedProvider(["no"], name="second")
    async with interface(first, second, fallbacks=("* > second/scripted",)) as llm:
        response = await llm.chat_completion(HELLO)
    assert response.content == "mine"
    assert not response.fallback_used
    assert second.requests == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [([InvalidRequestError("wrong")], InvalidRequestError), (["half", ProviderError("cut")], ProviderError)],
)
async def test_no_other_model_is_asked_for_the_callers_mistake_or_after_half_an_answer(
    script: list[str | LLMError], expected: type[LLMError]
) -> None:
    first, second = ScriptedProvider(script, name="first"), ScriptedProvider(["no"], name="second")
    async with interface(first, second, fallbacks=("* > second/scripted",)) as llm:
        with pytest.raises(expected):
            await llm.chat_completion(HELLO)
    assert second.requests == []


async def test_where_nobody_answers_the_error_is_that_of_the_model_that_was_asked_for() -> None:
    first = ScriptedProvider([DOWN], name="first")
    second = ScriptedProvider([InvalidRequestError("it cannot do that")], name="second")
    async with interface(first, second, fallbacks=("* > second/scripted > nobody/x",)) as llm:
        with pytest.raises(ProviderUnavailable, match="first is down"):
            await llm.chat_completion(HELLO)
    assert len(second.requests) == 1


async def test_all_models_share_one_timeout() -> None:
    slow = ScriptedProvider([DOWN], name="first", delay=0.1)
    second = ScriptedProvider(["late"], name="second", delay=0.01)
    async with interface(slow, second, fallbacks=("* > second/scripted",)) as llm:
        await llm.chat_completion(HELLO, timeout=5.0)
    (asked,) = second.requests
    assert asked.timeout is not None
    assert 3.0 < asked.timeout < 4.95


async def test_leaving_the_stream_ends_the_work_at_the_other_model() -> None:
    first = ScriptedProvider([DOWN], name="first")
    second = ScriptedProvider(["a", "b", "c"], name="second")
    async with interface(first, second, fallbacks=("* > second/scripted",)) as llm:
        events = llm.events(LLMRequest(prompt="x", stream=True))
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await events.aclose()
        assert (second.num_open_streams, second.num_closed_streams) == (0, 1)
