"""Structured output on our own engine, as requests ask for it: which fields say what, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import jsonschema
import pytest

from autobot_llm import LLMInterface, load_settings
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import TextDelta

ASKED = [{"role": "user", "content": "Tell me of a fox named Red."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"enum": ["fox", "hen"]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["name", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.fixture
async def llm() -> AsyncIterator[LLMInterface]:
    settings = load_settings(environ={}, env_file=None, overrides={"cpu_threads": 2})
    async with LLMInterface(settings) as made:
        yield made


SCHEMA_FIELDS: list[dict[str, Any]] = [
    {"response_format": NAMED},
    {"extra_body": {"guided_json": SCHEMA}},
    {"extra_body": {"guided_json": json.dumps(SCHEMA)}},
    {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    {"extra_body": {"structured_outputs": {"json": SCHEMA, "regex": None}}},
]


async def test_every_way_to_ask_for_a_schema_gives_the_same_answer(llm: LLMInterface) -> None:
    answers = [(await llm.chat_completion(ASKED, temperature=0, **fields)) for fields in SCHEMA_FIELDS]
    assert len({answer.content for answer in answers}) == 1
    jsonschema.validate(json.loads(answers[0].content), SCHEMA)
    assert {answer.finish_reason for answer in answers} == {"stop"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_each_kind_of_grammar_gives_what_it_describes(llm: LLMInterface, temperature: float) -> None:
    async def ask(**fields: Any) -> str:
        answer = await llm.chat_completion(ASKED, temperature=temperature, seed=3, max_tokens=300, **fields)
        assert answer.finish_reason == "stop"
        return answer.content

    assert isinstance(json.loads(await ask(response_format={"type": "json_object"})), dict)
    assert isinstance(json.loads(await ask(extra_body={"structured_outputs": {"json_object": True}})), dict)
    assert re.fullmatch(r"\d{2}:\d{2}", await ask(extra_body={"guided_regex": r"\d{2}:\d{2}"}))
    assert re.fullmatch("(ä|ö){3}é", await ask(extra_body={"structured_outputs": {"regex": "(ä|ö){3}é"}}))
    assert await ask(extra_body={"guided_choice": ["red", "green"]}) in ("red", "green")
    assert await ask(extra_body={"structured_outputs": {"choice": ["火", "水\n"]}}) in ("火", "水\n")


def test_the_grammar_library_is_loaded_with_the_first_grammar_only() -> None:
    """An engine without it serves everything else."""
    program = "import sys, autobot_llm.providers.native.provider; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_a_recursive_schema_parses_or_is_cut(llm: LLMInterface) -> None:
    asked = (
        llm.chat_completion(ASKED, temperature=1.0, seed=seed, max_tokens=200, extra_body={"guided_json": TREE})
        for seed in range(8)
    )
    answers = await asyncio.gather(*asked)
    whole = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(whole) >= 2
    for answer in whole:
        jsonschema.validate(json.loads(answer.content), TREE)
    assert all(answer.usage.completion_tokens == 200 for answer in answers if answer.finish_reason == "length")


async def test_a_completion_without_messages_can_be_bound_too(llm: LLMInterface) -> None:
    answer = await llm.chat_completion(prompt="One, two,", extra_body={"guided_choice": [" three", " four"]})
    assert answer.content in (" three", " four")


async def test_max_tokens_cuts_an_answer_and_says_so(llm: LLMInterface) -> None:
    answer = await llm.chat_completion(ASKED, temperature=0, max_tokens=5, response_format=NAMED)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 5)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.content)


async def test_choices_stream_each_under_the_grammar(llm: LLMInterface) -> None:
    texts = ["", "", ""]
    async for event in llm.stream(ASKED, temperature=1.0, seed=1, n=3, logprobs=1, response_format=NAMED):
        if isinstance(event, TextDelta):
            texts[event.index] += event.text
            assert event.logprobs or not event.text
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


async def test_a_stop_string_cuts_what_an_expression_allows(llm: LLMInterface) -> None:
    fields: dict[str, Any] = {"extra_body": {"guided_regex": r"\d{3}\n\d{3}"}, "temperature": 0}
    whole = await llm.chat_completion(ASKED, **fields)
    assert re.fullmatch(r"\d{3}\n\d{3}", whole.content)
    cut = await llm.chat_completion(ASKED, stop=["\n"], **fields)
    assert (cut.content, cut.finish_reason) == (whole.content[:3], "stop")


async def test_leaving_in_the_middle_frees_everything(llm: LLMInterface) -> None:
    async with aclosing(llm.stream(ASKED, response_format={"type": "json_object"}, temperature=0)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    async with asyncio.timeout(20):
        while llm.get_metrics()["native"]["num_running"]:
            await asyncio.sleep(0.005)
    figures = llm.get_metrics()["native"]
    assert figures["num_free_blocks"] == figures["num_blocks"]


async def test_a_hostile_schema_does_not_hold_up_others(llm: LLMInterface) -> None:
    """While a schema of thousands of required properties compiles, another answer's tokens keep coming."""
    names = [f"property_{number}" for number in range(3_500)]
    costly = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}
    alone = await llm.chat_completion(ASKED, temperature=0, max_tokens=60)
    bound = asyncio.create_task(
        llm.chat_completion(ASKED, temperature=0, max_tokens=4, extra_body={"guided_json": costly})
    )
    text, longest, latest = "", 0.0, time.perf_counter()
    async for event in llm.stream(ASKED, temperature=0, max_tokens=60):
        longest, latest = max(longest, time.perf_counter() - latest), time.perf_counter()
        text += event.text if isinstance(event, TextDelta) else ""
    assert (await bound).finish_reason == "length"
    assert text == alone.content
    assert longest < 1.0


@pytest.mark.parametrize(
    ("options", "error", "message", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, InvalidRequestError, "name and a schema", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
            InvalidRequestError,
            "Invalid type: foo",
            "response_format",
        ),
        ({"extra_body": {"guided_json": "{"}}, InvalidRequestError, "not JSON", "guided_json"),
        ({"extra_body": {"guided_json": [1]}}, InvalidRequestError, "expected a JSON schema", "guided_json"),
        ({"extra_body": {"guided_regex": "(a"}}, InvalidRequestError, "unclosed group", "guided_regex"),
        ({"extra_body": {"guided_regex": ""}}, InvalidRequestError, "not empty", "guided_regex"),
        ({"extra_body": {"guided_choice": "yes"}}, InvalidRequestError, "list of texts", "guided_choice"),
        ({"extra_body": {"guided_grammar": "root ::= x"}}, UnsupportedError, "guided_grammar", "guided_grammar"),
        (
            {"extra_body": {"structured_outputs": {"grammar": "x"}}},
            UnsupportedError,
            "structured_outputs.grammar",
            "structured_outputs",
        ),
        ({"extra_body": {"structured_outputs": 3}}, InvalidRequestError, "an object", "structured_outputs"),
        (
            {"extra_body": {"guided_json": SCHEMA, "guided_regex": "a"}},
            InvalidRequestError,
            "guided_json is given, too",
            "guided_regex",
        ),
        ({"response_format": NAMED, "stop": ["\n"]}, UnsupportedError, "where the answer ends", "stop"),
        ({"response_format": NAMED, "stop_token_ids": [7]}, UnsupportedError, "stop_token_ids", "stop_token_ids"),
        ({"response_format": NAMED, "min_tokens": 4, "max_tokens": 9}, UnsupportedError, "min_tokens", "min_tokens"),
        ({"response_format": NAMED, "ignore_eos": True}, UnsupportedError, "ignore_eos", "ignore_eos"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    llm: LLMInterface, options: dict[str, Any], error: type[InvalidRequestError], message: str, param: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        await llm.chat_completion(ASKED, **options)
    assert caught.value.param == param
