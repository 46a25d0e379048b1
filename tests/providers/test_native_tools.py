"""Tools on our own engine: forced and offered calls in every family's form, with the embedded model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from family_folders import family_folder

from autobot_llm import LLMInterface, load_settings
from autobot_llm.collect import collect
from autobot_llm.engine.request import Output, RequestStats, TokenInfo
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.engine.tool_calls.formats import HERMES, LLAMA, MISTRAL, CallFormat, Function, call_format
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.providers.native.answer_shape import Tools
from autobot_llm.providers.native.from_engine import Answer
from autobot_llm.settings import Settings
from autobot_llm.types import ChoiceEnd, Finish, LLMResponse, TextDelta, ToolCallDelta

ASKED = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 16},
        "unit": {"$ref": "#/$defs/unit"},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
TIME["additionalProperties"] = False
SCHEMAS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "tell_time": TIME}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A function.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
FORMS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}


def settings_for(folder: Path | None) -> Settings:
    overrides: dict[str, Any] = {"cpu_threads": 2}
    if folder is not None:
        overrides["default_model"] = str(folder)
    return load_settings(environ={}, env_file=None, overrides=overrides)


@pytest.fixture
async def llm() -> AsyncIterator[LLMInterface]:
    """The embedded model, whose template has no place for tools."""
    async with LLMInterface(settings_for(None)) as made:
        yield made


@pytest.fixture(params=["hermes", "llama", "mistral", "hermes special", "llama special", "mistral special"])
async def family(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LLMInterface]:
    """A model of each family, its opening marker spelled out or a special token."""
    name, _, is_special = request.param.partition(" ")
    marker = FORMS[name].markers.open if is_special else None
    folder = family_folder(tmp_path / "model", name, special_marker=marker)
    async with LLMInterface(settings_for(folder)) as made:
        yield made


def check_calls(answer: LLMResponse) -> None:
    """Calls that are valid, but for the last one of an answer that was cut."""
    calls = list(answer.tool_calls)
    assert answer.finish_reason in ("tool_calls", "length")
    if answer.finish_reason == "length":
        calls = calls[:-1]
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert len({call.id for call in calls}) == len(calls)


# --- forced calls -----------------------------------------------------------------------------------------------------


async def test_every_family_makes_a_forced_call_in_its_own_form(family: LLMInterface) -> None:
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"tools": TOOLS, "temperature": temperature, "seed": 5, "max_tokens": 80}
        named = {"type": "function", "function": {"name": "tell_time"}}
        answer = await family.chat_completion(ASKED, tool_choice=named, **options)
        assert [call.name for call in answer.tool_calls] == ["tell_time"]
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")
        check_calls(answer)
        one = {"parallel_tool_calls": False}
        answer = await family.chat_completion(ASKED, tool_choice="required", extra_body=one, **options)
        assert len(answer.tool_calls) == 1
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")
        check_calls(answer)
        answer = await family.chat_completion(ASKED, tool_choice="required", **options)
        assert len(answer.tool_calls) >= 1
        check_calls(answer)


async def test_a_conversation_goes_on_after_a_call(family: LLMInterface) -> None:
    """The call and its result go back as OpenAI's clients send them, ids included."""
    options: dict[str, Any] = {"tools": TOOLS, "max_tokens": 100, "temperature": 0}
    one: dict[str, Any] = {"tool_choice": "required", "extra_body": {"parallel_tool_calls": False}}
    first = await family.chat_completion(ASKED, **options, **one)
    (call,) = first.tool_calls
    function = {"name": call.name, "arguments": call.arguments}
    history = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    second = await family.chat_completion(history, **options)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    check_calls(await family.chat_completion(history, **options, **one))


async def test_a_forced_call_streams_its_arguments_in_pieces(llm: LLMInterface) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    events = [event async for event in llm.stream(ASKED, tools=TOOLS, tool_choice=named, temperature=0)]
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    assert (deltas[0].name, deltas[0].position) == ("get_weather", 0)
    assert deltas[0].call_id is not None and deltas[0].call_id.startswith("call_")
    assert all(delta.call_id is None and delta.name is None for delta in deltas[1:])
    assert sum(bool(delta.arguments) for delta in deltas) > 2
    jsonschema.validate(json.loads("".join(delta.arguments for delta in deltas)), WEATHER)
    assert events[-2] == ChoiceEnd(finish_reason="tool_calls")
    assert not any(isinstance(event, TextDelta) for event in events)


async def test_a_call_that_max_tokens_cuts_says_so(llm: LLMInterface) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = await llm.chat_completion(ASKED, tools=TOOLS, tool_choice=named, temperature=0, max_tokens=22)
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 22
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.tool_calls[0].arguments)


async def test_every_choice_has_calls_of_its_own(llm: LLMInterface) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = await llm.chat_completion(ASKED, tools=TOOLS, tool_choice=named, temperature=1.0, seed=1, n=4, logprobs=1)
    ids = [choice.tool_calls[0].id for choice in answer.choices]
    assert len(set(ids)) == 4
    for choice in answer.choices:
        if choice.finish_reason == "tool_calls":
            jsonschema.validate(json.loads(choice.tool_calls[0].arguments), WEATHER)
            assert "".join(token.token for token in choice.logprobs).count("get_weather") == 1


async def test_descriptions_may_hold_anything(llm: LLMInterface) -> None:
    """They are part of the schema in the grammar, and of the prompt."""
    text = '// no comment # nor this } { "quoted" \\ %json <[1]> \n é 火 </tool_call>'
    schema = {
        "type": "object",
        "description": text,
        "properties": {text: {"enum": [text, "b"], "description": text}},
        "required": [text],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f", "description": text, "parameters": schema}}]
    answer = await llm.chat_completion(ASKED, tools=tools, tool_choice=function(), temperature=0, max_tokens=300)
    (call,) = answer.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert json.loads(call.arguments)[text] in (text, "b")


async def test_a_function_without_parameters_is_called_with_none(llm: LLMInterface) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    answer = await llm.chat_completion(
        ASKED, tools=tools, tool_choice="required", extra_body={"parallel_tool_calls": False}, temperature=0
    )
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [("now", {})]


# --- offered calls ----------------------------------------------------------------------------------------------------


async def test_offered_tools_leave_an_answer_in_words_as_it_is(llm: LLMInterface) -> None:
    answer = await llm.chat_completion(ASKED, tools=TOOLS, temperature=0, max_tokens=40)
    assert answer.content and not answer.tool_calls
    assert answer.finish_reason in ("stop", "length")


@pytest.mark.parametrize(("name", "opening"), [("hermes", 1), ("mistral", 1), ("llama", 95)])
async def test_a_call_that_a_model_begins_by_itself_obeys_a_strict_schema(
    name: str, opening: int, tmp_path: Path
) -> None:
    """A bias makes the model open a call, which nothing else would make it do."""
    folder = family_folder(tmp_path / "model", name, special_marker=FORMS[name].markers.open)
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
    async with LLMInterface(settings_for(folder)) as llm:
        options: dict[str, Any] = {"tools": tools, "temperature": 0, "max_tokens": 150, "logit_bias": {opening: 100.0}}
        answer = await llm.chat_completion(ASKED, extra_body={"parallel_tool_calls": False}, **options)
        assert len(answer.tool_calls) == 1
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")
        check_calls(answer)
        check_calls(await llm.chat_completion(ASKED, **options))
        del options["logit_bias"]
        words = await llm.chat_completion(ASKED, **options)
        assert words.content and not words.tool_calls


async def test_tool_choice_none_leaves_the_tools_out(llm: LLMInterface) -> None:
    with_tools = await llm.chat_completion(ASKED, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=20)
    without = await llm.chat_completion(ASKED, temperature=0, max_tokens=20)
    assert (with_tools.content, with_tools.usage.prompt_tokens) == (without.content, without.usage.prompt_tokens)


async def test_calls_in_words_become_deltas_with_their_log_probabilities(llm: LLMInterface) -> None:
    """What a model writes by itself, as the engine hands it over: text, a call, and what is none."""
    engine = llm._in_use.get("native").provider._services["tiny"].engine  # type: ignore[attr-defined]
    tools = Tools((Function("add"),), HERMES, is_known=True)
    answer = Answer(engine, RequestStats(), num_prompt_tokens=3, tools=tools)
    texts = [
        "Well. <tool",
        '_call>\n{"name": "add", "argu',
        'ments": {"a"',
        ": 1}}\n</tool_call>",
        "",
        "\n<tool_call>no",
    ]
    logprobs = (TokenInfo(5, -1.0, ()),)
    outputs = [Output(0, 0, text, number + 1, logprobs) for number, text in enumerate(texts)]
    outputs[-1].end = "stop"
    events = [event for output in outputs for event in answer.events([output])]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert text == "Well. \n<tool_call>no"
    assert "".join(call.arguments for call in calls) == '{"a": 1}'
    assert sum(len(event.logprobs) for event in events if isinstance(event, TextDelta)) == len(texts)
    assert events[-1] == ChoiceEnd(finish_reason="tool_calls")
    assert isinstance(answer.finish(), Finish)


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_a_models_form_is_told_from_its_template(name: str, tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", name)
    assert call_format(Tokenizer.from_folder(folder)) is FORMS[name]


def test_a_form_that_is_not_known_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(family_folder(tmp_path / "model", "xml"))
    with pytest.raises(UnsupportedError, match="form that is not known here") as caught:
        call_format(tokenizer)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(("form", "length"), [(HERMES, 29), (LLAMA, 29), (MISTRAL, 9)])
def test_ids_are_as_a_familys_template_wants_them(form: CallFormat, length: int) -> None:
    ids = {form.call_id() for _ in range(50)}
    assert len(ids) == 50 and {len(call_id) for call_id in ids} == {length}


# --- refusals ---------------------------------------------------------------------------------------------------------


def function(name: object = "f", **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


@pytest.mark.parametrize(
    ("options", "error", "message", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, UnsupportedError, "tools of type 'function'", "tools"),
        ({"tools": [{"type": "function"}]}, InvalidRequestError, r"tools\[0\].function", "tools"),
        ({"tools": [function("no spaces")]}, InvalidRequestError, r"tools\[0\].function.name", "tools"),
        ({"tools": [function(parameters=[])]}, InvalidRequestError, "expected a JSON schema", "tools"),
        ({"tools": [function(), function()]}, InvalidRequestError, "described twice", "tools"),
        ({"tools": [function()] * 200}, InvalidRequestError, "at most 128", "tools"),
        (
            {"tools": [function(parameters={"type": "object", "not": {}})], "tool_choice": "required"},
            InvalidRequestError,
            "Unimplemented keys",
            "tools",
        ),
        ({"tools": TOOLS, "tool_choice": function("other")}, InvalidRequestError, "'other' is none of", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, UnsupportedError, "expected none", "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, UnsupportedError, "tools", "response_format"),
        (
            {"tools": TOOLS, "extra_body": {"parallel_tool_calls": "no"}},
            InvalidRequestError,
            "true or false",
            "parallel_tool_calls",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "stop": ["x"]}, UnsupportedError, "stop=", "stop"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, UnsupportedError, "ends", "ignore_eos"),
    ],
)
async def test_tools_that_cannot_be_honoured_are_refused_by_name(
    llm: LLMInterface, options: dict[str, Any], error: type[InvalidRequestError], message: str, param: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        await llm.chat_completion(ASKED, **options)
    assert caught.value.param == param


async def test_tools_with_a_prompt_are_refused(llm: LLMInterface) -> None:
    with pytest.raises(UnsupportedError, match="messages"):
        await collect(llm.stream(prompt="Hello", tools=TOOLS))
