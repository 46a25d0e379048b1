"""What is kept, for whom and for how long, and that a kept answer is the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from universal.gated import GatedProvider, until

from autobot_llm.errors import InvalidRequestError, NotCached, ProviderError
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import Line, ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import (
    CacheControl,
    ChoiceEnd,
    Event,
    Finish,
    LLMRequest,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from autobot_llm.universal.entries import Entry, seal, unseal
from autobot_llm.universal.stores.memory import MemoryStore

HELLO = [{"role": "user", "content": "hi"}]
EVERY_KIND: Sequence[Line] = [
    ReasoningDelta("hm", signature="s"),
    TextDelta("Grüße ", logprobs=(TokenLogprob(3, "Gr", -0.5, ((4, "x", -2.0),)),)),
    TextDelta("\u2028👍", index=1),
    RefusalDelta("no"),
    ToolCallDelta(position=0, call_id="c", name="f", arguments='{"a"'),
    ToolCallDelta(position=0, arguments=":1}"),
    ChoiceEnd(finish_reason="tool_calls", stop_sequence="."),
    ChoiceEnd(finish_reason="length", index=1),
    Finish(usage=Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=2, reasoning_tokens=1)),
]


@asynccontextmanager
async def asking(
    folder: Path, script: Sequence[Line] = ("a", "b"), provider: ScriptedProvider | None = None, **values: Any
) -> AsyncIterator[tuple[LLMInterface, ScriptedProvider]]:
    provider = provider or ScriptedProvider(script, name="native", models=("tiny",))
    async with LLMInterface(Settings(cache_dir=folder, **values), providers={"native": provider}) as llm:
        yield llm, provider


async def events_of(llm: LLMInterface, **fields: Any) -> list[Event]:
    async with aclosing(llm.events(LLMRequest(prompt="x", temperature=0, request_id="same", **fields))) as events:
        return [event async for event in events]


def without_report(events: list[Event]) -> list[Event]:
    return [
        msgspec.structs.replace(event, optimizations=()) if isinstance(event, Finish) else event for event in events
    ]


async def test_a_kept_answer_is_the_answer_event_by_event_from_both_levels(tmp_path: Path) -> None:
    async with asking(tmp_path, EVERY_KIND) as (llm, provider):
        made = await events_of(llm, stream=True)
        from_memory = await events_of(llm, stream=True)
    async with asking(tmp_path, EVERY_KIND) as (llm, other):
        from_file = await events_of(llm, stream=True)
        assert (llm.get_cache_metrics()["num_l2_hits"], len(other.requests)) == (1, 0)
    assert without_report(made) == without_report(from_memory) == without_report(from_file)
    assert len(provider.requests) == 1


async def test_a_hit_says_so_and_what_it_saved(tmp_path: Path) -> None:
    provider = ScriptedProvider(["a", "b"], name="native", models=("tiny",), delay=0.01)
    async with asking(tmp_path, provider=provider) as (llm, _):
        made = await llm.chat_completion(HELLO, temperature=0)
        again = await llm.chat_completion(HELLO, temperature=0, request_id="mine")
        figures = llm.get_cache_metrics()
    assert (made.cached, again.cached, again.request_id) == (False, True, "mine")
    assert (again.content, again.usage, again.finish_reason) == (made.content, made.usage, made.finish_reason)
    (line,) = again.optimizations
    assert (line.name, line.applied, line.tokens_saved) == ("response_caching", True, made.usage.total_tokens)
    assert line.milliseconds_saved is not None and line.milliseconds_saved > 20
    assert made.optimizations[-1].reason == "it was not there"
    assert (figures["num_lookups"], figures["num_l1_hits"], figures["hit_rate"]) == (2, 1, 0.5)
    assert figures["seconds_saved"] == pytest.approx(line.milliseconds_saved / 1000)


async def test_only_deterministic_requests_are_kept_unless_they_say_otherwise(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        for fields, num_calls in (
            ({}, 2), ({"temperature": 1.0}, 2), ({"temperature": 0}, 1), ({"seed": 3}, 1), ({"cache": {}}, 1),
            ({"temperature": 0, "cache": {"mode": "bypass"}}, 2),
        ):  # fmt: skip
            provider.requests.clear()
            for _ in range(2):
                await llm.chat_completion([{"role": "user", "content": str(fields)}], **fields)
            assert len(provider.requests) == num_calls, fields


async def test_a_request_says_what_it_wants_of_the_cache(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):

        async def ask(**cache: Any) -> bool:
            return (await llm.chat_completion(HELLO, temperature=0, cache=cache)).cached

        with pytest.raises(NotCached):
            await ask(mode="only-if-cached")
        assert provider.requests == []
        assert [await ask(mode="bypass"), await ask(), await ask(mode="bypass")] == [False, False, False]
        assert [await ask(mode="only-if-cached"), await ask(mode="refresh"), await ask()] == [True, False, True]
        assert len(provider.requests) == 4
        assert await ask(max_age=60) and not await ask(max_age=0)
        for bad in ({"mode": "sometimes"}, {"ttl": 0}, {"ttl": "x"}, {"max_age": -1}, {"tll": 3}):
            with pytest.raises(InvalidRequestError) as refusal:
                await ask(**bad)
            assert str(refusal.value.param).startswith("cache")


async def test_an_answer_is_kept_for_its_ttl(tmp_path: Path) -> None:
    async with asking(tmp_path, cache_l2_ttl=0.05) as (llm, provider):
        await llm.chat_completion(HELLO, temperature=0)
        kept_longer = [{"role": "user", "content": "longer"}]
        await llm.chat_completion(kept_longer, temperature=0, cache=CacheControl(ttl=60))
        await asyncio.sleep(0.06)  # the life of the one is over, that of the other is not
        assert not (await llm.chat_completion(HELLO, temperature=0)).cached
        assert (await llm.chat_completion(kept_longer, temperature=0)).cached
    assert len(provider.requests) == 3


@pytest.mark.parametrize(
    ("script", "complete"), [(["a", ProviderError("broken")], True), (["a"], False), ([ProviderError("no")], True)]
)
async def test_errors_and_half_answers_are_never_kept(tmp_path: Path, script: list[Line], complete: bool) -> None:
    provider = ScriptedProvider(script, name="native", models=("tiny",), complete=complete)
    async with asking(tmp_path, provider=provider) as (llm, _):
        for _ in range(2):
            with pytest.raises(ProviderError):
                await llm.chat_completion(HELLO, temperature=0)
        assert llm.get_cache_metrics()["num_stored"] == 0
    assert len(provider.requests) == 2


async def test_an_answer_that_its_reader_left_is_not_kept(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        async with aclosing(llm.stream(HELLO, temperature=0)) as events:
            await anext(events)
            await anext(events)
        assert not (await llm.chat_completion(HELLO, temperature=0)).cached
    assert provider.num_open_streams == 0


async def test_another_models_answer_is_never_kept(tmp_path: Path) -> None:
    provider = GatedProvider(["a"], fallback_used=True)
    provider.release(2)
    async with asking(tmp_path, provider=provider) as (llm, _):
        answers = [await llm.chat_completion(HELLO, temperature=0) for _ in range(2)]
    assert [(answer.fallback_used, answer.cached) for answer in answers] == [(True, False)] * 2


async def test_tenants_never_get_each_others_answers(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        for tenant in ("a", "b", "a"):
            await llm.chat_completion(HELLO, temperature=0, tenant=tenant)
    assert [request.tenant for request in provider.requests] == ["a", "b"]


async def test_a_crowd_makes_one_call_and_one_entry_and_later_ones_none(tmp_path: Path) -> None:
    provider = GatedProvider(["a"])
    async with asking(tmp_path, provider=provider) as (llm, _):
        asked = [asyncio.create_task(llm.chat_completion(HELLO, temperature=0)) for _ in range(200)]
        await until(lambda: provider.num_calls == 1)
        provider.release()
        await asyncio.gather(*asked)
        assert (await llm.chat_completion(HELLO, temperature=0)).cached
        assert llm.get_cache_metrics()["num_stored"] == 1
    assert provider.num_calls == 1


async def test_clearing_removes_what_is_kept_from_the_levels_that_are_named(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await llm.chat_completion(HELLO, temperature=0)
    async with asking(tmp_path) as (llm, provider):
        assert await llm.clear_cache(l2=False) == {"l1": 0}
        assert (await llm.chat_completion(HELLO, temperature=0)).cached
        assert await llm.clear_cache() == {"l1": 1, "l2": 1}
        assert not (await llm.chat_completion(HELLO, temperature=0)).cached
    assert len(provider.requests) == 1


async def test_a_large_answer_passes_and_is_not_kept(tmp_path: Path) -> None:
    async with asking(tmp_path, ["x" * 2**20] * 5) as (llm, provider):
        for _ in range(2):
            assert len((await llm.chat_completion(HELLO, temperature=0)).content) == 5 * 2**20
    assert len(provider.requests) == 2


# Entries


def entry_of(num_bytes: int = 1, expires: float = 10.0) -> Entry:
    events = (
        Start(request_id="r", model="m", provider="p"),
        TextDelta("x"),
        Finish(usage=Usage(prompt_tokens=1, completion_tokens=1)),
    )
    return Entry(events=events, created=1.0, expires=expires, milliseconds=2.0, num_bytes=num_bytes)


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_damaged_entry_is_no_entry(place: int, change: int) -> None:
    key = b"k" * 16
    data = bytearray(seal(key, entry_of()))
    assert unseal(key, bytes(data)) is not None
    data[place % len(data)] ^= change
    assert unseal(key, bytes(data)) is None


def test_an_entry_under_another_key_or_cut_short_is_no_entry() -> None:
    data = seal(b"k" * 16, entry_of())
    assert unseal(b"K" * 16, data) is None
    assert [unseal(b"k" * 16, data[:length]) for length in range(len(data))] == [None] * len(data)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.booleans()), max_size=60))
def test_memory_keeps_the_latest_used_within_its_bounds(steps: list[tuple[int, int, bool]]) -> None:
    store = MemoryStore(max_entries=4, max_bytes=100)
    model: dict[bytes, int] = {}  # in order of use
    for number, size, puts in steps:
        key = bytes([number])
        if puts:
            store.put(key, entry_of(size))
            model.pop(key, None)
            model[key] = size
            while len(model) > 4 or sum(model.values()) > 100:
                del model[next(iter(model))]
        else:
            found = store.get(key, now=5.0)
            assert (found is not None) == (key in model)
            if key in model:
                model[key] = model.pop(key)
        assert (len(store), store.num_bytes) == (len(model), sum(model.values()))
    assert store.get(b"\0", now=10.0) is None
