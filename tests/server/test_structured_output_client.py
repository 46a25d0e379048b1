"""The official client against the real server and the embedded model: response formats, tools, whole and streamed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from server_harness import Server, serving

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.settings import Settings

ASKED: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    city: str = pydantic.Field(max_length=16)
    unit: Literal["celsius", "fahrenheit"]


TOOL: Any = openai.pydantic_function_tool(Weather, name="get_weather")
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = Weather.model_json_schema()


@contextlib.asynccontextmanager
async def native_server() -> AsyncIterator[Server[NativeProvider]]:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    async with serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server:
        yield server


async def test_parse_returns_the_object_that_was_described() -> None:
    async with native_server() as server, server.client() as client:
        parsed = await client.chat.completions.parse(
            model="tiny", messages=ASKED, response_format=Weather, temperature=0
        )
        weather = parsed.choices[0].message.parsed
        assert isinstance(weather, Weather)
        async with client.chat.completions.stream(
            model="tiny", messages=ASKED, response_format=Weather, temperature=0
        ) as stream:
            streamed = await stream.get_final_completion()
        assert streamed.choices[0].message.parsed == weather


async def test_json_mode_and_vllms_fields_answer_in_their_form() -> None:
    async with native_server() as server, server.client() as client:
        create = client.chat.completions.create
        answer = await create(
            model="tiny", messages=ASKED, response_format={"type": "json_object"}, temperature=0, max_tokens=300
        )
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
        bodies: list[dict[str, Any]] = [
            {"guided_choice": ["sunny", "rainy"]},
            {"structured_outputs": {"choice": ["sunny", "rainy"]}},
        ]
        for body in bodies:
            chosen = await create(model="tiny", messages=ASKED, extra_body=body, temperature=0)
            assert chosen.choices[0].message.content in ("sunny", "rainy")
        completion = await client.completions.create(
            model="tiny", prompt="It is", extra_body={"guided_regex": " (hot|cold)"}, max_tokens=20
        )
        assert completion.choices[0].text in (" hot", " cold")


async def test_a_forced_call_reaches_the_client_whole_and_in_pieces() -> None:
    async with native_server() as server, server.client() as client:
        options: Any = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "tool_choice": NAMED, "temperature": 0}
        answer = (await client.chat.completions.create(**options)).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        assert call.type == "function" and call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        pieces, reasons = [], []
        async for chunk in await client.chat.completions.create(stream=True, **options):
            for choice in chunk.choices:
                pieces += choice.delta.tool_calls or []
                reasons += [choice.finish_reason] if choice.finish_reason else []
        assert reasons == ["tool_calls"]
        assert [piece.function.name for piece in pieces if piece.function and piece.function.name] == ["get_weather"]
        assert "".join(piece.function.arguments or "" for piece in pieces if piece.function) == call.function.arguments
        assert len(pieces) > 3


async def test_the_clients_own_helper_streams_a_parsed_call() -> None:
    async with native_server() as server, server.client() as client:
        async with client.chat.completions.stream(
            model="tiny", messages=ASKED, tools=[TOOL], tool_choice=NAMED, temperature=0
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
        calls = final.choices[0].message.tool_calls
        assert calls is not None and isinstance(calls[0].function.parsed_arguments, Weather)


async def test_strict_tools_that_are_only_offered_leave_words_as_they_are() -> None:
    async with native_server() as server, server.client() as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=ASKED, tools=[TOOL], parallel_tool_calls=False, temperature=0, max_tokens=30
        )
        assert answer.choices[0].message.content
        assert not answer.choices[0].message.tool_calls


async def test_a_schema_that_is_none_is_a_400_that_names_the_field() -> None:
    async with native_server() as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="Invalid type: foo") as caught:
            await client.chat.completions.create(
                model="tiny",
                messages=ASKED,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}},
            )
        assert caught.value.param == "response_format"
