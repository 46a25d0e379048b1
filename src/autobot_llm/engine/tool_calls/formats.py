"""The ways in which families of models write tool calls: what to look for, and how to make a model write one. Knows
templates and grammars; knows nothing of requests.

A form is recognized by what the model's own chat template says of calls. A model whose template has no place for tools
gets the Hermes form, with the tools described in a system message (see untrained.py).
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autobot_llm.engine.grammar.spec import GrammarSpec, literal, schema_source
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.engine.tool_calls.parser import Markers, ToolCallParser
from autobot_llm.errors import UnsupportedError

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call. `parameters` is the JSON schema of its arguments, `field` the request's."""

    name: str
    parameters: dict[str, Any] | None = None
    field: str = "tools"

    def source(self) -> str:
        """The schema as JSON; arguments are an object, whether or not it says so. Raises InvalidRequestError."""
        schema = NO_ARGUMENTS if self.parameters is None else self.parameters | {"type": "object"}
        return schema_source(schema, self.field)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One family's form. `arguments_key` is what it calls the arguments, `call_id` makes an id that its template takes.

    A grammar's `field` is the request's field that errors name; `several` calls may follow each other, or one.
    """

    name: str
    markers: Markers
    arguments_key: str = "arguments"
    call_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}"

    def parser(self, functions: Sequence[Function]) -> ToolCallParser:
        return ToolCallParser(self.markers, frozenset(function.name for function in functions))

    def shown_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The special tokens among its markers, which the answer's text must show."""
        ids = (tokenizer.token_id(marker) for marker in (self.markers.open, self.markers.close) if marker)
        return frozenset(token_id for token_id in ids if token_id is not None) & tokenizer.special_ids

    def forced(self, functions: Sequence[Function], tokenizer: Tokenizer, field: str, *, several: bool) -> GrammarSpec:
        """An answer that is a call of one of `functions`. Raises InvalidRequestError for a schema."""
        calls = self._calls(tokenizer, several=several)
        opening = "" if self.markers.may_be_bare else _marker(self.markers.open, tokenizer)
        return GrammarSpec.lark("\n".join((f"start: {opening} {calls}", *self._rules(functions))), field)

    def offered(self, functions: Sequence[Function], tokenizer: Tokenizer, field: str, *, several: bool) -> GrammarSpec:
        """Any text, where what begins as a call is one of `functions`. Raises InvalidRequestError for a schema."""
        calls = self._calls(tokenizer, several=several)
        opening = _marker(self.markers.open, tokenizer)
        if self.markers.may_be_bare:
            start = f'start: PLAIN | {calls}\nPLAIN: /[^{{](?s:.*)/ | ""'
        elif opening.startswith("<"):  # a special token, which no text holds
            start = f"start: TEXT | TEXT {opening} {calls}\nTEXT: /(?s:.*)/"
        else:
            start = f"start: TEXT | head {calls}\nTEXT: /(?s:.*)/\nhead[lazy]: TEXT {opening}"
        return GrammarSpec.lark("\n".join((start, *self._rules(functions))), field)

    def _calls(self, tokenizer: Tokenizer, *, several: bool) -> str:
        """What follows the opening marker."""
        markers = self.markers
        if markers.list_open:
            more = ' (", " call)*' if several else ""
            return f'" "? {literal(markers.list_open)} call{more} {literal(markers.close)}'
        if markers.separator:
            more = f" ({literal(markers.separator + ' ')} call)*" if several else ""
            return f"call{more}"
        opening, closing = _marker(markers.open, tokenizer), _marker(markers.close, tokenizer)
        more = f' ("\\n" {opening} "\\n" call "\\n" {closing})*' if several else ""
        return f'"\\n" call "\\n" {closing}{more}'

    def _rules(self, functions: Sequence[Function]) -> tuple[str, ...]:
        rules = [f"call: {' | '.join(f'call_{place}' for place in range(len(functions)))}"]
        for place, function in enumerate(functions):
            head = f'{{"name": {literal(function.name)}, "{self.arguments_key}": '
            rules.append(f'call_{place}: {literal(head)} arguments_{place} "}}"')
            rules.append(f"arguments_{place}: %json {function.source()}")
        return tuple(rules)


def _marker(marker: str, tokenizer: Tokenizer) -> str:
    """A marker in a grammar: by its number where it is a special token, which stands for no text."""
    token_id = tokenizer.token_id(marker)
    return f"<[{token_id}]>" if token_id in tokenizer.special_ids else literal(marker)


def _nine_characters() -> str:
    """An id as Mistral's templates demand it."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


HERMES = CallFormat("hermes", Markers("<tool_call>", close="</tool_call>"))
LLAMA = CallFormat("llama", Markers("<|python_tag|>", separator=";", may_be_bare=True), arguments_key="parameters")
MISTRAL = CallFormat(
    "mistral", Markers("[TOOL_CALLS]", close="]", list_open="[", separator=","), call_id=_nine_characters
)

# What a template says only if its model writes calls in that form. The first that fits counts.
_SIGNS: tuple[tuple[str, CallFormat], ...] = (
    ("[TOOL_CALLS]", MISTRAL),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA),
    ('"parameters": dictionary of argument name and its value', LLAMA),
)
# What tells other forms from these where a sign is shared: calls in XML, names that stand before the arguments.
_OTHER_FORMS = ("<function=", "[ARGS]", "<arg_key>")


def call_format(tokenizer: Tokenizer) -> CallFormat | None:
    """How this model writes calls; None for one whose template has no place for tools.

    Raises UnsupportedError for a template that has one, and asks for calls in a form that is not known here.
    """
    template = tokenizer.tool_template
    if "tools" not in template:
        return None
    if not any(sign in template for sign in _OTHER_FORMS):
        for sign, form in _SIGNS:
            if sign in template:
                return form
    raise UnsupportedError(
        "the model's chat template asks for tool calls in a form that is not known here; known are Hermes (Qwen), "
        "Llama 3 and Mistral's",
        param="tools",
    )
