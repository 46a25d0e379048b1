"""The interface: five ways to ask, one path, and every stream closed whatever happens."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm import LLMInterface, Settings
from autobot_llm.collect import collect
from autobot_llm.deadline import Deadline
from autobot_llm.errors import (
    ConfigurationError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    NotCached,
    OverloadedError,
    ProviderError,
    ProviderUnavailable,
    RequestTimeout,
)
from autobot_llm.providers.base import ModelInfo
from autobot_llm.providers.scripted import Line, ScriptedProvider
from autobot_llm.types import (
    ChatMessage,
    ChoiceEnd,
    Event,
    Finish,
    LLMRequest,
    Start,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

HELLO = [{"role": "user", "content": "hello there"}]


def scripted(*script: Line, **options: Any) -> ScriptedProvider:
    return ScriptedProvider(script or ("Good ", "day"), **{"name": "native", "models": ("tiny", "big"), **options})


def interface(provider: ScriptedProvider | None = None, **settings: Any) -> LLMInterface:
    return LLMInterface(Settings(**settings), providers={"native": provider or scripted()})


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it did not happen within 5 seconds")


# The five call shapes


async def test_dict_messages_with_a_type_get_the_model_of_that_type() -> None:
    provider = scripted()
    async with interface(provider, models={"rag": "big"}) as llm:
        for llm_type, model in (("chat", "tiny"), ("rag", "big"), ("anything at all", "tiny")):
            response = await llm.chat_completion(HELLO, llm_type=llm_type)
            assert (response.content, response.model) == ("Good day", model)
    assert [request.llm_type for request in provider.requests] == ["chat", "rag", "anything at all"]


async def test_messages_alone_give_the_content() -> None:
    async with interface() as llm:
        assert (await llm.chat_completion(HELLO)).content == "Good day"


async def test_an_answer_reads_as_a_mapping() -> None:
    async with interface() as llm:
        response = await llm.chat_completion(model="big", messages=HELLO)
        assert response.get("content") == response["content"] == "Good day"
        assert response["model"] == "big"


async def test_one_request_object_is_enough_and_options_replace_its_fields() -> None:
    provider = scripted()
    async with interface(provider) as llm:
        request = LLMRequest(messages=[ChatMessage("user", "hi")], temperature=0.5, llm_type="task", stop=["x"])
        await llm.chat_completion(request)
        await llm.chat_completion(request, temperature=0.25, model="big")
    first, second = provider.requests
    assert (first.temperature, first.llm_type, first.model, first.stop) == (0.5, "task", None, ["x"])
    assert (second.temperature, second.llm_type, second.model, second.stop) == (0.25, "task", "big", ["x"])


async def test_a_list_of_chat_messages_is_taken_as_it_is() -> None:
    provider = scripted()
    async with interface(provider) as llm:
        await llm.chat_completion([ChatMessage("system", "Be brief."), ChatMessage("user", "hi")])
    assert [message.role for message in provider.requests[0].messages or []] == ["system", "user"]


async def test_a_prompt_becomes_one_user_message() -> None:
    provider = scripted()
    async with interface(provider) as llm:
        assert (await llm.generate_response("hi", max_tokens=3, llm_type="task")).content == "Good day"
    (request,) = provider.requests
    assert (request.messages, request.max_tokens, request.llm_type) == ([ChatMessage("user", "hi")], 3, "task")


async def test_text_or_tokens_to_continue_are_given_as_prompt() -> None:
    provider = scripted()
    async with interface(provider) as llm:
        await llm.chat_completion(prompt="Once upon")
        await llm.chat_completion(prompt=[1, 2, 3], stop="\n")
    assert [request.prompt for request in provider.requests] == ["Once upon", [1, 2, 3]]
    assert provider.requests[1].stop == ["\n"]


# One path


async def test_the_stream_and_the_answer_are_the_same_events() -> None:
    async with interface() as llm:
        events = [event async for event in llm.stream(HELLO, request_id="one")]
        assert events[:-1] == [
            Start(request_id="one", model="tiny", provider="native"),
            TextDelta("Good "),
            TextDelta("day"),
            ChoiceEnd(finish_reason="stop"),
        ]
        finish = events[-1]
        assert isinstance(finish, Finish)
        assert finish.usage == Usage(prompt_tokens=2, completion_tokens=2)
        response = await llm.chat_completion(HELLO, request_id="one")
    assert response.content == "".join(event.text for event in events if isinstance(event, TextDelta))
    assert (response.usage, response.request_id) == (Usage(prompt_tokens=2, completion_tokens=2), "one")


async def test_events_arrive_one_by_one_as_the_provider_makes_them() -> None:
    async with interface(scripted("a", "b", delay=0.02)) as llm, aclosing(llm.stream(HELLO)) as events:
        assert isinstance(await anext(events), Start)
        assert await anext(events) == TextDelta("a")
        (running,) = [figures["num_in_flight"] for name, figures in llm.get_metrics().items() if name == "interface"]
        assert running == 1


async def test_every_request_gets_an_id_of_its_own() -> None:
    async with interface() as llm:
        responses = await asyncio.gather(*(llm.chat_completion(HELLO) for _ in range(20)))
    assert len({response.request_id for response in responses}) == 20


async def test_times_are_measured_at_the_interface() -> None:
    async with interface(scripted("a", "b", delay=0.02)) as llm:
        response = await llm.chat_completion(HELLO)
    assert response.time_to_first_token is not None
    assert 0.015 < response.time_to_first_token < response.processing_time < 5


@given(st.lists(st.tuples(st.integers(0, 3), st.text()), min_size=1))
def test_collecting_joins_each_choice_and_loses_nothing(pieces: list[tuple[int, str]]) -> None:
    async def events() -> AsyncGenerator[Event, None]:
        yield Start(request_id="r", model="m", provider="p")
        for index, text in pieces:
            yield TextDelta(text, index, (TokenLogprob(1, text, -0.5),))
        for index in {index for index, _ in pieces}:
            yield ChoiceEnd(finish_reason="length", index=index)
        yield Finish(usage=Usage(prompt_tokens=1, completion_tokens=len(pieces)))

    response = asyncio.run(collect(events()))
    for choice in response.choices:
        texts = [text for index, text in pieces if index == choice.index]
        assert choice.content == "".join(texts)
        assert [logprob.token for logprob in choice.logprobs] == texts
    assert [choice.index for choice in response.choices] == sorted({index for index, _ in pieces})
    assert response.content == response.choices[0].content


async def test_pieces_of_tool_calls_are_joined_by_position() -> None:
    provider = scripted(
        ToolCallDelta(position=0, call_id="a", name="weather", arguments='{"city":'),
        ToolCallDelta(position=1, call_id="b", name="time"),
        ToolCallDelta(position=0, arguments='"Oslo"}'),
        ToolCallDelta(position=1, arguments="{}"),
        ChoiceEnd(finish_reason="tool_calls"),
    )
    tools = [{"type": "function", "function": {"name": "weather"}}]
    async with interface(provider) as llm:
        response = await llm.chat_completion(HELLO, tools=tools, tool_choice="auto")
    assert response.finish_reason == "tool_calls"
    assert response.tool_calls == (
        ToolCall(id="a", name="weather", arguments='{"city":"Oslo"}'),
        ToolCall(id="b", name="time", arguments="{}"),
    )


# Failures


async def test_an_answer_that_is_cut_short_is_an_error_and_never_an_answer() -> None:
    async with interface(scripted("half an ans", complete=False)) as llm:
        with pytest.raises(ProviderError, match="cut short"):
            await llm.chat_completion(HELLO)
        with pytest.raises(ProviderError, match="cut short"):
            async for _ in llm.stream(HELLO):
                pass


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ([Finish(usage=Usage(prompt_tokens=1, completion_tokens=1))], "had not started"),
        (["a", Finish(usage=Usage(prompt_tokens=1, completion_tokens=1))], "without ending choice 0"),
        ([ToolCallDelta(position=0, name="f"), ChoiceEnd(finish_reason="tool_calls")], "without an id or a name"),
    ],
)
async def test_an_answer_that_breaks_the_order_of_events_is_refused(script: list[Line], complaint: str) -> None:
    async with interface(scripted(*script)) as llm:
        with pytest.raises(ProviderError, match=complaint):
            await llm.chat_completion(HELLO)


async def test_an_error_in_the_middle_reaches_the_caller_after_what_came_before() -> None:
    provider = scripted("a", OverloadedError("full", retry_after=2))
    seen: list[Event] = []
    async with interface(provider) as llm:
        with pytest.raises(OverloadedError, match="full"):
            async for event in llm.stream(HELLO):
                seen.append(event)  # noqa: PERF401  # what came before the error must be kept
        assert llm.get_metrics()["interface"]["num_failed"] == 1
    assert seen[1:] == [TextDelta("a")]
    assert (provider.num_open_streams, provider.num_closed_streams) == (0, 1)


async def test_closing_a_stream_closes_it_at_the_provider() -> None:
    provider = scripted("a", "b", "c")
    async with interface(provider) as llm:
        events = llm.stream(HELLO)
        await anext(events)
        assert provider.num_open_streams == 1
        await events.aclose()
        assert (provider.num_open_streams, provider.num_closed_streams) == (0, 1)
        figures = llm.get_metrics()["interface"]
    assert (figures["num_cancelled"], figures["num_in_flight"]) == (1, 0)


async def test_cancelling_the_task_closes_the_stream_at_the_provider() -> None:
    provider = scripted("a", delay=60)
    async with interface(provider) as llm:
        task = asyncio.create_task(llm.chat_completion(HELLO))
        await until(lambda: provider.num_open_streams == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert provider.num_open_streams == 0
        assert llm.get_metrics()["interface"]["num_cancelled"] == 1


async def test_a_finished_answer_leaves_no_stream_open() -> None:
    provider = scripted()
    async with interface(provider) as llm:
        await llm.chat_completion(HELLO)
        assert (provider.num_open_streams, provider.num_closed_streams) == (0, 1)


@pytest.mark.parametrize("where", ["request", "settings"])
async def test_the_timeout_covers_the_whole_stream_and_cancels_it_upstream(where: str) -> None:
    provider = scripted("a", *["b"] * 1000, delay=0.01)
    settings: dict[str, Any] = {"timeout": 0.05} if where == "settings" else {}
    asked: dict[str, Any] = {"timeout": 0.05} if where == "request" else {}
    async with interface(provider, **settings) as llm:
        with pytest.raises(RequestTimeout, match=r"timeout of 0\.05 s"):
            await llm.chat_completion(HELLO, **asked)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
    assert provider.num_open_streams == 0


async def test_the_timeout_never_cancels_what_the_reader_does_between_events() -> None:
    provider = scripted("a", "b")
    async with interface(provider) as llm:
        events = llm.stream(HELLO, timeout=0.02)
        await anext(events)
        await asyncio.sleep(0.05)  # would raise CancelledError if the deadline reached into the reader
        with pytest.raises(RequestTimeout):
            await anext(events)
    assert provider.num_open_streams == 0


async def test_a_complete_answer_is_kept_even_if_the_deadline_passes_while_it_is_read() -> None:
    async with interface() as llm:
        events = [event async for event in slowly(llm.stream(HELLO, timeout=0.05), Finish)]
    assert isinstance(events[-1], Finish)


async def slowly(events: AsyncGenerator[Event, None], kind: type) -> AsyncGenerator[Event, None]:
    async for event in events:
        if isinstance(event, kind):
            await asyncio.sleep(0.1)
        yield event


async def test_a_cancellation_from_outside_is_not_taken_for_a_timeout() -> None:
    async with interface(scripted("a", delay=60)) as llm:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await llm.chat_completion(HELLO, timeout=30)


async def test_a_provider_that_fails_while_it_is_timed_out_leaves_no_cancellation_behind() -> None:
    class Clumsy(ScriptedProvider):
        async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
            try:
                async for event in super().stream(request):
                    yield event
            except asyncio.CancelledError as exc:
                raise ProviderError("cancelled, and it failed too") from exc

    async with interface(Clumsy(["a"], name="native", delay=60)) as llm:
        with pytest.raises(RequestTimeout) as timeout:
            await llm.chat_completion(HELLO, timeout=0.02)
        assert isinstance(timeout.value.__cause__, ProviderError)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def test_a_cancellation_in_the_same_moment_as_the_timeout_still_cancels() -> None:
    async def wait() -> None:
        with Deadline(0.01):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.02, task.cancel)
    time.sleep(0.05)  # noqa: ASYNC251  # both timers are due when the loop runs again, the deadline's first
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def test_no_timeout_means_no_timeout() -> None:
    async with interface(scripted("a", delay=0.02), timeout=None) as llm:
        assert (await llm.chat_completion(HELLO)).content == "a"


# Bad requests


@pytest.mark.parametrize(
    ("options", "param", "complaint"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"zzz": 1}, "zzz", "expected one of "),
        ({"temperature": "hot"}, "temperature", "got `str`"),
        ({"temperature": -0.1}, "temperature", "a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature", "a number from 0 to 100"),
        ({"temperature": math.inf}, "temperature", "a number from 0 to 100"),
        ({"top_p": 0}, "top_p", "above 0, at most 1"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"min_p": 1.1}, "min_p", "from 0 to 1"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"n": 129}, "n", "from 1 to 128"),
        ({"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", r"at most max_tokens \(2\)"),
        ({"min_tokens": -1}, "min_tokens", "at least 0"),
        ({"priority": 2**31}, "priority", "from -2.14748e\\+09 to 2.14748e\\+09"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"seed": 2**64}, "seed", "an integer from"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "at least 0"),
        ({"logit_bias": {1: 101}}, "logit_bias", "from -100 to 100 for token 1"),
        ({"logit_bias": {-1: 1}}, "logit_bias", "as keys"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "generate_response"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role", "user, assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "text or content parts"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
        ({"messages": [ChatMessage("usr", "x")]}, "messages[0].role", "user, assistant"),  # type: ignore[arg-type]
        ({"prompt": "x"}, "prompt", "both given"),
        ({"messages": None}, "messages", "neither"),
        ({"messages": None, "prompt": ""}, "prompt", "not empty"),
        ({"messages": None, "prompt": []}, "prompt", "not empty"),
        ({"messages": None, "prompt": [-1]}, "prompt", "token ids"),
        ({"tool_choice": "auto"}, "tool_choice", "without tools"),
        ({"tool_choice": "maybe", "tools": [{}]}, "tool_choice", "none, auto, required"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"request_id": "a\nb"}, "request_id", "printable"),
        ({"request_id": ""}, "request_id", "printable"),
        ({"model": ""}, "model", "not empty"),
    ],
)
async def test_a_bad_request_names_the_field_and_what_is_accepted(
    options: dict[str, Any], param: str, complaint: str
) -> None:
    provider = scripted()
    async with interface(provider) as llm:
        with pytest.raises(InvalidRequestError, match=complaint) as refusal:
            await llm.chat_completion(**{"messages": HELLO, **options})
    assert refusal.value.param == param
    assert provider.requests == []


@given(
    st.builds(
        LLMRequest,
        messages=st.just([ChatMessage("user", "x")]),
        **{
            field: st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))
            for field in ("temperature", "top_k", "n", "max_tokens", "stop", "stop_token_ids", "logit_bias", "seed")
        },
    )
)
def test_values_of_any_type_are_accepted_or_refused_and_never_crash(request_: LLMRequest) -> None:
    async def ask() -> None:
        async with interface() as llm:
            try:
                await llm.chat_completion(request_)
            except InvalidRequestError as exc:
                assert exc.param

    asyncio.run(ask())


async def test_an_unknown_model_or_provider_is_refused_with_the_known_ones() -> None:
    async with interface() as llm:
        with pytest.raises(ModelNotFoundError, match="'huge' is not served here; served are tiny, big"):
            await llm.chat_completion(HELLO, model="huge")
        with pytest.raises(ModelNotFoundError, match="no provider is called 'x'; known are native"):
            await llm.chat_completion(HELLO, provider="x")


async def test_a_provider_that_cannot_be_used_is_not_found_unless_it_is_the_default() -> None:
    llm = LLMInterface(Settings(provider="openai"))
    with pytest.raises(ConfigurationError, match="'openai' needs a key: set OPENAI_API_KEY"):
        await llm.initialize()
    with pytest.raises(ModelNotFoundError, match=r"'anthropic' cannot be used: .*needs a key"):
        await llm.chat_completion(HELLO, provider="anthropic")
    await llm.aclose()


# Life


async def test_a_prefix_or_an_option_chooses_the_provider() -> None:
    providers = {name: ScriptedProvider([name], name=name, models=("m",)) for name in ("native", "other")}
    async with LLMInterface(Settings(), providers=providers) as llm:
        assert (await llm.chat_completion(HELLO)).provider == "native"
        assert (await llm.chat_completion(HELLO, model="other/m")).content == "other"
        assert (await llm.chat_completion(HELLO, provider="other")).content == "other"
        assert (await llm.chat_completion(HELLO, provider="other", model="m")).content == "other"


async def test_switching_makes_another_provider_the_default() -> None:
    providers = {name: ScriptedProvider([name], name=name) for name in ("native", "other")}
    async with LLMInterface(Settings(), providers=providers) as llm:
        await llm.switch_provider("other")
        assert (llm.default_provider, (await llm.chat_completion(HELLO)).content) == ("other", "other")
        with pytest.raises(ModelNotFoundError, match="known are native, other"):
            await llm.switch_provider("third")
        assert llm.default_provider == "other"


async def test_the_first_given_provider_answers_where_the_settings_name_another() -> None:
    async with LLMInterface(Settings(), providers={"mine": ScriptedProvider(["x"], name="mine")}) as llm:
        assert (await llm.chat_completion(HELLO)).provider == "mine"
    with pytest.raises(ConfigurationError, match="at least one"):
        LLMInterface(Settings(), providers={})


async def test_models_status_and_metrics_are_those_of_the_providers_in_use() -> None:
    provider = scripted()
    llm = interface(provider)
    assert llm.get_all_provider_status()["native"].state == "stopped"
    async with llm:
        assert await llm.get_available_models() == [
            ModelInfo(id="tiny", provider="native"),
            ModelInfo(id="big", provider="native"),
        ]
        assert llm.get_all_provider_status()["native"].state == "ready"
        await llm.chat_completion(HELLO)
        metrics = llm.get_metrics()
    assert provider.metrics().items() <= metrics["native"].items()
    assert metrics["interface"] == {
        "num_requests": 1,
        "num_in_flight": 0,
        "num_completed": 1,
        "num_failed": 0,
        "num_cancelled": 0,
        "num_prompt_tokens": 2,
        "num_completion_tokens": 2,
        "num_cached_tokens": 0,
    }


async def test_without_a_cache_nothing_is_cached_or_said_to_be() -> None:
    async with interface(cache_enabled=False) as llm:
        assert llm.get_cache_metrics() == {"enabled": False}
        assert await llm.clear_cache() == {}
        for _ in range(2):
            assert not (await llm.chat_completion(HELLO, temperature=0)).cached
        with pytest.raises(NotCached, match="AUTOBOT_CACHE_ENABLED is false"):
            await llm.chat_completion(HELLO, cache={"mode": "only-if-cached"})


async def test_a_closed_interface_refuses_and_can_be_opened_again() -> None:
    provider = scripted()
    llm = interface(provider)
    async with llm:
        pass
    assert provider.status().state == "stopped"
    await llm.cleanup()
    with pytest.raises(ProviderUnavailable, match="closed"):
        await llm.chat_completion(HELLO)
    async with llm:
        assert (await llm.chat_completion(HELLO)).content == "Good day"


async def test_the_first_request_starts_the_provider_once() -> None:
    class CountingProvider(ScriptedProvider):
        num_starts = 0

        async def start(self) -> None:
            self.num_starts += 1
            await asyncio.sleep(0.01)
            await super().start()

    provider = CountingProvider(["a"], name="native")
    llm = interface(provider)
    await asyncio.gather(*(llm.chat_completion(HELLO) for _ in range(5)))
    await llm.aclose()
    assert provider.num_starts == 1


async def test_a_provider_that_fails_to_start_is_closed() -> None:
    class FailingProvider(ScriptedProvider):
        is_closed = False

        async def start(self) -> None:
            raise LLMError("no luck")

        async def close(self) -> None:
            self.is_closed = True

    provider = FailingProvider(name="native")
    with pytest.raises(LLMError, match="no luck"):
        async with interface(provider):
            pass
    assert provider.is_closed


async def test_from_env_reads_the_environment(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("AUTOBOT_LLM_TIMEOUT=7\n")
    llm = LLMInterface.from_env(environ={"AUTOBOT_DEFAULT_LLM_MODEL": "m"}, env_file=env_file)
    assert (llm.settings.timeout, llm.settings.default_model) == (7, "m")
