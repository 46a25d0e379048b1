"""Kept vectors and the answers to the same question in other words, over HTTP with the real client."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Server, serving, sse_events
from universal.embedding_providers import EmbeddingProvider

from autobot_llm.interface import LLMInterface
from autobot_llm.settings import Settings

CHAT = "/v1/chat/completions"
ENGLISH, REWORDED = "How do I boil an egg?", "Hi, can you tell me how to boil an egg?"


@asynccontextmanager
async def server_with(folder: Path, **values: Any) -> AsyncIterator[Server[EmbeddingProvider]]:
    provider = EmbeddingProvider(["The ", "answer", "."])
    settings = Settings(port=0, cache_dir=folder, **values)
    async with serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server:
        yield server


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


async def test_an_answer_to_another_question_is_marked_whole_and_as_a_stream(tmp_path: Path) -> None:
    async with server_with(tmp_path, semantic_cache_threshold=0.95) as server:
        first = await server.post(CHAT, body(ENGLISH))
        assert "x-autobot-cache" not in first.headers
        whole = await server.post(CHAT, body(REWORDED))
        stream = await server.post(CHAT, body(REWORDED, stream=True))
        exact = await server.post(CHAT, body(ENGLISH))
        assert len(server.provider.requests) == 1
        page = (await server.get("/metrics")).body.decode()
    for reply in (whole, stream):
        assert reply.headers["x-autobot-cache"] == "semantic;similarity=1.0000"
        assert unquote(reply.headers["x-autobot-cache-question"]) == ENGLISH
    assert whole.headers["x-autobot-optimizations"].startswith("semantic_caching;tokens_saved=")
    assert "x-autobot-cache" not in exact.headers
    assert whole.json["choices"] == first.json["choices"]
    chunks = [event for event in sse_events(stream.body) if event != "[DONE]"]
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]]
    assert [piece for piece in pieces if piece] == ["The ", "answer", "."]
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert [sample.value for sample in families["autobot_llm_semantic_cache_hits"]] == [2]
    assert [sample.value for sample in families["autobot_llm_semantic_cache_misses"]] == [1]


async def test_a_question_of_any_letters_fits_into_its_header(tmp_path: Path) -> None:
    async with server_with(tmp_path, semantic_cache_threshold=0.95) as server:
        await server.post(CHAT, body('Grüße, 你好\n"x"'))
        reply = await server.post(CHAT, body('Grüße, 你好\n"x".'))
    assert unquote(reply.headers["x-autobot-cache-question"]) == 'Grüße, 你好\n"x"'


async def test_the_real_client_sees_it_and_can_decline_it(tmp_path: Path) -> None:
    async with server_with(tmp_path, semantic_cache_threshold=0.95) as server, server.client() as client:
        ask = client.chat.completions
        await ask.create(**body(ENGLISH))
        raw = await ask.with_raw_response.create(**body(REWORDED))
        assert raw.headers["x-autobot-cache"].startswith("semantic")
        assert raw.parse().choices[0].message.content == "The answer."
        declined = await ask.with_raw_response.create(**body(REWORDED), extra_body={"cache": {"semantic": False}})
        assert "x-autobot-cache" not in declined.headers
        assert len(server.provider.requests) == 2
        with pytest.raises(openai.BadRequestError, match="semantic"):
            await ask.create(**body(REWORDED), extra_body={"cache": {"semantic": "no"}})


async def test_every_dialect_marks_it(tmp_path: Path) -> None:
    async with server_with(tmp_path, semantic_cache_threshold=0.95) as server:
        for path, more in (("/v1/messages", {"max_tokens": 9}), ("/api/chat", {"options": {"temperature": 0}})):
            for text in (ENGLISH, REWORDED):
                asked = body(text, **more) | ({"stream": False} if path == "/api/chat" else {})
                if path == "/api/chat":
                    del asked["temperature"]
                reply = await server.post(path, asked)
                assert reply.status == 200
            assert reply.headers["x-autobot-cache"].startswith("semantic")


async def test_owners_of_different_keys_never_share_questions(tmp_path: Path) -> None:
    async with server_with(tmp_path, semantic_cache_threshold=0.95, api_keys=("one", "two")) as server:
        await server.post(CHAT, body(ENGLISH), authorization="Bearer one")
        other = await server.post(CHAT, body(REWORDED), authorization="Bearer two")
        assert "x-autobot-cache" not in other.headers
        assert (len(server.provider.requests), server.provider.embedded) == (2, [])
        own = await server.post(CHAT, body(REWORDED), authorization="Bearer one")
        assert own.headers["x-autobot-cache"].startswith("semantic")


async def test_the_real_client_gets_vectors_again_bit_by_bit_in_either_encoding(tmp_path: Path) -> None:
    async with server_with(tmp_path) as server, server.client() as client:
        server.provider.vectors = {"a": [0.1, -0.0, 1e-30], "b": [0.3, 2.5, 7.0]}
        made = await client.embeddings.create(model="tiny", input=["a", "b"])
        raw = await client.embeddings.with_raw_response.create(model="tiny", input=["b", "c", "a"])
        again = raw.parse()
        assert server.provider.embedded == [["a", "b"], ["c"]]
        assert [again.data[0].embedding, again.data[2].embedding] == [made.data[1].embedding, made.data[0].embedding]
        assert raw.headers["x-autobot-optimizations"] == "embedding_caching;tokens_saved=2"
        assert (made.usage.prompt_tokens, again.usage.prompt_tokens) == (2, 3)
        as_numbers = await server.post("/v1/embeddings", {"model": "tiny", "input": "a", "encoding_format": "float"})
        as_text = await server.post("/v1/embeddings", {"model": "tiny", "input": "a", "encoding_format": "base64"})
        assert as_numbers.json["data"][0]["embedding"] == [0.1, -0.0, 1e-30]
        assert len(base64.b64decode(as_text.json["data"][0]["embedding"])) == 12
        assert as_numbers.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        page = (await server.get("/metrics")).body.decode()
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert [sample.value for sample in families["autobot_llm_embedding_cache_l1_hits"]] == [4]
    assert [sample.value for sample in families["autobot_llm_embedding_cache_misses"]] == [3]


async def test_the_body_and_the_header_steer_kept_vectors(tmp_path: Path) -> None:
    path, asked = "/v1/embeddings", {"model": "tiny", "input": "a"}
    async with server_with(tmp_path) as server:
        refused = await server.post(path, asked, **{"cache-control": "only-if-cached"})
        assert (refused.status, refused.json["error"]["code"]) == (504, "not_cached")
        await server.post(path, asked)
        await server.post(path, asked)
        assert len(server.provider.embedded) == 1
        await server.post(path, asked, **{"cache-control": "no-cache"})
        await server.post(path, asked, **{"cache-control": "no-store"})
        await server.post(path, asked | {"cache": {"mode": "bypass"}})
        assert len(server.provider.embedded) == 4
        assert (await server.post(path, asked | {"cache": "no"})).status == 400
        ollama = {"model": "tiny", "input": ["a"]}
        assert (await server.post("/api/embed", ollama)).status == 200
        await server.post("/api/embed", ollama | {"cache": {"mode": "refresh"}})
        await server.post("/api/embed", ollama, **{"cache-control": "no-store"})
        assert len(server.provider.embedded) == 6
