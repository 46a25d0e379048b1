"""The Ollama provider against a server that behaves as documented: exact requests, one load, true figures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_ollama import LOAD_SECONDS, FakeOllama, Model, reserved, running_ollama, url_of

from autobot_llm.collect import collect
from autobot_llm.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderUnavailable,
    UnsupportedError,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.ollama import OllamaProvider
from autobot_llm.providers.ollama.provider import DEFAULT_MODEL, default_model
from autobot_llm.settings import Settings, load_settings
from autobot_llm.types import (
    ChatMessage,
    EmbeddingRequest,
    LLMRequest,
    LLMResponse,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolCallDelta,
)

MODEL = "mistral:7b"


@contextlib.asynccontextmanager
async def provider_of(ollama: FakeOllama, *, memory: int | None = None, **values: Any) -> AsyncIterator[OllamaProvider]:
    settings = Settings(**({"ollama_endpoint": ollama.url, "provider": "ollama", "default_model": MODEL} | values))
    provider = OllamaProvider(settings, memory=memory)
    await provider.start()
    try:
        yield provider
    finally:
        await provider.close()


def asking(text: str = "Why is the sky blue?", **fields: Any) -> LLMRequest:
    return LLMRequest(messages=[ChatMessage(role="user", content=text)], **fields)


async def ask(provider: OllamaProvider, request: LLMRequest | None = None) -> LLMResponse:
    return await collect(provider.stream(request or asking()))


async def test_an_answer_has_its_text_counts_and_times() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        events = [event async for event in provider.stream(asking("one two three", request_id="r1"))]
        response = await ask(provider)
    assert events[0] == Start(request_id="r1", model=MODEL, provider="ollama")
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["one ", "two ", "three"]
    assert response.content == "Why is the sky blue?"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens, response.usage.cached_tokens) == (13, 5, 6)
    timings = response.timings
    assert (timings.load, timings.prefill, timings.decode, timings.total) == (0.02, 0.125, 0.25, 0.52)
    assert timings.time_to_first_token is not None
    assert response.time_to_first_token is not None


async def test_every_sampling_field_arrives_in_the_options() -> None:
    fields = {"temperature": 0.0, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "seed": -1, "stop": ["END"], "max_tokens": 9,
              "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}  # fmt: skip
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await ask(provider, asking(**fields, extra_body={"repeat_last_n": 32, "options": {"typical_p": 0.5}}))
        await ask(provider, asking())
    first, second = ollama.asked("/api/chat")
    assert first["options"] == {
        "temperature": 0.0, "top_k": 0, "top_p": 0.9, "min_p": 0.1, "seed": 2**31 - 1, "stop": ["END"],
        "num_predict": 9, "repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repeat_last_n": 32, "typical_p": 0.5, "num_ctx": 4096,
    }  # fmt: skip
    assert second["options"] == {"num_ctx": 4096}
    assert (second["keep_alive"], second["truncate"], second["stream"]) == ("30m", False, True)


async def test_a_conversation_with_calls_and_images_is_translated() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [
        ChatMessage(role="developer", content="Be brief."),
        ChatMessage(
            role="user", content=[{"type": "text", "text": "What "}, image, {"type": "text", "text": "is it?"}]
        ),
        ChatMessage(role="assistant", content=None, tool_calls=[call], reasoning_content="I should look."),
        ChatMessage(role="tool", content="blue", tool_call_id="c1"),
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    schema = {"type": "object"}
    request = LLMRequest(
        messages=messages,
        tools=tools,
        tool_choice="auto",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        logprobs=2,
        extra_body={"reasoning_effort": "high"},
    )
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await ask(provider, request)
    body = ollama.asked("/api/chat")[0]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?", "images": ["iVBORw0KGgo="]},
        {
            "role": "assistant",
            "content": "",
            "thinking": "I should look.",
            "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": {"at": "sky"}}}],
        },
        {"role": "tool", "content": "blue", "tool_name": "look", "tool_call_id": "c1"},
    ]
    assert (body["tools"], body["format"], body["think"]) == (tools, schema, "high")
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


async def test_a_prompt_is_continued_raw() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        response = await ask(provider, LLMRequest(prompt="Once upon", response_format={"type": "json_object"}))
        await ask(provider, LLMRequest(prompt="def f(", extra_body={"suffix": "return 1"}))
    assert response.content == "Once upon"
    first, second = ollama.asked("/api/generate")
    assert (first["prompt"], first["raw"], first["format"]) == ("Once upon", True, "json")
    assert (second["suffix"], "raw" in second) == ("return 1", False)


async def test_thoughts_calls_and_log_probabilities_become_events() -> None:
    def script(body: dict[str, Any]) -> list[Any]:
        line = ollama.line
        function = {"name": "look", "arguments": {"at": "the sky"}}
        logprobs = [{"token": "b", "logprob": -0.5, "bytes": [98], "top_logprobs": [{"token": "b", "logprob": -0.5}]}]
        return [
            line("/api/chat", "", thinking="Hm. "),
            line("/api/chat", "b") | {"logprobs": logprobs},
            line("/api/chat", "", tool_calls=[{"function": function}, {"id": "given", "function": function}]),
            line("/api/chat", "") | ollama.ending(5, 7),
        ]

    async with running_ollama(script=script) as ollama, provider_of(ollama) as provider:
        events = [event async for event in provider.stream(asking(request_id="r"))]
        response = await ask(provider)
    assert ReasoningDelta("Hm. ") in events
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert [(call.position, call.call_id) for call in calls] == [(0, "call_r_0"), (1, "given")]
    assert {call.arguments for call in calls} == {'{"at":"the sky"}'}
    assert response.finish_reason == "tool_calls"
    logprob = response.choices[0].logprobs[0]
    assert (logprob.token, logprob.logprob, [text for _, text, _ in logprob.top]) == ("b", -0.5, ["b"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"stop_token_ids": [2]}, "stop_token_ids"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"priority": 1}, "priority"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"extra_body": {"num_gpu": 0}}, "options.num_gpu"),
        ({"extra_body": {"options": {"num_gpu": 0}}}, "options.num_gpu"),
        ({"extra_body": {"num_ctx": 10**6}}, "num_ctx"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex"),
        ({"extra_body": {"reasoning_effort": "xhigh"}}, "reasoning_effort"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ],
)
async def test_what_ollama_would_ignore_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        with pytest.raises(UnsupportedError) as refusal:
            await ask(provider, asking(**fields))
    assert refusal.value.param == param
    assert ollama.asked("/api/chat") == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
    ],
)
async def test_parts_that_ollama_does_not_take_are_refused(part: dict[str, Any]) -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        with pytest.raises(UnsupportedError, match=r"messages\[0\].content\[0\]"):
            await ask(provider, LLMRequest(messages=[ChatMessage(role="user", content=[part])]))
        with pytest.raises(UnsupportedError, match="token ids"):
            await ask(provider, LLMRequest(prompt=[1, 2]))
    assert ollama.asked("/api/chat") == []


@pytest.mark.parametrize(
    ("fields", "param", "since"),
    [
        ({"logprobs": 1}, "logprobs", "0.12.11"),
        ({"extra_body": {"reasoning_effort": "low"}}, "reasoning_effort", "0.9.0"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format", "0.5.0"),
    ],
)
async def test_a_field_that_this_version_would_ignore_is_refused(
    fields: dict[str, Any], param: str, since: str
) -> None:
    async with running_ollama(version="0.4.7") as ollama, provider_of(ollama) as provider:
        with pytest.raises(UnsupportedError, match=f"since {since}; this server is 0.4.7") as refusal:
            await ask(provider, asking(**fields))
        assert refusal.value.param == param
        ollama.version = "0.0.0"  # a build of its own, whose age nobody knows
    async with running_ollama(ollama), provider_of(ollama) as provider:
        await ask(provider, asking(**fields))


# One load


async def test_a_growing_conversation_loads_the_model_once_per_doubling_and_never_shrinks_it() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        for num_words in (1, 500, 2000, 1, 3000, 6000, 1, 9000, 1):
            await ask(provider, asking("word " * num_words))
        contexts = [body["options"]["num_ctx"] for body in ollama.asked("/api/chat")]
        assert contexts == sorted(contexts)
        assert {context & (context - 1) for context in contexts} == {0}
        assert ollama.num_loads == {MODEL: len(set(contexts))}
        assert provider.metrics()["num_model_loads"] == len(set(contexts))
        assert provider.metrics()["num_context_growths"] == len(set(contexts)) - 1


async def test_a_model_that_is_loaded_already_keeps_its_context() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        ollama.loaded[MODEL] = 20_000  # by another program, with a context of its own
        for _ in range(3):
            await ask(provider)
    assert {body["options"]["num_ctx"] for body in ollama.asked("/api/chat")} == {20_000}
    assert ollama.num_loads == {}


async def test_two_programs_with_the_same_server_do_not_reload_each_others_model() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as one, provider_of(ollama) as other:
        await ask(one, asking("word " * 3000))
        for provider in (other, one, other, one):
            await ask(provider)
    assert ollama.num_loads == {MODEL: 1}


async def test_requests_at_once_agree_on_one_context() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await asyncio.gather(*(ask(provider, asking("word " * size)) for size in (5000, 1, 1, 5000, 1, 1)))
        await asyncio.gather(*(ask(provider) for _ in range(6)))
    assert {body["options"]["num_ctx"] for body in ollama.asked("/api/chat")[6:]} == {16_384}
    assert ollama.num_loads[MODEL] <= 2


async def test_a_reader_that_leaves_while_the_context_grows_does_not_make_the_next_one_shrink_it() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await ask(provider)
        events = provider.stream(asking("word " * 5000))
        assert isinstance(await anext(events), Start)
        await events.aclose()
        await ask(provider)
    assert ollama.num_loads == {MODEL: 2}


async def test_the_context_stays_within_the_models_and_the_settings_limits() -> None:
    async with running_ollama(models={MODEL: Model(context_length=6000)}) as ollama:
        async with provider_of(ollama) as provider:
            await ask(provider, asking("word " * 50_000))
            await ask(provider)
        async with provider_of(ollama, max_model_len=5000) as provider:
            ollama.loaded.clear()
            await ask(provider, asking("word " * 50_000))
    assert [body["options"]["num_ctx"] for body in ollama.asked("/api/chat")] == [6000, 6000, 5000]


async def test_the_models_own_context_is_the_least() -> None:
    models = {MODEL: Model(parameters="temperature 0.5\nnum_ctx   12000\nstop x")}
    async with running_ollama(models=models) as ollama, provider_of(ollama) as provider:
        await ask(provider)
    assert ollama.asked("/api/chat")[0]["options"]["num_ctx"] == 12_000


async def test_a_context_asked_for_is_the_least_too() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await ask(provider, asking(extra_body={"num_ctx": 5000}))
        await ask(provider, asking(extra_body={"num_ctx": 2000}))
    assert [body["options"]["num_ctx"] for body in ollama.asked("/api/chat")] == [8192, 8192]


async def test_a_stay_is_asked_for_and_nobodys_is_cut_short() -> None:
    async with running_ollama() as ollama:
        async with provider_of(ollama) as provider:
            await ask(provider)
            await ask(provider, asking(extra_body={"keep_alive": "2h"}))
        ollama.expires_at = "2318-12-31T00:00:00.123456789+01:00"
        async with provider_of(ollama) as provider:
            await ask(provider)
        async with provider_of(ollama, ollama_keep_alive=None) as provider:
            await ask(provider)
    assert [body.get("keep_alive") for body in ollama.asked("/api/chat")] == ["30m", "2h", None, None]


# The report


async def test_the_report_says_what_ollama_said() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        first = {outcome.name: outcome for outcome in (await ask(provider)).optimizations}
        second = {outcome.name: outcome for outcome in (await ask(provider)).optimizations}
        ollama.tells_cached = False
        third = {outcome.name: outcome for outcome in (await ask(provider)).optimizations}
    assert not first["keep_alive"].applied
    assert first["keep_alive"].reason == "the model was loaded first, in 2.0 s, with a context of 4096"
    assert second["keep_alive"].applied
    assert second["keep_alive"].milliseconds_saved == pytest.approx((LOAD_SECONDS - 0.02) * 1000)
    assert (second["prefix_caching"].applied, second["prefix_caching"].tokens_saved) == (True, 6)
    assert second["prefix_caching"].reason == "6 of 13 prompt tokens were in Ollama's cache"
    assert (third["prefix_caching"].applied, third["prefix_caching"].tokens_saved) == (False, None)
    assert "does not tell" in third["prefix_caching"].reason
    assert second["quantization"].lossy
    assert second["quantization"].reason == "the model's weights are stored as Q4_K_M"


# What there is


async def test_models_are_found_with_what_is_known_of_them() -> None:
    models = {MODEL: Model(), "nomic": Model(context_length=2048, capabilities=("embedding",))}
    async with running_ollama(models=models) as ollama, provider_of(ollama) as provider:
        await ask(provider)
        found = {model.id: model for model in await provider.models()}
    assert (found[MODEL].context_length, found[MODEL].is_loaded, found[MODEL].details["size"]) == (32768, True, 4.4e9)
    assert (found["nomic"].context_length, found["nomic"].is_loaded) == (2048, False)
    assert found["nomic"].details["capabilities"] == ["embedding"]
    assert found[MODEL].created > 0


async def test_the_status_shows_the_version_the_quantization_and_the_settings_that_help() -> None:
    async with running_ollama() as ollama, provider_of(ollama, kv_cache_dtype="int8") as provider:
        status = provider.status()
        assert (status.state, status.details["version"]) == ("ready", "0.40.0")
        assert status.details["recommended"] == (
            "OLLAMA_FLASH_ATTENTION=1 OLLAMA_NUM_PARALLEL=4 OLLAMA_KV_CACHE_TYPE=q8_0"
        )
        assert str(status.details["quantization"]).startswith("Q4_K_M, 4.4 GB")
        await ask(provider)
        assert provider.status().details[f"num_ctx of {MODEL}"] == 4096
    assert provider.status().state == "stopped"


async def test_a_model_that_is_not_there_comes_with_the_remedy() -> None:
    async with running_ollama() as ollama, provider_of(ollama, default_model="missing") as provider:
        assert provider.status().details["quantization"] == "missing is not there: `ollama pull missing`"
        for request in (asking(), asking(model="missing"), LLMRequest(prompt="x")):
            with pytest.raises(ModelNotFoundError, match="'missing' not found; `ollama pull missing` fetches it"):
                await ask(provider, request)
        with pytest.raises(ModelNotFoundError, match="ollama pull nope"):
            await provider.embed(EmbeddingRequest(inputs=["x"], model="nope"))
    assert ollama.asked("/api/pull") == []


async def test_a_pull_tells_how_far_it_is_and_only_happens_when_asked() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        steps = [progress async for progress in provider.pull("new:1b")]
        assert (steps[1].completed, steps[1].total) == (50, 100)
        assert steps[-1].status == "success"
        await ask(provider, asking(model="new:1b"))
        with pytest.raises(ProviderError, match="file does not exist"):
            _ = [progress async for progress in provider.pull("nowhere")]


async def test_a_load_has_the_context_that_requests_have_and_an_unload_frees_it() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await provider.load(None)
        await ask(provider)
        assert (ollama.num_loads, list(ollama.loaded)) == ({MODEL: 1}, [MODEL])
        await provider.load(MODEL, keep_alive=0)
        assert ollama.loaded == {}


async def test_embeddings_come_in_order_and_do_not_reload_the_model() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        await ask(provider)
        response = await provider.embed(EmbeddingRequest(inputs=["a", "bbb"], dimensions=2))
        assert [vector[0] for vector in response.vectors] == [1.0, 3.0]
        assert (response.usage.prompt_tokens, response.model) == (6, MODEL)
        with pytest.raises(UnsupportedError, match="token ids"):
            await provider.embed(EmbeddingRequest(inputs=[[1, 2]]))
    assert ollama.num_loads == {MODEL: 1}
    assert ollama.asked("/api/embed")[0]["dimensions"] == 2


# Quantized variants


async def test_a_quantized_variant_answers_where_those_are_preferred() -> None:
    models = {
        "llama3:8b-instruct": Model("F16", 16_000_000_000),
        "llama3:8b-instruct-q4_K_M": Model("Q4_K_M", 4_900_000_000),
        "llama3:8b-instruct-q8_0": Model("Q8_0", 8_500_000_000),
        MODEL: Model(),
        f"{MODEL}-q8_0": Model("Q8_0", 7_700_000_000),
    }
    async with running_ollama(models=models) as ollama:
        async with provider_of(ollama, memory=6_000_000_000, use_quantized_models=True) as provider:
            small = await ask(provider, asking(model="llama3:8b-instruct"))
        async with provider_of(ollama, memory=32_000_000_000, use_quantized_models=True) as provider:
            large = await ask(provider, asking(model="llama3:8b-instruct"))
            own = await ask(provider, asking(model=MODEL))
        async with provider_of(ollama) as provider:
            plain = await ask(provider, asking(model="llama3:8b-instruct"))
    assert (small.model, large.model) == ("llama3:8b-instruct-q4_K_M", "llama3:8b-instruct-q8_0")
    assert own.model == MODEL, "its default tag has 4 bits already"
    assert plain.model == "llama3:8b-instruct"


def test_the_default_model_is_ollamas_own_unless_it_is_set_for_ollama() -> None:
    def chosen(**environ: str) -> str:
        return default_model(load_settings(environ=environ, env_file=None))

    assert chosen() == chosen(AUTOBOT_LLM_PROVIDER="ollama") == DEFAULT_MODEL == "mistral:7b-instruct-q4_K_M"
    assert chosen(AUTOBOT_DEFAULT_LLM_MODEL="/models/mine") == DEFAULT_MODEL
    assert chosen(AUTOBOT_LLM_PROVIDER="ollama", AUTOBOT_DEFAULT_LLM_MODEL="qwen3") == "qwen3"
    assert chosen(AUTOBOT_LLM_PROVIDER="ollama", AUTOBOT_DEFAULT_LLM_MODEL="tiny") == "tiny"
    assert chosen(AUTOBOT_DEFAULT_LLM_MODEL="ollama/qwen3") == "qwen3"


# When it misbehaves


async def test_a_server_that_is_down_at_the_start_is_used_once_it_is_there() -> None:
    listener = reserved()
    async with provider_of(FakeOllama(url=url_of(listener))) as provider:
        assert provider.status().state == "failed"
        with pytest.raises(ProviderUnavailable, match="ollama cannot be reached"):
            await ask(provider)
        async with running_ollama(listener=listener):
            await ask(provider)
            assert provider.status().state == "ready"
    with pytest.raises(ProviderUnavailable, match="closed"):
        await ask(provider)


async def test_the_status_follows_the_server_though_nobody_asks_for_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    listener = reserved()
    provider = OllamaProvider(Settings(ollama_endpoint=url_of(listener)), watch_seconds=0.01)

    async def becomes(state: str) -> None:
        async with asyncio.timeout(5):
            while provider.status().state != state:
                await asyncio.sleep(0.005)

    try:
        await provider.start()
        assert provider.status().state == "failed"
        async with running_ollama(listener=listener):
            await becomes("ready")
        await becomes("failed")
        await asyncio.sleep(0.05)
    finally:
        await provider.close()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2, "each failure is told once, however often it is seen"


async def test_what_runs_is_told_as_far_as_the_server_tells() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        before = {outcome.name: outcome for outcome in provider.optimizations()}
        await ask(provider)
        after = {outcome.name: outcome for outcome in provider.optimizations()}
        assert provider.engine_version() == "0.40.0"
    assert (before["prefix_caching"].applied, after["prefix_caching"].applied) == (False, True)
    assert after["prefix_caching"].reason == "46% of the prompt tokens so far were in Ollama's cache"
    assert after["connection_pooling"].applied
    assert after["quantization"].lossy
    for name in ("flash_attention", "kv_cache_optimization", "continuous_batching"):
        assert not after[name].applied, "the server does not tell, so nobody here says that it does"


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b'{"message": {"content": "half', "not of its API"),
        (b"<html>gateway</html>\n", "not of its API"),
        (b'{"message": {"content": 5}}\n', "not of its API"),
        (b'"text"\n', "not of its API"),
        (b'{"error": "llama runner process has terminated"}\n', "ollama: llama runner process has terminated"),
        (b"", "before the end"),
    ],
)
@pytest.mark.parametrize("breaks_off", [False, True])
async def test_half_an_answer_is_an_error_whatever_ends_it(tail: bytes, message: str, breaks_off: bool) -> None:
    def script(body: dict[str, Any]) -> list[Any]:
        return [ollama.line("/api/chat", "half "), tail]

    async with running_ollama(script=script, breaks_off=breaks_off) as ollama, provider_of(ollama) as provider:
        received = []
        expected = message if tail.endswith(b"\n") or not breaks_off else "broke its answer off"
        with pytest.raises(ProviderError, match=expected):
            async for event in provider.stream(asking()):
                received += [event]
        assert TextDelta("half ") in received
        assert provider.metrics()["num_running"] == 0


@pytest.mark.parametrize(
    ("status", "sentence", "kind", "param"),
    [
        (400, "registry.ollama.ai/library/m does not support tools", UnsupportedError, "tools"),
        (400, '"m" does not support thinking', UnsupportedError, "reasoning_effort"),
        (400, '"m" does not support chat', UnsupportedError, "model"),
        (400, "the input length exceeds the context length", ContextLengthError, "messages"),
        (400, '{"code":400,"type":"exceed_context_size_error","n_ctx":512}', ContextLengthError, "messages"),
        (400, "invalid options: seed", InvalidRequestError, None),
        (503, "server busy, please try again.  maximum pending requests exceeded", OverloadedError, None),
        (500, "model requires more system memory (9 GiB) than is available (4 GiB)", ProviderError, None),
    ],
)
async def test_a_refusal_has_the_right_kind_and_ollamas_own_words(
    status: int, sentence: str, kind: type[ProviderError], param: str | None
) -> None:
    async with running_ollama(refusal=(status, sentence)) as ollama, provider_of(ollama) as provider:
        with pytest.raises(kind) as refusal:
            await ask(provider)
    assert type(refusal.value) is kind
    assert sentence.split("  ")[0] in refusal.value.message
    assert refusal.value.param == param


async def test_a_reader_that_leaves_ends_the_work_at_the_server() -> None:
    def script(body: dict[str, Any]) -> list[Any]:
        return [ollama.line("/api/chat", "one "), ollama.line("/api/chat", "two ")]

    async with running_ollama(script=script, hangs=True) as ollama, provider_of(ollama) as provider:
        events = provider.stream(asking())
        while not isinstance(await anext(events), TextDelta):
            pass
        await events.aclose()
        await asyncio.wait_for(ollama.client_left.wait(), 5)
        assert provider.metrics()["num_running"] == 0


async def test_a_reader_that_is_cancelled_ends_the_work_at_the_server() -> None:
    async with running_ollama(script=lambda body: [], hangs=True) as ollama, provider_of(ollama) as provider:
        task = asyncio.create_task(ask(provider))
        while not ollama.asked("/api/chat"):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(ollama.client_left.wait(), 5)
        assert provider.metrics()["num_running"] == 0


async def test_text_of_any_script_survives_being_cut_anywhere() -> None:
    text = "blau 蓝 🟦 é\u2028 \x85 \u0000 ende"
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        assert (await ask(provider, asking(text))).content == text


async def test_a_thousand_answers_of_which_many_fail_or_are_left_leave_nothing_behind() -> None:
    def script(body: dict[str, Any]) -> list[Any]:
        text = body["messages"][0]["content"]
        broken = [ollama.line("/api/chat", "half"), b"broken\n"] if text == "fail" else None
        return broken or ollama.words("/api/chat", body, 0.02)

    async with running_ollama(script=script) as ollama, provider_of(ollama) as provider:
        await ask(provider)
        tasks = asyncio.all_tasks()

        async def one(number: int) -> str:
            if number % 10 == 0:
                with pytest.raises(ProviderError, match="not of its API"):
                    await ask(provider, asking("fail"))
                return "failed"
            if number % 10 == 1:
                events = provider.stream(asking("a b c"))
                await anext(events)
                await events.aclose()
                return "left"
            return (await ask(provider, asking(f"number {number}"))).content

        for begin in range(0, 1000, 50):
            answers = await asyncio.gather(*(one(number) for number in range(begin, begin + 50)))
            assert [text for text in answers if text not in ("failed", "left")] == [
                f"number {number}" for number in range(begin, begin + 50) if number % 10 > 1
            ]
        figures = provider.metrics()
        assert (figures["num_running"], figures["num_connections"]) == (0, figures["num_idle_connections"])
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > len(tasks) + figures["num_idle_connections"]:
                await asyncio.sleep(0.01)
    assert ollama.num_loads == {MODEL: 1}


async def test_a_password_in_the_address_is_sent_and_never_shown() -> None:
    async with running_ollama(authorization="Basic bWU6cEBzcw==") as ollama:
        endpoint = ollama.url.replace("://", "://me:p%40ss@")
        async with provider_of(ollama, ollama_endpoint=endpoint) as provider:
            await ask(provider)
            assert "p%40ss" not in str(provider.status())
            assert provider.status().details["endpoint"] == ollama.url
        async with provider_of(ollama) as provider:
            with pytest.raises(ProviderError, match="401"):
                await ask(provider)


async def test_one_connection_serves_answer_after_answer() -> None:
    async with running_ollama() as ollama, provider_of(ollama) as provider:
        for _ in range(10):
            await ask(provider)
        assert ollama.num_connections <= 2


async def test_the_interface_reaches_it_by_name() -> None:
    async with running_ollama() as ollama:
        settings = Settings(ollama_endpoint=ollama.url, provider="ollama", default_model=MODEL)
        async with LLMInterface(settings) as llm:
            answer = await llm.chat_completion([{"role": "user", "content": "hello"}])
            named = await llm.chat_completion([{"role": "user", "content": "hello"}], model=f"ollama/{MODEL}")
    assert (answer.content, answer.provider, named.model) == ("hello", "ollama", MODEL)
