"""A kept answer to the same question in other words: only where all else is equal, and never unmarked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from universal.embedding_providers import EmbeddingProvider

from autobot_llm.errors import NotCached, ProviderUnavailable
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import (
    CacheControl,
    ChatMessage,
    ChoiceEnd,
    Event,
    Finish,
    LLMRequest,
    LLMResponse,
    Start,
    TextDelta,
    Usage,
)
from autobot_llm.universal.request_key import AnswerKeys
from autobot_llm.universal.semantic.cache import NAME, PATIENCE
from autobot_llm.universal.semantic.questions import Question, Questions, Vector

FIRST = "How do I reset my password?"
OTHER = "Could you tell me how to reset my password?"
THIRD = "how can I reset my password"


@asynccontextmanager
async def asking(
    folder: Path, provider: EmbeddingProvider | None = None, *, threshold: float | None = 0.95, **values: Any
) -> AsyncIterator[tuple[LLMInterface, EmbeddingProvider]]:
    provider = provider or EmbeddingProvider()
    settings = Settings(cache_dir=folder, semantic_cache_threshold=threshold, **values)
    async with LLMInterface(settings, providers={provider.name: provider}) as llm:
        yield llm, provider


def turns(*texts: str) -> list[ChatMessage]:
    roles = ("user", "assistant")
    return [ChatMessage(role=roles[place % 2], content=text) for place, text in enumerate(texts)]


async def ask(llm: LLMInterface, *texts: str, **fields: Any) -> LLMResponse:
    return await llm.chat_completion(LLMRequest(**{"messages": turns(*texts), "temperature": 0} | fields))


def line_of(response: LLMResponse) -> OptimizationOutcome:
    (line,) = [line for line in response.optimizations if line.name == NAME]
    return line


async def test_it_is_off_unless_the_settings_give_a_threshold(tmp_path: Path) -> None:
    async with asking(tmp_path, threshold=None) as (llm, provider):
        await ask(llm, FIRST)
        answer = await ask(llm, OTHER)
        assert (len(provider.requests), provider.embedded) == (2, [])
        assert all(line.name != NAME for line in answer.optimizations)


async def test_the_same_question_in_other_words_gets_the_kept_answer_marked_as_such(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        provider.vectors = {FIRST: [3.0, 4.0], OTHER: [3.1, 3.9]}
        made = await ask(llm, FIRST)
        assert line_of(made).reason == "no kept question means the same"
        assert provider.embedded == []  # who finds nothing waits for nobody
        again = await ask(llm, OTHER, request_id="other")
        assert len(provider.requests) == 1
        figures = llm.get_cache_metrics()
    line = line_of(again)
    assert (again.content, again.usage, again.cached, again.request_id) == (made.content, made.usage, True, "other")
    assert line.applied and line.lossy
    assert line.matched_question == FIRST
    assert line.similarity == pytest.approx(24.9 / 5 / 24.82**0.5)
    assert "0.9996" in line.reason
    assert line.tokens_saved == made.usage.total_tokens
    assert (figures["semantic_num_hits"], figures["semantic_num_misses"], figures["semantic_num_questions"]) == (
        1,
        1,
        1,
    )
    assert figures["num_l1_hits"] == 0  # of the exact cache


async def test_an_answer_to_another_question_is_never_kept_as_this_ones(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, _):
        await ask(llm, FIRST)
        for _ in range(2):
            assert line_of(await ask(llm, OTHER)).lossy  # the second time too, not as an exact hit
        assert llm.get_cache_metrics()["l1_entries"] == 1
        exact = await ask(llm, FIRST)
        assert [line.name for line in exact.optimizations if line.applied] == ["response_caching"]


async def test_less_than_the_threshold_is_no_hit_and_says_how_much_it_was(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        provider.vectors = {FIRST: [1.0, 0.0], OTHER: [0.9, 0.43589]}
        await ask(llm, FIRST)
        line = line_of(await ask(llm, OTHER))
        assert not line.applied
        assert line.reason == "the nearest kept question has a similarity of 0.9000, less than 0.95"
        assert len(provider.requests) == 2
        provider.vectors[THIRD] = [0.91, 0.42]
        assert line_of(await ask(llm, THIRD)).matched_question == OTHER  # the nearer of the two
        assert provider.embedded[-1] == [THIRD]  # what was embedded before is not again


async def test_a_question_with_another_meaning_is_not_even_compared(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        for text in ("delete user 12", "delete user 13", "do not delete user 12", "Delete User 12"):
            await ask(llm, text)
        assert (len(provider.requests), provider.embedded) == (4, [])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields",
    [{"tenant": "b"}, {"model": "other"}, {"max_tokens": 5}, {"temperature": 0.0, "seed": 3}, {"top_p": 0.5},
     {"tools": [TOOL]}, {"response_format": SCHEMA}, {"stop": ["x"]}, {"n": 2}, {"logprobs": 1},
     {"presence_penalty": 0.5}, {"extra_body": {"x": 1}}, {"logit_bias": {1: 1.0}},
     {"messages": [ChatMessage(role="system", content="Be brief."), *turns(OTHER)]},
     {"messages": turns("Hello", "Hi", OTHER)},
     {"messages": [ChatMessage(role="user", content=OTHER, name="bob")]},
     {"messages": [ChatMessage(role="user", content=[{"type": "text", "text": OTHER}])]}],
    ids=lambda fields: ",".join(fields),
)  # fmt: skip
async def test_everything_but_the_last_turns_text_must_be_equal(fields: dict[str, Any], tmp_path: Path) -> None:
    provider = EmbeddingProvider(models=("tiny", "other"))
    async with asking(tmp_path, provider) as (llm, _):
        await ask(llm, FIRST)
        answer = await ask(llm, OTHER, **fields)
        assert (len(provider.requests), answer.cached) == (2, False)


async def test_a_conversation_before_and_an_image_beside_it_are_no_hindrance_if_they_are_equal(tmp_path: Path) -> None:
    def with_image(text: str, url: str) -> list[ChatMessage]:
        image = {"type": "image_url", "image_url": {"url": url}}
        return [ChatMessage(role="user", content=[image, {"type": "text", "text": text}])]

    async with asking(tmp_path) as (llm, provider):
        await ask(llm, "Hello", "Hi", FIRST)
        assert (await ask(llm, "Hello", "Hi", OTHER)).cached
        await ask(llm, messages=with_image(FIRST, "http://a/1"))
        assert (await ask(llm, messages=with_image(OTHER, "http://a/1"))).cached
        assert not (await ask(llm, messages=with_image(OTHER, "http://a/2"))).cached
        assert len(provider.requests) == 3


@pytest.mark.parametrize(
    "messages",
    [[*turns(FIRST), ChatMessage(role="assistant", content="Well,")],
     [*turns(FIRST, "", ""), ChatMessage(role="tool", content="ok", tool_call_id="1")],
     [ChatMessage(role="user", content=[{"type": "text", "text": FIRST}, {"type": "text", "text": OTHER}])],
     [ChatMessage(role="user", content="x" * 3000)]],
)  # fmt: skip
async def test_a_last_turn_that_is_no_short_text_of_a_user_is_left_alone(
    messages: list[ChatMessage], tmp_path: Path
) -> None:
    async with asking(tmp_path) as (llm, _):
        line = line_of(await ask(llm, messages=messages))
        assert "the last turn is not the text of a user" in line.reason


async def test_one_tenants_questions_are_neither_hit_nor_shown_nor_embedded_for_another(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST, tenant="a")
        for text in (FIRST, OTHER):
            answer = await ask(llm, text, tenant="b")
            assert "matched" not in str(line_of(answer).reason) and line_of(answer).matched_question in (None, FIRST)
        assert len(provider.requests) == 2  # the second of b's questions was answered with b's own first
        await ask(llm, THIRD, tenant="b")
        assert provider.tenants and set(provider.tenants) == {"b"}


async def test_only_what_the_exact_cache_would_keep_is_given_again(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        for text in (FIRST, OTHER):
            line = line_of(await ask(llm, text, temperature=0.7))
            assert line.reason == "the answer is drawn at random, or does more than answer"
        await ask(llm, FIRST, temperature=0.7, cache=CacheControl())
        assert (await ask(llm, OTHER, temperature=0.7, cache=CacheControl())).cached
        assert len(provider.requests) == 3


async def test_errors_cut_streams_and_fallbacks_are_not_kept(tmp_path: Path) -> None:
    for script in (
        ["a", ProviderUnavailable("gone")],
        [
            "a",
            ChoiceEnd(finish_reason="stop"),
            Finish(usage=Usage(prompt_tokens=1, completion_tokens=1), fallback_used=True),
        ],
    ):
        async with asking(tmp_path / str(len(script)), EmbeddingProvider(script)) as (llm, provider):
            for text in (FIRST, OTHER):
                try:
                    assert not (await ask(llm, text)).cached
                except ProviderUnavailable:
                    continue
            assert len(provider.requests) == 2


async def test_a_request_can_decline_refresh_and_bypass(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST)
        for control in (CacheControl(semantic=False), CacheControl(mode="bypass"), CacheControl(mode="refresh")):
            provider.requests.clear()
            assert not (await ask(llm, OTHER, cache=control)).cached
            assert len(provider.requests) == 1
        with pytest.raises(NotCached):
            await ask(llm, THIRD, cache=CacheControl(mode="only-if-cached"))
        assert (await ask(llm, THIRD, cache=CacheControl())).cached
        assert not (await ask(llm, "how do I reset my password.", cache=CacheControl(max_age=0))).cached


async def test_an_answer_that_expired_or_was_cleared_is_gone(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST, cache=CacheControl(ttl=0.05))
        await asyncio.sleep(0.1)
        line = line_of(await ask(llm, OTHER))
        assert line.reason == "a question that means the same has no kept answer any more"
        assert (await ask(llm, THIRD)).cached
        await asyncio.sleep(0.05)
        await llm.clear_cache()
        assert llm.get_cache_metrics()["semantic_num_questions"] == 0
        assert not (await ask(llm, THIRD)).cached
        assert len(provider.requests) == 3


async def test_a_stream_comes_again_in_its_pieces_and_is_marked_from_its_start(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, _):

        async def events(text: str) -> list[Event]:
            request = LLMRequest(messages=turns(text), temperature=0, stream=True, request_id="r")
            async with aclosing(llm.events(request)) as stream:
                return [event async for event in stream]

        made, again = await events(FIRST), await events(OTHER)
    assert [event.text for event in again if isinstance(event, TextDelta)] == ["the ", "answer"]
    assert [type(event) for event in made] == [type(event) for event in again]
    start = again[0]
    assert isinstance(start, Start) and start.reused is not None and start.reused.matched_question == FIRST
    assert isinstance(made[0], Start) and made[0].reused is None


async def test_embeddings_that_fail_are_left_out_with_one_warning_until_they_are_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autobot_llm.cache")
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST)
        provider.failure = ProviderUnavailable("no embeddings today")
        for number in range(5):
            line = line_of(
                await ask(llm, f"how can I reset my password{'.' * number}", cache=CacheControl(mode="default"))
            )
            assert line.reason == "there were no vectors to compare questions by"
        assert len(provider.embedded) == 1
        provider.failure = None
        await asyncio.sleep(1.1)
        assert (await ask(llm, OTHER)).cached
    said = [record.getMessage() for record in caplog.records if "semantic" in record.getMessage()]
    assert len(said) == 2
    assert "no embeddings today" in said[0] and "AUTOBOT_EMBEDDING_MODEL" in said[0]
    assert "is back" in said[1]


async def test_embeddings_that_are_slow_cost_a_bounded_time_and_then_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST)
        provider.patience = 30
        began = time.perf_counter()
        assert not (await ask(llm, OTHER)).cached
        assert time.perf_counter() - began < PATIENCE + 1
        began = time.perf_counter()
        assert not (await ask(llm, THIRD)).cached
        assert time.perf_counter() - began < PATIENCE / 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]


class SlowStarter(EmbeddingProvider):
    async def start(self) -> None:
        await asyncio.sleep(PATIENCE + 0.3)
        await super().start()


async def test_a_provider_that_is_slow_to_start_is_not_given_up_with_the_first_request(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path, semantic_cache_threshold=0.9, models={"embedding": "slow/tiny"})
    answering, slow = EmbeddingProvider(), SlowStarter(name="slow")
    async with LLMInterface(settings, providers={"native": answering, "slow": slow}) as llm:
        await ask(llm, FIRST)
        assert not (await ask(llm, OTHER)).cached
        await asyncio.sleep(1.1)
        assert (await ask(llm, THIRD)).cached
        assert answering.embedded == []


async def test_embeddings_under_way_end_with_the_interface(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST)
        provider.patience = 60
        assert not (await ask(llm, OTHER)).cached
        began = time.perf_counter()
    assert time.perf_counter() - began < 5


async def test_a_provider_without_embeddings_says_which_setting_helps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(cache_dir=tmp_path, semantic_cache_threshold=0.9)
    async with LLMInterface(settings, providers={"native": ScriptedProvider(name="native")}) as llm:
        await ask(llm, FIRST)
        assert not (await ask(llm, OTHER)).cached
    (record,) = caplog.records
    assert "makes no embeddings" in record.getMessage() and "AUTOBOT_EMBEDDING_MODEL" in record.getMessage()


async def test_vectors_of_two_models_are_never_compared(tmp_path: Path) -> None:
    async with asking(tmp_path) as (llm, provider):
        await ask(llm, FIRST)
        assert (await ask(llm, OTHER)).cached
        provider.model = "vectors-2"
        await llm.clear_cache(l1=False)  # the vectors' own cache keeps FIRST's in memory
        line = line_of(await ask(llm, THIRD))
        assert line.reason == "there were no vectors to compare questions by"
        assert (await ask(llm, "How can I reset my password?")).cached  # FIRST was embedded anew


async def test_without_kept_answers_the_threshold_has_no_effect_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(tmp_path, cache_enabled=False) as (llm, provider):
        for text in (FIRST, OTHER):
            await ask(llm, text)
        assert len(provider.requests) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "AUTOBOT_SEMANTIC_CACHE_THRESHOLD has no effect: AUTOBOT_CACHE_ENABLED is false"
    ]


def test_what_is_remembered_is_bounded_and_the_least_recently_used_goes_first() -> None:
    questions = Questions(max_partitions=2, max_meanings=3, max_questions=4)
    for number in range(5):
        questions.keep(b"a", (str(number),), Question(str(number), b""))
    assert questions.num_questions == 3
    assert questions.alike(b"a", ("2",))
    questions.keep(b"b", ("x",), Question("x", b""))
    questions.keep(b"b", ("y",), Question("y", b""))
    assert questions.num_questions == 4
    assert [bool(questions.alike(b"a", (str(number),))) for number in range(5)] == [False, False, True, False, True]
    questions.keep(b"c", ("z",), Question("z", b""))
    assert questions.num_questions == 3 or questions.num_questions == 4
    for number in range(100):
        questions.keep(b"c", ("z",), Question(str(number), b""))
    assert questions.num_questions <= 4 + 32


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8))
def test_a_vector_has_a_similarity_of_one_to_itself_and_none_to_another_models(numbers: list[float]) -> None:
    vector = Vector.of(numbers, provider="p", model="m")
    if vector is None:
        return
    assert vector.similarity(vector) == pytest.approx(1.0)
    other = Vector.of(numbers, provider="p", model="n")
    assert other is not None and vector.similarity(other) is None


@pytest.mark.parametrize("numbers", [[], [0.0], [float("nan"), 1.0], [float("inf")]])
def test_a_vector_without_a_direction_is_similar_to_nothing(numbers: Sequence[float]) -> None:
    assert Vector.of(numbers, provider="p", model="m") is None


TEXT = st.text(max_size=20)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.none() | st.text(min_size=1, max_size=5),
    "temperature": st.floats(0, 2),
    "seed": st.none() | st.integers(0, 9),
    "max_tokens": st.none() | st.integers(1, 9),
    "tenant": st.text(max_size=3),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=2),
    "tools": st.none() | st.just([TOOL]),
    "response_format": st.none() | st.just(SCHEMA),
    "tool_choice": st.none() | st.just("required"),
    "extra_body": st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
}
HISTORY = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=3)


@given(st.fixed_dictionaries(FIELDS), st.fixed_dictionaries(FIELDS), HISTORY, HISTORY, TEXT, TEXT)
def test_two_requests_are_of_one_partition_exactly_where_all_but_the_last_text_is_equal(
    one: dict[str, Any],
    two: dict[str, Any],
    history: list[tuple[Any, str]],
    other_history: list[tuple[Any, str]],
    text: str,
    other_text: str,
) -> None:
    keys = AnswerKeys(Settings(), ScriptedProvider(name="native"))

    def parted(fields: dict[str, Any], before: list[tuple[Any, str]], last: str) -> tuple[bytes, str]:
        messages = [ChatMessage(role=role, content=content) for role, content in before]
        found = keys.partition(LLMRequest(messages=[*messages, ChatMessage(role="user", content=last)], **fields))
        assert found is not None
        return found

    same, changed = parted(one, history, text), parted(one, history, other_text)
    assert (same[0], same[1], changed[1]) == (changed[0], text, other_text)
    assert (parted(two, other_history, text)[0] == same[0]) == (one == two and history == other_history)
    for name in FIELDS:
        mixed = one | {name: two[name]}
        assert (parted(mixed, history, text)[0] == same[0]) == (mixed == one)


def test_the_line_of_the_report_can_be_written_and_read_again() -> None:
    line = OptimizationOutcome(name=NAME, applied=True, reason="r", lossy=True, similarity=0.5, matched_question="q")
    assert msgspec.json.decode(msgspec.json.encode(line), type=OptimizationOutcome) == line
