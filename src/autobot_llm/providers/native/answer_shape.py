"""What a request says of the shape of its answer in the engine's terms. Knows both sides' types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.engine.tool_calls.formats import HERMES, CallFormat, Function, call_format
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import LLMRequest

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_FUNCTIONS = 128


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that an answer may call, in the model's form. `is_known`: its chat template shows them itself."""

    functions: tuple[Function, ...]
    form: CallFormat
    is_known: bool


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """`grammar` binds the text, and `field` of the request asked for it. `is_json`: cut short, it would not parse."""

    grammar: GrammarSpec | None = None
    field: str = ""
    is_json: bool = False
    tools: Tools | None = None


def answer_shape(request: LLMRequest, tokenizer: Tokenizer) -> AnswerShape:
    """Raises InvalidRequestError and UnsupportedError with the field's name."""
    shapes = [shape for shape in (_response_format(request), *_vllm_fields(request)) if shape is not None]
    if len(shapes) > 1:
        raise InvalidRequestError(
            f"{shapes[1].field}: {shapes[0].field} is given, too; expected one of them", param=shapes[1].field
        )
    shape = shapes[0] if shapes else AnswerShape()
    if request.tools and request.tool_choice != "none":
        if shapes:
            raise UnsupportedError(
                f"{shape.field}: not together with tools; tool_choice='none' leaves the tools out", param=shape.field
            )
        shape = _with_tools(request, tokenizer)
    if shape.grammar is not None:
        _refuse_other_ends(request, shape)
    return shape


def _refuse_other_ends(request: LLMRequest, shape: AnswerShape) -> None:
    """An answer under a grammar ends where the grammar does."""
    wrong: dict[str, object] = {"ignore_eos": request.ignore_eos, "min_tokens": request.min_tokens}
    if shape.is_json:
        wrong |= {"stop": request.stop, "stop_token_ids": request.stop_token_ids}
    for field, value in wrong.items():
        if value:
            raise UnsupportedError(
                f"{field}={value!r}: not together with {shape.field}, whose grammar says where the answer ends",
                param=field,
            )


# --- structured output ------------------------------------------------------------------------------------------------


def _response_format(request: LLMRequest) -> AnswerShape | None:
    wanted = request.response_format or {}
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return AnswerShape(GrammarSpec.json_object(), "response_format", is_json=True)
    described = wanted.get("json_schema")
    if not isinstance(described, Mapping) or "schema" not in described:
        raise InvalidRequestError(
            "response_format.json_schema: expected an object with a name and a schema", param="response_format"
        )
    return _json_schema(described["schema"], "response_format")


def _vllm_fields(request: LLMRequest) -> list[AnswerShape]:
    """vLLM's fields, older and newer. What is none of them is nobody's here, and refused."""
    shapes = []
    for field, value in request.extra_body.items():
        if field == "structured_outputs":
            shapes += _structured_outputs(value)
        elif field in _VLLM_FIELDS:
            shapes.append(_VLLM_FIELDS[field](value, field))
        elif field != "parallel_tool_calls":
            raise UnsupportedError(f"the native engine does not know the field {field!r}", param=field)
    return shapes


def _structured_outputs(value: object) -> list[AnswerShape]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError("structured_outputs: expected an object", param="structured_outputs")
    shapes = []
    for key, what in value.items():
        field = f"structured_outputs.{key}"
        if key not in _STRUCTURED_OUTPUTS:
            raise UnsupportedError(
                f"{field}: the native engine knows {', '.join(_STRUCTURED_OUTPUTS)}", param="structured_outputs"
            )
        if what is not None and what is not False:
            shapes.append(_STRUCTURED_OUTPUTS[key](what, field))
    return shapes


def _json_schema(schema: object, field: str) -> AnswerShape:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{field}: not JSON: {error}", param=field) from error
    return AnswerShape(GrammarSpec.json_schema(schema, field), field, is_json=True)


def _json_object(_value: object, field: str) -> AnswerShape:
    return AnswerShape(GrammarSpec.json_object(), field, is_json=True)


def _regex(expression: object, field: str) -> AnswerShape:
    return AnswerShape(GrammarSpec.regex(expression, field), field)


def _choice(choices: object, field: str) -> AnswerShape:
    return AnswerShape(GrammarSpec.choice(choices, field), field)


_Reader = Callable[[Any, str], AnswerShape]
_STRUCTURED_OUTPUTS: dict[str, _Reader] = {
    "json": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
}
_VLLM_FIELDS: dict[str, _Reader] = {
    "guided_json": _json_schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
}


# --- tools ------------------------------------------------------------------------------------------------------------


def _with_tools(request: LLMRequest, tokenizer: Tokenizer) -> AnswerShape:
    if request.messages is None:
        raise UnsupportedError("tools: they come with messages, and not with a prompt", param="tools")
    functions = _functions(request.tools or [])
    form = call_format(tokenizer)
    tools = Tools(functions, form or HERMES, is_known=form is not None)
    choice = "auto" if request.tool_choice is None else request.tool_choice
    several = _may_be_several(request)
    if choice == "auto":
        if several and not _strict(request):
            return AnswerShape(tools=tools)
        grammar = tools.form.offered(functions, tokenizer, "tools", several=several)
        return AnswerShape(grammar, "tools", tools=tools)
    if choice != "required":
        functions, several = (_named(choice, functions),), False
    grammar = tools.form.forced(functions, tokenizer, "tools", several=several)
    return AnswerShape(grammar, "tools", is_json=True, tools=tools)


def _may_be_several(request: LLMRequest) -> bool:
    value = request.extra_body.get("parallel_tool_calls", True)
    if not isinstance(value, bool):
        raise InvalidRequestError("parallel_tool_calls: expected true or false", param="parallel_tool_calls")
    return value


def _strict(request: LLMRequest) -> bool:
    return any(tool["function"].get("strict") for tool in request.tools or ())


def _functions(tools: list[dict[str, Any]]) -> tuple[Function, ...]:
    if len(tools) > MAX_FUNCTIONS:
        raise InvalidRequestError(f"tools: {len(tools)} of them; expected at most {MAX_FUNCTIONS}", param="tools")
    functions = tuple(_function(tool, f"tools[{place}]") for place, tool in enumerate(tools))
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequestError(f"tools: {twice!r} is described twice", param="tools")
    return functions


def _function(tool: object, place: str) -> Function:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise UnsupportedError(f"{place}: the native engine knows tools of type 'function'", param="tools")
    described = tool.get("function")
    if not isinstance(described, Mapping):
        raise InvalidRequestError(f"{place}.function: expected an object", param="tools")
    name, parameters = described.get("name"), described.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{place}.function.name: expected 1 to 64 letters, digits, '_', '-' and '.'", param="tools"
        )
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequestError(f"{place}.function.parameters: expected a JSON schema", param="tools")
    return Function(name, parameters, f"{place}.function.parameters")


def _named(choice: object, functions: tuple[Function, ...]) -> Function:
    described = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = described.get("name") if isinstance(described, Mapping) else None
    if name is None:
        raise UnsupportedError(
            "tool_choice: expected none, auto, required or {'type': 'function', 'function': {'name': ...}}",
            param="tool_choice",
        )
    for function in functions:
        if function.name == name:
            return function
    raise InvalidRequestError(f"tool_choice: {name!r} is none of the tools", param="tool_choice")
