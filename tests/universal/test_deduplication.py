"""Equal requests under way share one call: who comes late, who leaves, who is slow, and what goes wrong."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from universal.gated import GatedProvider, until

from autobot_llm.errors import OverloadedError, ProviderError
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.base import Streamer
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import CacheControl, Event, Finish, LLMRequest, LLMResponse, Start, TextDelta
from autobot_llm.universal.deduplication import Deduplication

QUESTION = LLMRequest(prompt="x", temperature=0)


def shared(provider: ScriptedProvider, replay_bytes: int = 2**20) -> tuple[Deduplication, Streamer]:
    link = Deduplication(Settings(), replay_bytes=replay_bytes)
    return link, link.wrap(provider, provider)


async def text_of(chain: Streamer, request: LLMRequest = QUESTION) -> str:
    async with aclosing(chain.stream(request)) as events:
        return "".join([event.text async for event in events if isinstance(event, TextDelta)])


async def test_a_thousand_equal_requests_make_one_call_though_half_of_them_leave() -> None:
    provider = GatedProvider(["one ", "two ", "three"])
    settings = Settings(cache_enabled=False)
    async with LLMInterface(settings, providers={"native": provider}) as llm:
        asked = [asyncio.create_task(llm.chat_completion(QUESTION, request_id=f"r{i}")) for i in range(1000)]
        provider.release()
        await until(lambda: provider.num_calls == 1)
        for task in asked[::2]:  # the one that began the call among them
            task.cancel()
        provider.release(2)
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert provider.num_calls == 1
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    answered = [answer for answer in answers[1::2] if isinstance(answer, LLMResponse)]
    assert {answer.content for answer in answered} == {"one two three"}
    assert [answer.request_id for answer in answered] == [f"r{i}" for i in range(1, 1000, 2)]
    assert provider.num_open_streams == 0


async def test_who_comes_late_gets_what_was_there_before_and_says_that_it_was_shared() -> None:
    provider = GatedProvider(["a", "b", "c"])
    link, chain = shared(provider)
    first = chain.stream(QUESTION)
    provider.release(2)
    read = [await anext(first) for _ in range(3)]
    late = asyncio.create_task(collected(chain, LLMRequest(prompt="x", temperature=0, request_id="late")))
    await until(lambda: link.num_joined == 1)
    provider.release()
    read += [event async for event in first]
    events = await late
    assert events[0] == Start(request_id="late", model="tiny", provider="native")
    assert events[1:-1] == read[1:-1]
    finish, own = events[-1], read[-1]
    assert isinstance(finish, Finish) and isinstance(own, Finish)
    assert [(line.applied, line.tokens_saved) for line in finish.optimizations] == [(True, 4)]
    assert [line.applied for line in own.optimizations] == [False]
    assert (provider.num_calls, link.calls) == (1, {})


async def collected(chain: Streamer, request: LLMRequest) -> list[Event]:
    async with aclosing(chain.stream(request)) as events:
        return [event async for event in events]


async def test_the_last_to_leave_ends_the_call_at_once() -> None:
    provider = GatedProvider(["a", "b"])
    link, chain = shared(provider)
    one, other = chain.stream(QUESTION), chain.stream(QUESTION)
    await anext(one)
    await anext(other)
    await one.aclose()
    assert provider.num_open_streams == 1
    await other.aclose()
    assert (provider.num_open_streams, link.calls) == (0, {})
    provider.release(4)
    assert await text_of(chain) == "ab"
    assert provider.num_calls == 2


async def test_an_error_reaches_all_and_the_next_request_makes_a_call_of_its_own() -> None:
    provider = GatedProvider(["a", OverloadedError("busy", retry_after=2)])
    link, chain = shared(provider)
    asked = [asyncio.create_task(text_of(chain)) for _ in range(20)]
    await until(lambda: link.num_joined == 19)
    provider.release(2)
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(error, OverloadedError) and error.retry_after == 2 for error in errors)
    assert provider.num_calls == 1
    provider.pieces = ["fine"]
    provider.release()
    assert await text_of(chain) == "fine"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"tenant": "b"}),
        ({}, {"stream": True}),
        ({}, {"priority": 1}),
        ({}, {"max_tokens": 4}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": None}, {"temperature": None}),
        ({"cache": CacheControl(mode="bypass")}, {"cache": CacheControl(mode="bypass")}),
    ],
)
async def test_requests_that_must_not_share_do_not(one: dict[str, object], other: dict[str, object]) -> None:
    provider = GatedProvider(["a"])
    _, chain = shared(provider)
    requests = [LLMRequest(**{"prompt": "x", "temperature": 0} | fields) for fields in (one, other)]  # type: ignore[arg-type]
    asked = [asyncio.create_task(text_of(chain, request)) for request in requests]
    await until(lambda: provider.num_calls == 2)
    provider.release(2)
    assert await asyncio.gather(*asked) == ["a", "a"]


async def test_a_drawn_answer_is_shared_where_the_request_says_so() -> None:
    provider = GatedProvider(["a"])
    link, chain = shared(provider)
    drawn = LLMRequest(prompt="x", temperature=1.0, cache=CacheControl())
    asked = [asyncio.create_task(text_of(chain, drawn)) for _ in range(5)]
    await until(lambda: link.num_joined == 4)
    provider.release()
    assert await asyncio.gather(*asked) == ["a"] * 5
    assert provider.num_calls == 1


async def test_each_caller_has_his_own_time_limit() -> None:
    provider = GatedProvider(["a"])
    async with LLMInterface(Settings(cache_enabled=False), providers={"native": provider}) as llm:
        hasty = asyncio.create_task(llm.chat_completion(QUESTION, timeout=0.05))
        patient = asyncio.create_task(llm.chat_completion(QUESTION))
        with pytest.raises(Exception, match="timeout of 0.05 s"):
            await hasty
        provider.release()
        assert (await patient).content == "a"
    assert (provider.num_calls, provider.requests[0].timeout) == (1, None)


async def test_beyond_the_replay_memory_nobody_joins_and_a_slow_reader_holds_the_call_back() -> None:
    provider = ScriptedProvider(["x" * 1000] * 100, name="native", models=("tiny",))
    await provider.start()
    link, chain = shared(provider, replay_bytes=10_000)
    slow = chain.stream(QUESTION)
    await anext(slow)
    (call,) = link.calls.values()
    await until(lambda: not call.can_be_joined)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(call._events) < 15
    assert await text_of(chain) == "x" * 100_000
    assert len(provider.requests) == 2
    rest = "".join([event.text async for event in slow if isinstance(event, TextDelta)])
    assert rest == "x" * 100_000
    assert link.calls == {}


async def test_an_answer_that_is_cut_short_is_cut_short_for_all() -> None:
    provider = ScriptedProvider(["a"], name="native", models=("tiny",), complete=False)
    async with LLMInterface(Settings(cache_enabled=False), providers={"native": provider}) as llm:
        answers = await asyncio.gather(*(llm.chat_completion(QUESTION) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(answer, ProviderError) for answer in answers)
    assert len(provider.requests) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["join", "leave", "release", "read"]), max_size=40))
def test_whatever_happens_in_whatever_order_nobody_gets_a_wrong_piece_and_nothing_is_left(steps: list[str]) -> None:
    asyncio.run(_play(steps))


async def _play(steps: list[str]) -> None:
    provider = GatedProvider(["a", "b", "c"])
    link, chain = shared(provider)
    readers: list[asyncio.Task[str]] = []
    for step in steps:
        if step == "join":
            readers.append(asyncio.create_task(text_of(chain)))
        elif step == "leave" and readers:
            readers[len(readers) // 2].cancel()
        elif step == "release":
            provider.release()
        await asyncio.sleep(0)
    provider.release(3 * len(readers) + 3)
    for answer in await asyncio.gather(*readers, return_exceptions=True):
        assert answer == "abc" or isinstance(answer, asyncio.CancelledError)
    assert (link.calls, provider.num_open_streams) == ({}, 0)
