"""A hit that is given at once is, byte for byte, what the same answer is event by event, in every dialect.

The slow twin is an interface that has nothing at once, so that every answer goes through the chain and is collected.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobot_llm.errors import LLMError
from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import Metrics
from autobot_llm.providers.scripted import Line, ScriptedProvider
from autobot_llm.server.app import create_app
from autobot_llm.settings import Settings
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    LLMRequest,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from autobot_llm.universal.kept_answer import KeptAnswer

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEY = "sesame"
# What is each request's own: its id, the moment, and how long things took.
OWN = re.compile(
    rb'[0-9a-f]{32}|"created":\d+|"created_at":"[^"]*"|"total_duration":\d+|"milliseconds_saved":[\d.e-]+|ms_saved=[\d.e-]+'
)

TEXT = st.text(st.characters(), max_size=8)  # line ends of Unicode and halves of surrogate pairs among them
LOGPROB = st.builds(lambda text: TokenLogprob(1, text, -0.5, ((2, "x", -1.0),)), TEXT)
INDEX = st.integers(0, 1)


@st.composite
def calls(draw: st.DrawFn) -> list[Event]:
    """A tool call in two pieces; some without a name, some with arguments that are no object."""
    name = draw(st.sampled_from(["f", "g", None]))
    arguments = draw(st.sampled_from(['{"a": 1}', "{}", "[1]", '{"a']))
    position = draw(INDEX)
    return [
        ToolCallDelta(position=position, call_id="c", name=name, arguments=arguments[:2]),
        ToolCallDelta(position=position, arguments=arguments[2:]),
    ]


PIECES = st.lists(
    st.one_of(
        st.builds(lambda text, index, logprobs: [TextDelta(text, index, tuple(logprobs))],
                  TEXT, INDEX, st.lists(LOGPROB, max_size=2)),
        st.builds(lambda text, proof: [ReasoningDelta(text, signature=proof)], TEXT, st.sampled_from([None, "s"])),
        st.builds(lambda text: [RefusalDelta(text)], TEXT),
        calls(),
    ),
    max_size=6,
)  # fmt: skip
REASONS = st.sampled_from(["stop", "length", "tool_calls", "content_filter"])


@st.composite
def scripts(draw: st.DrawFn) -> list[Line]:
    """An answer with two choices and everything that can be in it, now and then without the end of a choice."""
    lines: list[Line] = [event for piece in draw(PIECES) for event in piece]
    for index in draw(st.sampled_from([(0, 1), (0, 1), (0, 1), (0,)])):
        stop = draw(st.sampled_from([None, "END"]))
        lines.append(ChoiceEnd(finish_reason=draw(REASONS), index=index, stop_sequence=stop))
    usage = Usage(prompt_tokens=draw(st.integers(0, 9)), completion_tokens=3, cached_tokens=draw(st.integers(0, 2)))
    return [*lines, Finish(usage=usage)]


SHARED = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.0, 1, -1]),
        "seed": st.just(3),
        "stop": st.sampled_from(["a", ["a", "b"]]),
        "top_p": st.sampled_from([0.5, 7]),
        "model": st.sampled_from(["tiny", "native/tiny", "nobody/knows", "other"]),
        "cache": st.sampled_from(
            [{"mode": "refresh"}, {"mode": "bypass"}, {"mode": "only-if-cached"}, {"max_age": 0}, {"ttl": 60}, {}, 3]
        ),
        "logprobs": st.just(True),
        "user": st.just("somebody"),
    },
)
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
FORMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": MESSAGES | {"max_tokens": 9},
    "/api/chat": MESSAGES | {"model": "tiny"},
    "/api/generate": {"prompt": "hi", "model": "tiny"},
}
HEADERS = st.sampled_from([(), ((b"cache-control", b"no-cache"),), ((b"cache-control", b"max-age=60"),)])


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, Sequence[tuple[bytes, bytes]]]:
    path = draw(st.sampled_from(sorted(FORMS)))
    fields = draw(SHARED)
    body = FORMS[path] | {"n": 2, "temperature": 0} | fields | {"stream": draw(st.booleans())}
    if path in ("/v1/messages", "/api/chat", "/api/generate"):
        body.pop("n")
    if path.startswith("/api"):
        options = {name: body.pop(name) for name in ("temperature", "seed", "stop", "top_p") if name in body}
        body |= {"options": options, "model": FORMS[path]["model"]}
    return path, json.dumps(body).encode(), draw(HEADERS)


class EventByEvent(LLMInterface):
    """The slow twin."""

    def kept(self, request: LLMRequest) -> KeptAnswer | None:
        return None


class Site:
    """A whole application in front of a script, asked without a socket."""

    def __init__(self, kind: type[LLMInterface], script: Sequence[Line], folder: Path) -> None:
        provider = ScriptedProvider(script, name="native", models=("tiny",))
        values = Settings(cache_dir=folder, api_keys=(KEY,))
        self.llm = kind(values, providers={"native": provider})
        self.metrics = Metrics()
        self._app = create_app(self.llm, values, self.metrics)

    async def ask(self, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> tuple[int, Any, bytes]:
        """The status, the headers and the body, all without what is the request's own."""
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            sent.append(message)

        key = (b"authorization", b"Bearer " + KEY.encode())
        version = (b"anthropic-version", b"2023-06-01")
        scope = {"type": "http", "method": "POST", "path": path, "headers": [key, version, *headers]}
        scope["extensions"] = {"autobot_llm.departure": {"listen": lambda listener: None}}
        await self._app(scope, receive, send)
        whole = b"".join(message["body"] for message in sent[1:])
        content = [(name, b"") if name == b"content-length" else (name, value) for name, value in sent[0]["headers"]]
        return sent[0]["status"], [(name, own(value)) for name, value in content], own(whole)

    def counted(self) -> dict[str, str]:
        """Everything on the page of metrics that is no time."""
        lines = self.metrics.page().decode().splitlines()
        numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: value for name, value in numbers.items() if "_sum" not in name and "_bucket" not in name}


def own(data: bytes) -> bytes:
    return OWN.sub(b"?", data)


@FEW
@given(scripts(), st.lists(requests(), min_size=1, max_size=3))
async def test_a_hit_at_once_is_the_hit_event_by_event(
    script: list[Line], asked: list[tuple[str, bytes, Sequence[tuple[bytes, bytes]]]]
) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        fast, slow = Site(LLMInterface, script, Path(one)), Site(EventByEvent, script, Path(other))
        async with fast.llm, slow.llm:
            for path, body, headers in (*asked, *asked, *asked):
                assert await fast.ask(path, body, headers) == await slow.ask(path, body, headers)
            assert fast.counted() == slow.counted()
            assert fast.llm.get_metrics() == slow.llm.get_metrics()
            assert without_times(fast.llm) == without_times(slow.llm)


def without_times(llm: LLMInterface) -> dict[str, object]:
    figures = llm.get_cache_metrics()
    return {name: figures[name] for name in ("num_lookups", "num_l1_hits", "num_l2_hits", "num_stored", "l1_entries")}


OPTIONS = st.fixed_dictionaries(
    {"messages": st.just([{"role": "user", "content": "hi"}])},
    optional={
        "temperature": st.sampled_from([0, 0.0, False, 5.0, -1]),
        "seed": st.sampled_from([3, -3]),
        "n": st.sampled_from([1, 2, 0]),
        "tenant": st.sampled_from(["a", "b"]),
        "timeout": st.sampled_from([60.0, -1.0]),
        "cache": st.sampled_from([{}, {"mode": "only-if-cached"}, {"mode": "bypass"}, {"max_age": 0.0}, {"ttl": -1.0}]),
        "provider": st.sampled_from(["native", "nobody"]),
        "request_id": st.sampled_from(["mine", "\n"]),
        "priority": st.sampled_from([1, 2**40]),
        "tools": st.just([{"type": "web_search"}]),
    },
)


@FEW
@given(scripts(), st.lists(OPTIONS, min_size=1, max_size=4))
async def test_the_library_answers_at_once_as_it_does_event_by_event(
    script: list[Line], asked: list[dict[str, Any]]
) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        fast, slow = Site(LLMInterface, script, Path(one)).llm, Site(EventByEvent, script, Path(other)).llm
        async with fast, slow:
            for options in (*asked, *asked, *asked):
                assert await answer(fast, options) == await answer(slow, options)
            assert fast.get_metrics() == slow.get_metrics()
            assert without_times(fast) == without_times(slow)


async def answer(llm: LLMInterface, options: dict[str, Any]) -> object:
    """The answer without its times and an id of our own, or the error."""
    try:
        response = await llm.chat_completion(**options)
    except LLMError as error:
        return type(error), error.message, error.param, error.code
    lines = tuple(msgspec.structs.replace(line, milliseconds_saved=None) for line in response.optimizations)
    request_id = options.get("request_id", re.sub("[0-9a-f]{24}", "?", response.request_id))
    had_a_piece = response.time_to_first_token is not None
    return had_a_piece, msgspec.structs.replace(
        response, optimizations=lines, request_id=request_id, processing_time=0.0, time_to_first_token=None
    )


async def test_a_repeated_request_does_get_its_answer_at_once() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = Site(LLMInterface, ["a", "b"], Path(folder))
        request = LLMRequest(prompt="hi", temperature=0)
        async with site.llm as llm:
            assert llm.kept(request) is None
            await llm.chat_completion(request)
            kept = llm.kept(request)
            assert kept is not None and kept.num_pieces == (2, 1)
            assert [event.text for event in kept.events() if isinstance(event, TextDelta)] == ["a", "b"]
            assert llm.get_cache_metrics()["num_l1_hits"] == 1
        assert llm.kept(request) is None, "a closed interface answers nothing"


async def test_what_is_made_of_an_entry_counts_as_its_memory_until_it_goes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = Site(LLMInterface, ["word " * 1000], Path(folder))
        body = json.dumps(MESSAGES | {"temperature": 0}).encode()
        async with site.llm as llm:
            await site.ask("/v1/chat/completions", body, ())
            alone = llm.get_cache_metrics()["l1_bytes"]
            await site.ask("/v1/chat/completions", body, ())
            grown = llm.get_cache_metrics()["l1_bytes"]
            await site.ask("/v1/chat/completions", body, ())
            assert isinstance(alone, int) and isinstance(grown, int) and grown > alone + 10_000
            assert llm.get_cache_metrics()["l1_bytes"] == grown, "made once"
            await llm.clear_cache()
            assert llm.get_cache_metrics()["l1_bytes"] == 0


async def test_a_long_stream_from_memory_is_written_in_bounded_parts() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = Site(LLMInterface, ["word " * 1000] * 100, Path(folder))
        body = json.dumps(MESSAGES | {"temperature": 0, "stream": True}).encode()
        async with site.llm:
            made = await site.ask("/v1/chat/completions", body, ())
            assert await site.ask("/v1/chat/completions", body, ()) == made
