"""Ollama's dialect with our own engine behind it, and with another Ollama; and OpenAI's with an Ollama behind it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import ollama
import openai
import pytest
from fake_ollama import FakeOllama, running_ollama
from server_harness import QUESTION, Server, running_server, serving, until

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.providers.ollama import OllamaProvider
from autobot_llm.settings import Settings

MODEL = "mistral:7b"


def client(server: Server[Any]) -> ollama.AsyncClient:
    return ollama.AsyncClient(host=server.url)


@contextlib.asynccontextmanager
async def in_front_of(fake: FakeOllama) -> AsyncIterator[Server[OllamaProvider]]:
    settings = Settings(port=0, provider="ollama", default_model=MODEL, ollama_endpoint=fake.url)
    provider = OllamaProvider(settings)
    async with serving(settings, LLMInterface(settings, providers={"ollama": provider}), provider) as server:
        yield server


async def test_our_own_engine_answers_the_official_client() -> None:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    options = {"temperature": 0, "num_predict": 12, "seed": 1}
    question = [{"role": "user", "content": "Tell me a story about a fox."}]
    async with (
        serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server,
        client(server) as asked,
    ):
        whole = await asked.chat("tiny", question, options=options)
        parts = [part async for part in await asked.chat("tiny", question, options=options, stream=True)]
        story = await asked.generate("tiny", "Once upon a time", raw=True, options={**options, "num_ctx": 2048})
        listed, running, shown = await asked.list(), await asked.ps(), await asked.show("tiny")
        loaded = await asked.generate("tiny")
        with pytest.raises(ollama.ResponseError, match="context is 2048 tokens here") as refusal:
            await asked.generate("tiny", "x", options={"num_ctx": 4096})
    assert whole.message.content
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert (whole.eval_count, whole.done_reason) == (12, "length")
    assert 0 < whole.eval_duration < whole.total_duration
    assert story.response
    assert [model.model for model in listed.models] == ["tiny"]
    assert [(model.model, model.context_length) for model in running.models] == [("tiny", 2048)]
    assert shown.modelinfo["native.context_length"] == 2048
    assert loaded.done_reason == "load"
    assert refusal.value.status_code == 400


async def test_an_ollama_behind_gets_what_the_client_said() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    async with running_ollama() as fake, in_front_of(fake) as server, client(server) as asked:
        answer = await asked.chat(
            MODEL,
            QUESTION,
            tools=tools,
            format={"type": "object"},
            options={"temperature": 0.5, "num_ctx": 6000, "repeat_last_n": 3},
            keep_alive="2h",
            think=True,
        )
        streamed = [part async for part in await asked.generate(MODEL, "a b c", stream=True)]
        inserted = await asked.generate(MODEL, "def f(", suffix="return")
    assert answer.message.content == QUESTION[0]["content"]
    assert (answer.load_duration, answer.prompt_eval_duration) == (2_000_000_000, 125_000_000)
    assert [part.response for part in streamed][:3] == ["a ", "b ", "c"]
    assert inserted.response == "def f("
    first, second = fake.asked("/api/chat")
    assert first["options"] == {"temperature": 0.5, "num_ctx": 8192, "repeat_last_n": 3}
    assert (first["keep_alive"], first["think"], first["format"]) == ("2h", True, {"type": "object"})
    assert [tool["function"]["name"] for tool in first["tools"]] == ["f"]
    assert second["messages"] == [{"role": "user", "content": "a b c"}]
    assert fake.asked("/api/generate")[0]["suffix"] == "return"
    assert fake.num_loads == {MODEL: 1}


async def test_the_listings_show_what_the_ollama_behind_tells() -> None:
    async with running_ollama() as fake, in_front_of(fake) as server, client(server) as asked:
        await asked.generate(MODEL, keep_alive="5m")
        listed, running, shown = await asked.list(), await asked.ps(), await asked.show(MODEL)
        assert fake.loaded == {MODEL: 4096}
        unloaded = await asked.generate(MODEL, keep_alive=0)
        gone = await asked.ps()
    assert [(model.model, model.size, model.digest) for model in listed.models] == [(MODEL, 4_400_000_000, "f974")]
    assert listed.models[0].details.quantization_level == "Q4_K_M"
    assert [(model.context_length, model.size_vram) for model in running.models] == [(4096, 5)]
    assert (shown.capabilities, shown.modelinfo["llama.context_length"]) == (["completion", "tools"], 32768)
    assert (unloaded.done_reason, gone.models) == ("unload", [])


async def test_embeddings_are_made_under_the_newer_and_the_older_name() -> None:
    async with running_ollama() as fake, in_front_of(fake) as server, client(server) as asked:
        one = await asked.embed(MODEL, "abc", dimensions=2, truncate=False, options={"num_ctx": 5000})
        several = await asked.embed(MODEL, ["a", "bb"], keep_alive="2h")
        older = await asked.embeddings(MODEL, "abcd")
        nothing = await asked.embed(MODEL, [])
        page = (await server.get("/metrics")).body.decode()
    assert (one.embeddings, one.prompt_eval_count) == ([[3.0, 1.0]], 3)
    assert [vector[0] for vector in several.embeddings] == [1.0, 2.0]
    assert (older.embedding, nothing.embeddings) == ([4.0, 1.0], [])
    first, second, _ = fake.asked("/api/embed")
    assert (first["dimensions"], first["truncate"], first["options"]) == (2, False, {"num_ctx": 8192})
    assert second["keep_alive"] == "2h"
    assert fake.num_loads == {MODEL: 1}
    assert 'autobot_llm_context_growths_total{provider="ollama"} 0.0' in page


async def test_our_own_engines_vectors_are_written_as_numbers_whether_kept_or_not() -> None:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    async with (
        serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server,
        client(server) as asked,
    ):
        made, kept = [(await asked.embed("tiny", ["fox", "hen"])).embeddings for _ in range(2)]
        older = (await asked.embeddings("tiny", "fox")).embedding
    assert made == kept and len(made) == 2
    assert (len(older), older) == (384, made[0])


async def test_a_provider_without_embeddings_says_so() -> None:
    async with running_server() as server:
        for path, fields in (("/api/embed", {"input": "x"}), ("/api/embeddings", {"prompt": "x"})):
            reply = await server.post(path, {"model": "tiny", **fields})
            assert (reply.status, "embeddings" in reply.json["error"]) == (400, True)


async def test_errors_of_the_ollama_behind_keep_their_words_and_status() -> None:
    def breaking(body: dict[str, Any]) -> list[Any]:
        return [fake.line("/api/chat", "half "), {"error": "llama runner process has terminated"}]

    async with running_ollama(script=breaking) as fake, in_front_of(fake) as server, client(server) as asked:
        with pytest.raises(ollama.ResponseError, match="ollama pull nothing") as missing:
            await asked.chat("nothing", QUESTION)
        with pytest.raises(ollama.ResponseError, match="runner process has terminated"):
            _ = [part async for part in await asked.chat(MODEL, QUESTION, stream=True)]
        fake.refusal = (400, f'"{MODEL}" does not support thinking')
        with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
            await asked.chat(MODEL, QUESTION, think=True)
    assert (missing.value.status_code, refused.value.status_code) == (404, 400)


async def test_a_client_that_leaves_ends_the_work_at_the_ollama_behind() -> None:
    fake = FakeOllama(script=lambda body: [fake.line("/api/chat", "x ")], hangs=True)
    async with running_ollama(fake), in_front_of(fake) as server:
        async with client(server) as asked:
            async for _ in await asked.chat(MODEL, QUESTION, stream=True):
                break
        await until(fake.client_left.is_set)
        await until(lambda: server.provider.metrics()["num_running"] == 0)


async def test_openais_client_is_answered_by_an_ollama() -> None:
    function = {"name": "weather", "arguments": {"city": "Riga"}}

    def calling(body: dict[str, Any]) -> list[Any]:
        call = fake.line("/api/chat", "", thinking="Hm.", tool_calls=[{"function": function}])
        return [call, fake.line("/api/chat", "") | fake.ending(20, 7)]

    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    async with running_ollama() as fake, in_front_of(fake) as server, server.client() as asked:
        plain = await asked.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=50, stop="END", seed=3)
        stream = await asked.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        fake.script = calling
        called = await asked.chat.completions.create(model=MODEL, messages=QUESTION, tools=tools)
        with pytest.raises(openai.BadRequestError, match="logit_bias") as refusal:
            await asked.chat.completions.create(model=MODEL, messages=QUESTION, logit_bias={"5": 1})
    assert plain.choices[0].message.content == text == QUESTION[0]["content"]
    assert plain.usage.prompt_tokens_details.cached_tokens == 6
    assert called.choices[0].finish_reason == "tool_calls"
    assert called.choices[0].message.tool_calls[0].function.arguments == '{"city":"Riga"}'
    assert refusal.value.param == "logit_bias"
    options = fake.asked("/api/chat")[0]["options"]
    assert (options["num_predict"], options["stop"], options["seed"]) == (50, ["END"], 3)


async def test_anthropics_client_is_answered_by_an_ollama() -> None:
    function = {"name": "weather", "arguments": {"city": "Riga"}}

    def calling(body: dict[str, Any]) -> list[Any]:
        pieces = [fake.line("/api/chat", "", thinking="Hm."), fake.line("/api/chat", "Let me look.")]
        call = fake.line("/api/chat", "", tool_calls=[{"id": "c1", "function": function}])
        return [*pieces, call, fake.line("/api/chat", "") | fake.ending(20, 7)]

    tools = [{"name": "weather", "input_schema": {"type": "object"}}]
    asking: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": QUESTION}
    async with (
        running_ollama() as fake,
        in_front_of(fake) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as asked,
    ):
        plain = await asked.messages.create(**asking)
        fake.script = calling
        whole = await asked.messages.create(**asking, tools=tools)
        async with asked.messages.stream(**asking, tools=tools) as stream:
            streamed = await stream.get_final_message()
        with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
            await asked.messages.create(**asking, tools=tools, tool_choice={"type": "any"})
    assert plain.content[0].text == QUESTION[0]["content"]
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        assert (message.content[2].input, message.stop_reason) == ({"city": "Riga"}, "tool_use")
        assert (message.usage.cache_read_input_tokens, message.usage.input_tokens) == (10, 10)
