"""What our server writes in OpenAI's language, our client reads back as it was, whole, in pieces and cut anywhere."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import AsyncGenerator, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.collect import collect
from autobot_llm.dialects.error_in_stream import ErrorInStream
from autobot_llm.dialects.openai.answers import UNKNOWN_TOKEN, ChatReader, TextReader, read_models
from autobot_llm.dialects.openai.chunks import ChatChunks, CompletionChunks
from autobot_llm.dialects.openai.embeddings import (
    EncodingFormat,
    embedding_reply,
    from_base64,
    read_embedding_body,
    read_embeddings,
    to_base64,
)
from autobot_llm.dialects.openai.rate_limits import read_rate_limits
from autobot_llm.dialects.openai.replies import ChatReply
from autobot_llm.errors import InvalidRequestError, LLMError, ProviderError
from autobot_llm.transport.sse import SseParser
from autobot_llm.types import (
    ChoiceEnd,
    EmbeddingRequest,
    EmbeddingResponse,
    Event,
    Finish,
    LLMResponse,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NUMBER = st.integers(0, 10**6)
USAGE = st.builds(
    Usage, prompt_tokens=NUMBER, completion_tokens=NUMBER, cached_tokens=NUMBER, reasoning_tokens=NUMBER
)  # fmt: skip
TOKEN = st.builds(
    lambda text, logprob: TokenLogprob(UNKNOWN_TOKEN, text, logprob, ((UNKNOWN_TOKEN, text, logprob),)),
    TEXT, st.floats(-100, 0),
)  # fmt: skip


def whole_body(answer: LLMResponse) -> bytes:
    reply = ChatReply("r", 1)
    return reply.body(reply.lasting(answer), answer)


@st.composite
def choices(draw: st.DrawFn, index: int) -> list[Event]:
    """The events of one choice."""
    pieces: list[Event] = []
    for kind in draw(st.lists(st.sampled_from(["text", "logprobs", "reasoning", "refusal"]), min_size=1, max_size=5)):
        text = draw(TEXT)
        if kind == "text":
            pieces.append(TextDelta(text, index))
        elif kind == "logprobs":
            pieces.append(TextDelta(text, index, (draw(TOKEN),)))
        elif kind == "reasoning":
            pieces.append(ReasoningDelta(text, index))
        else:
            pieces.append(RefusalDelta(text, index))
    for position in range(draw(st.integers(0, 2))):
        call = f"call_{index}_{position}"
        pieces.append(ToolCallDelta(position=position, index=index, call_id=call, name=draw(TEXT), arguments="{"))
        pieces.append(ToolCallDelta(position=position, index=index, arguments=draw(TEXT)))
    reason = draw(st.sampled_from(["stop", "length", "tool_calls", "content_filter"]))
    stop = draw(st.none() | TEXT)
    return [*pieces, ChoiceEnd(finish_reason=reason, index=index, stop_sequence=stop)]  # type: ignore[arg-type]


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[Event], int]:
    """A whole stream of events, its choices interleaved, and their number."""
    num_choices = draw(st.integers(1, 3))
    queues = [draw(choices(index)) for index in range(num_choices)]
    events: list[Event] = [Start(request_id="r", model=draw(TEXT), provider="p")]
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        events.append(queue.pop(0))
    return [*events, Finish(usage=draw(USAGE))], num_choices


@st.composite
def cut(draw: st.DrawFn, text: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(st.data())
def test_a_stream_that_we_write_we_read_as_it_was(data: st.DataObject) -> None:
    events, num_choices = data.draw(answers())
    encoder = ChatChunks("r", 1, num_choices, include_usage=True)
    wire = b"".join(encoder.encode(event) for event in events)
    parser, reader = SseParser(), ChatReader("r", "p", "m", num_choices)
    chunks = data.draw(cut(wire))
    found = [event for chunk in chunks for sent in parser.feed(chunk) for event in reader.read(sent.data)]
    assert found == events[:-1]
    assert reader.is_done
    assert reader.num_missing == 0
    assert reader.usage == events[-1].usage  # type: ignore[union-attr]


async def play(events: Sequence[Event]) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event


@given(answers())
async def test_an_answer_that_we_write_whole_we_read_as_it_was(answer: tuple[list[Event], int]) -> None:
    events, num_choices = answer
    response = await collect(play(events))
    reader = ChatReader("r", "p", "m", num_choices)
    read = reader.read(whole_body(response))
    again = await collect(play([*read, Finish(usage=reader.usage)]))
    assert (again.choices, again.usage, again.model) == (response.choices, response.usage, response.model)


@given(st.data())
def test_a_text_completion_that_we_write_we_read_as_it_was(data: st.DataObject) -> None:
    pieces: list[Event] = [TextDelta(text) for text in data.draw(st.lists(TEXT, max_size=4))]
    usage = data.draw(USAGE)
    events = [Start(request_id="r", model="m", provider="p"), *pieces, ChoiceEnd(finish_reason="length")]
    encoder, parser, reader = CompletionChunks("r", 1, 1, True), SseParser(), TextReader("r", "p", "m")
    wire = b"".join(encoder.encode(event) for event in [*events, Finish(usage=usage)])
    found = [event for chunk in data.draw(cut(wire)) for sent in parser.feed(chunk) for event in reader.read(sent.data)]
    assert (found, reader.usage) == (events, usage)


KEYS = st.sampled_from(
    ["choices", "delta", "message", "content", "tool_calls", "index", "function", "arguments", "usage", "error", "code",
     "logprobs", "finish_reason", "reasoning", "model", "type", "text", "thinking", "data", "embedding", "id", "x"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.one_of(st.binary(max_size=30), JSON.map(msgspec.json.encode)))
def test_nonsense_is_an_error_of_ours_and_never_another(data: bytes) -> None:
    for reader in (ChatReader("r", "p", "m"), TextReader("r", "p", "m")):
        with contextlib.suppress(ProviderError, ErrorInStream):
            reader.read(data)
    with contextlib.suppress(ProviderError):
        read_models(data, "p")
    with contextlib.suppress(ProviderError):
        read_embeddings(data, EmbeddingRequest(inputs=["a"]), provider="p", model="m")
    with contextlib.suppress(LLMError):
        read_embedding_body(data, request_id="r", tenant="")


FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5)


@given(st.lists(FLOATS, min_size=1, max_size=3), st.sampled_from(["float", "base64"]))
def test_vectors_survive_both_encodings_exactly(vectors: list[list[float]], encoding: EncodingFormat) -> None:
    finite = [[number if abs(number) < 1e30 else 0.0 for number in vector] for vector in vectors]
    response = EmbeddingResponse(
        vectors=tuple(finite),
        model="m",
        provider="p",
        usage=Usage(prompt_tokens=3, completion_tokens=0),
        request_id="r",
    )
    request = EmbeddingRequest(inputs=["x"] * len(finite), request_id="r")
    again = read_embeddings(embedding_reply(response, encoding), request, provider="p", model="?")
    assert [list(vector) for vector in again.vectors] == finite
    assert (again.model, again.usage) == ("m", response.usage)
    assert from_base64(to_base64(finite[0])) == array("f", finite[0])


@pytest.mark.parametrize(
    ("given_input", "inputs"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_form_of_input_is_read(given_input: object, inputs: list[object]) -> None:
    body = msgspec.json.encode(
        {"input": given_input, "model": "m", "dimensions": 3, "user": "u", "input_type": "query"}
    )
    request, encoding = read_embedding_body(body, request_id="r", tenant="t")
    assert (request.inputs, request.model, request.dimensions, request.tenant) == (inputs, "m", 3, "t")
    assert (request.extra_body, encoding) == ({"input_type": "query"}, "float")


@pytest.mark.parametrize("wrong", [[], [1, "a"], 7, None, {"a": 1}])
def test_an_input_of_no_form_is_refused_by_name(wrong: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_embedding_body(msgspec.json.encode({"input": wrong, "model": "m"}), request_id="r", tenant="")
    assert caught.value.param is not None
    assert caught.value.param.startswith("input")


def test_rate_limits_are_read_from_every_form_of_header() -> None:
    limits = read_rate_limits(
        {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59",
         "x-ratelimit-reset-requests": "1m30.5s", "x-ratelimit-remaining-tokens": "100",
         "x-ratelimit-reset-tokens": "20ms"}
    )  # fmt: skip
    assert limits is not None
    assert limits.requests is not None
    assert limits.tokens is not None
    assert (limits.requests.limit, limits.requests.remaining, limits.requests.reset_seconds) == (60, 59, 90.5)
    assert (limits.tokens.limit, limits.tokens.remaining, limits.tokens.reset_seconds) == (None, 100, 0.02)
    assert read_rate_limits({"content-type": "x", "x-ratelimit-remaining-requests": "many"}) is None
