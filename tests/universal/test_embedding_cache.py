"""Vectors come back bit by bit, to whom they belong, and only what is not there is asked for."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from universal.gated import until
from universal.real_redis import needs_redis, real_redis

from autobot_llm.errors import InvalidRequestError, NotCached, ProviderUnavailable
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import CacheControl, EmbeddingRequest, EmbeddingResponse, Usage
from autobot_llm.universal.embedding_cache import NAME, shares
from autobot_llm.universal.vector_entries import VectorEntry, seal_vector, unseal_vector, vector_entry


class Vectors(ScriptedProvider):
    """Makes of each input a float32 vector of its length and of how many calls there were; charges its length.

    Waits for `go` first, and refuses the text "poison".
    """

    def __init__(self, name: str = "native") -> None:
        super().__init__(name=name, models=("tiny",))
        self.calls: list[EmbeddingRequest] = []
        self.go = asyncio.Event()
        self.go.set()
        self.model = "vectors-1"
        self.num_cancelled = 0
        self.make: Callable[[list[float]], Any] = lambda numbers: array("f", numbers)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        self.calls.append(request)
        number = len(self.calls)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if "poison" in request.inputs:
            raise InvalidRequestError("input: poison", param="input")
        return EmbeddingResponse(
            vectors=tuple(self.make([len(one) / 3, number, -0.0]) for one in request.inputs),
            model=self.model,
            provider=self.name,
            usage=Usage(prompt_tokens=sum(map(len, request.inputs)), completion_tokens=0),
            request_id=request.request_id or "",
        )

    @property
    def inputs(self) -> list[list[str | list[int]]]:
        return [request.inputs for request in self.calls]


@asynccontextmanager
async def asking(folder: Path, **values: Any) -> AsyncIterator[tuple[LLMInterface, Vectors]]:
    provider = Vectors()
    async with LLMInterface(Settings(cache_dir=folder, **values), providers={"native": provider}) as llm:
        yield llm, provider


async def embed(llm: LLMInterface, *inputs: str | list[int], **fields: Any) -> EmbeddingResponse:
    return await llm.embed(EmbeddingRequest(inputs=list(inputs), **fields))


async def test_a_vector_comes_back_bit_by_bit_from_both_levels_and_only_the_rest_is_asked_for(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        made = await embed(llm, "one", "three", [7, 8])
        again = await embed(llm, [7, 8], "four", "one")
        assert provider.inputs == [["one", "three", [7, 8]], ["four"]]
        assert [v.tobytes() for v in again.vectors[::2]] == [made.vectors[2].tobytes(), made.vectors[0].tobytes()]
    async with asking(tmp_path) as (llm, other):
        from_file = await embed(llm, "three", "one")
        assert other.calls == []
        assert [v.tobytes() for v in from_file.vectors] == [made.vectors[1].tobytes(), made.vectors[0].tobytes()]
        figures = llm.get_cache_metrics()
    assert (figures["vectors_num_l2_hits"], figures["vectors_num_misses"]) == (2, 0)


async def test_the_usage_says_what_was_charged_and_what_was_reused(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, _):
        first = await embed(llm, "one", "three")
        partly = await embed(llm, "one", "seven77", "one")
        wholly = await embed(llm, "three")
        reused = llm.get_cache_metrics()["vectors_num_tokens_reused"]
    assert (first.usage.prompt_tokens, first.usage.cached_tokens) == (8, 0)
    assert (partly.usage.prompt_tokens, partly.usage.cached_tokens) == (3 + 7 + 3, 6)
    assert (wholly.usage.prompt_tokens, wholly.usage.cached_tokens) == (5, 5)
    assert reused == 11
    lines = [response.optimizations[-1] for response in (first, partly, wholly)]
    assert [(line.name, line.applied, line.tokens_saved) for line in lines] == [
        (NAME, False, None), (NAME, True, 6), (NAME, True, 5),
    ]  # fmt: skip
    assert lines[1].reason == "2 of 3 vectors were there: 1 kept, 0 made for others, 1 repeated"


@pytest.mark.parametrize(
    "other",
    [{"tenant": "b"}, {"model": "m"}, {"dimensions": 3}, {"extra_body": {"task": "query"}}],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_differs_in_more_than_its_text_shares_no_vector(other: dict[str, Any], tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await embed(llm, "text")
        await embed(llm, "text", **other)
        await embed(llm, "text")
        assert len(provider.calls) == 2


async def test_a_text_and_token_ids_are_not_the_same_input(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await embed(llm, "[1, 2]", [1, 2], [1], [2])
        await embed(llm, "[1,2]", [2, 1], [12])
        assert [len(inputs) for inputs in provider.inputs] == [4, 3]


async def test_equal_inputs_under_way_are_made_once_and_each_gets_its_own_order(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        provider.go.clear()
        tasks = []
        for texts in (["a", "bb"], ["bb", "ccc"], ["ccc", "a"]):
            tasks.append(asyncio.create_task(embed(llm, *texts)))
            await asyncio.sleep(0.05)
        provider.go.set()
        responses = await asyncio.gather(*tasks)
        assert provider.inputs == [["a", "bb"], ["ccc"]]
        assert [[round(v[0] * 3) for v in response.vectors] for response in responses] == [[1, 2], [2, 3], [3, 1]]
        assert [response.usage.cached_tokens for response in responses] == [0, 2, 4]
        assert llm.get_cache_metrics()["vectors_num_joined"] == 3


async def test_who_leaves_disturbs_nobody_and_the_last_one_ends_the_call(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await embed(llm, "warm")
        provider.go.clear()
        first, second = (asyncio.create_task(embed(llm, "text")) for _ in range(2))
        await until(lambda: len(provider.calls) == 2)
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.sleep(0.01)
        assert provider.num_cancelled == 0
        provider.go.set()
        assert len((await second).vectors) == 1
        provider.go.clear()
        alone = asyncio.create_task(embed(llm, "other"))
        await until(lambda: len(provider.calls) == 3)
        alone.cancel()
        await until(lambda: provider.num_cancelled == 1)


async def test_an_error_over_somebody_elses_text_reaches_only_him(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await embed(llm, "warm")
        provider.go.clear()
        wrong = asyncio.create_task(embed(llm, "shared", "poison"))
        await until(lambda: len(provider.calls) == 2)
        right = asyncio.create_task(embed(llm, "shared"))
        await asyncio.sleep(0.02)
        provider.go.set()
        with pytest.raises(InvalidRequestError, match="poison"):
            await wrong
        assert len((await right).vectors) == 1
        assert provider.inputs[2:] == [["shared"]]
        await embed(llm, "shared")
        assert len(provider.calls) == 3


async def test_vectors_of_two_models_never_come_in_one_answer(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await embed(llm, "old")
        provider.model = "vectors-2"  # a new one behind the same name
        response = await embed(llm, "old", "new")
        assert response.model == "vectors-2"
        assert provider.inputs == [["old"], ["new"], ["old"]]
        assert response.usage.cached_tokens == 0
        assert len((await embed(llm, "old", "new")).vectors) == 2
        assert len(provider.calls) == 3


async def test_a_request_says_what_it_wants_of_kept_vectors(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        with pytest.raises(NotCached, match="1 of 1 vectors"):
            await embed(llm, "a", cache=CacheControl(mode="only-if-cached"))
        assert provider.calls == []
        bypassed = await embed(llm, "a", cache=CacheControl(mode="bypass"))
        assert bypassed.optimizations[-1].reason == "the request bypasses it"
        made = await embed(llm, "a")
        assert len(provider.calls) == 2
        refreshed = await embed(llm, "a", cache=CacheControl(mode="refresh"))
        assert len(provider.calls) == 3
        kept = await embed(llm, "a", cache=CacheControl(mode="only-if-cached"))
        assert kept.vectors[0] == refreshed.vectors[0] != made.vectors[0]
        await asyncio.sleep(0.03)
        await embed(llm, "a", cache=CacheControl(max_age=0.01))
        assert len(provider.calls) == 4
        await embed(llm, "short", cache=CacheControl(ttl=0.01))
        await asyncio.sleep(0.03)
        await embed(llm, "short")
        assert len(provider.calls) == 6
        assert all(call.cache is None or call.cache.mode == "bypass" for call in provider.calls)
        with pytest.raises(InvalidRequestError):
            await embed(llm, "a", cache=CacheControl(ttl=-1))


async def test_a_vector_that_its_reader_changes_stays_what_it_was_for_others(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, _):
        for _ in range(2):
            (vector,) = (await embed(llm, "text")).vectors
            assert isinstance(vector, array)
            vector[0] = 99.0
        ((first, *_rest),) = (await embed(llm, "text")).vectors
    assert first != 99.0


async def test_numbers_that_are_no_float32_come_back_as_they_came(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        provider.make = lambda numbers: [0.1, 1e-300, *numbers]
        made = await embed(llm, "text")
        assert (await embed(llm, "text")).vectors == made.vectors == ([0.1, 1e-300, 4 / 3, 1, -0.0],)


async def test_clearing_and_switching_off(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await embed(llm, "a", "b")
        await asyncio.sleep(0.05)  # written behind the answer's back
        assert await llm.clear_cache() == {"l1": 2, "l2": 2}
        await embed(llm, "a")
        assert len(provider.calls) == 2
    async with asking(tmp_path / "off", cache_enabled=False) as (llm, provider):
        await embed(llm, "a")
        response = await embed(llm, "a")
        assert (len(provider.calls), response.optimizations) == (2, ())
    assert not (tmp_path / "off").exists()
    async with asking(tmp_path / "chat only") as (llm, _):
        await llm.chat_completion([{"role": "user", "content": "hi"}])
    assert not list((tmp_path / "chat only").glob("vectors*"))


async def test_memory_is_bounded(tmp_path: Path) -> None:
    async with asking(tmp_path, embedding_cache_size=3) as (llm, _):
        await embed(llm, *map(str, range(10)))
        assert llm.get_cache_metrics()["vectors_l1_entries"] == 3


@needs_redis
async def test_redis_keeps_vectors_for_other_hosts_and_a_dead_one_costs_nothing(tmp_path: Path) -> None:
    async with real_redis() as redis:
        async with asking(tmp_path / "a", redis_url=redis.url) as (llm, _):
            made = await embed(llm, "one", "two")
        async with asking(tmp_path / "b", redis_url=redis.url) as (llm, provider):
            assert (await embed(llm, "two", "one")).vectors == made.vectors[::-1]
            assert provider.calls == []
        url = redis.url
    async with asking(tmp_path / "c", redis_url=url) as (llm, provider):
        await embed(llm, "one")
        await embed(llm, "one")
        assert len(provider.calls) == 1
        with pytest.raises(ProviderUnavailable, match="cannot be cleared"):
            await llm.clear_cache()


@given(
    st.lists(st.floats(width=32, allow_nan=True)), st.text(), st.integers(0, 2**40), st.binary(min_size=1, max_size=64)
)
def test_a_sealed_vector_is_believed_under_its_own_key_only(
    numbers: list[float], model: str, length: int, key: bytes
) -> None:
    entry = vector_entry(array("f", numbers), model=model, num_tokens=length, created=1.0, expires=2.0)
    try:
        data = seal_vector(key, entry)
    except UnicodeEncodeError:
        return
    again = unseal_vector(key, data)
    assert isinstance(again, VectorEntry)
    assert (again.data, again.model, again.num_tokens) == (array("f", numbers).tobytes(), model, length)
    assert unseal_vector(key + b"x" if len(key) < 64 else key[1:], data) is None
    assert unseal_vector(key, data[:-1]) is None
    assert unseal_vector(key, data[:20] + bytes([data[20] ^ 1]) + data[21:]) is None


@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_shares_of_a_calls_tokens_add_up_to_them(num_tokens: int, lengths: list[int]) -> None:
    parts = shares(num_tokens, lengths)
    assert sum(parts) == num_tokens
    assert len(parts) == len(lengths) and min(parts) >= 0
