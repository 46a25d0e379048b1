"""Kept answers over HTTP: what the body and Cache-Control ask for, in every dialect, and how a hit looks."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_harness import QUESTION, Reply, running_server, sse_events

from autobot_llm.server.cache_control import with_cache_control
from autobot_llm.types import CacheControl, LLMRequest

CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": QUESTION, "temperature": 0}


@pytest.mark.parametrize(
    ("header", "control"),
    [
        ("no-store", CacheControl(mode="bypass")),
        ("No-Cache", CacheControl(mode="refresh")),
        ("max-age=0", CacheControl(mode="refresh")),
        ("max-age=60", CacheControl(max_age=60)),
        ("only-if-cached, max-age=5", CacheControl(mode="only-if-cached", max_age=5)),
        ("no-cache, no-store, must-revalidate", CacheControl(mode="bypass")),
        ("no-transform, max-stale=3", None),
        ("max-age=soon", None),
        ("", None),
    ],
)
def test_the_headers_directives_mean_what_they_mean_in_http(header: str, control: CacheControl | None) -> None:
    request = LLMRequest(prompt="x", temperature=0)
    assert with_cache_control(request, header.encode()).cache == control


@pytest.mark.parametrize("header", [b"no-cache", b"max-age=60", b"max-age=0"])
def test_a_header_alone_lets_no_drawn_answer_be_reused(header: bytes) -> None:
    assert with_cache_control(LLMRequest(prompt="x"), header).cache is None


def pieces_of(reply: Reply) -> list[str]:
    chunks = [event for event in sse_events(reply.body) if event != "[DONE]"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


async def test_a_hit_is_the_same_answer_whole_and_as_a_stream() -> None:
    async with running_server() as server:
        for stream in (False, True):
            body = ASKED | {"stream": stream, "max_tokens": 5 + stream}
            made, again = [await server.post(CHAT, body) for _ in range(2)]
            if stream:
                assert pieces_of(made) == pieces_of(again) == ["The ", "answer", "."]
            else:
                assert made.json["choices"] == again.json["choices"]
                assert made.json["usage"] == again.json["usage"]
                assert again.headers["x-autobot-optimizations"].startswith("response_caching;tokens_saved=")
                assert made.json["id"] != again.json["id"]
        assert len(server.provider.requests) == 2
        page = (await server.get("/metrics")).body.decode()
    hits = {family.name: family.samples for family in text_string_to_metric_families(page)}["autobot_llm_cache_l1_hits"]
    assert [(sample.labels, sample.value) for sample in hits] == [({"provider": "native"}, 2)]


async def test_the_body_and_the_header_steer_the_cache() -> None:
    async with running_server() as server:
        miss = await server.post(CHAT, ASKED, **{"cache-control": "only-if-cached"})
        assert (miss.status, miss.json["error"]["code"]) == (504, "not_cached")
        assert server.provider.requests == []
        await server.post(CHAT, ASKED)
        await server.post(CHAT, ASKED | {"cache": {"mode": "bypass"}})
        await server.post(CHAT, ASKED, **{"cache-control": "no-store"})
        await server.post(CHAT, ASKED | {"cache": {"mode": "default"}}, **{"cache-control": "no-store"})
        assert len(server.provider.requests) == 3
        assert all(request.extra_body == {} for request in server.provider.requests)
        for bad in ({"mode": "often"}, {"ttl": "long"}, {"time": 3}, "yes", 3):
            refusal = await server.post(CHAT, ASKED | {"cache": bad})
            assert refusal.status == 400
            assert refusal.json["error"]["param"].startswith("cache")


async def test_every_dialect_takes_the_field_and_the_header() -> None:
    anthropic = {"model": "tiny", "max_tokens": 9, "messages": QUESTION, "temperature": 0}
    ollama = {"model": "tiny", "messages": QUESTION, "stream": False, "options": {"temperature": 0}}
    async with running_server() as server:
        for path, body in (("/v1/messages", anthropic), ("/api/chat", ollama)):
            server.provider.requests.clear()
            for _ in range(2):
                assert (await server.post(path, body)).status == 200
            assert len(server.provider.requests) == 1
            await server.post(path, body | {"cache": {"mode": "refresh"}})
            await server.post(path, body, **{"cache-control": "no-cache"})
            assert len(server.provider.requests) == 3


async def test_keys_of_different_owners_never_share() -> None:
    async with running_server(api_keys=("one", "two")) as server:
        for key in ("one", "two", "one"):
            await server.post(CHAT, ASKED, authorization=f"Bearer {key}")
        assert len(server.provider.requests) == 2
