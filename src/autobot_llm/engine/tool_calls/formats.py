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
_ANY_TEXT = "TEXT: /(?s:.*)/"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: dict[str, Any] | None = None

    def source(self, field: str) -> str:
        """The schema as JSON; arguments are an object, whether or not it says so. Raises InvalidRequestError."""
        return schema_source(NO_ARGUMENTS if self.parameters is None else self.parameters | {"type": "object"}, field)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One family's form. `arguments_key` is what it calls the arguments, `shape` how calls stand between markers."""

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
        """An answer that is one call of one of `functions`, or `several`. Raises InvalidRequestError for a schema."""
        calls, rules = self._calls(tokenizer, several=several), self._rules(functions, field)
        return GrammarSpec.lark("\n".join((f"start: {calls}", *rules)), field)

    def offered(self, functions: Sequence[Function], tokenizer: Tokenizer, field: str, *, several: bool) -> GrammarSpec:
        """Any text, with or without calls, and what begins as a call is one of one of `functions`."""
        calls, rules = self._calls(tokenizer, several=several, opened=True), self._rules(functions, field)
        opening = _marker(self.markers.open, tokenizer)
        if self.markers.may_be_bare:
            start = f"start: PLAIN | {self._calls(tokenizer, several=several)}"
            rules = (*rules, 'PLAIN: /[^{](?s:.*)/ | ""')
        elif opening.startswith("<"):
            start = f"start: TEXT | TEXT {opening} {calls}"
        else:
            start = f"start: TEXT | head {calls}"
            rules = (*rules, f"head[lazy]: TEXT {opening}")
        return GrammarSpec.lark("\n".join((start, *rules, _ANY_TEXT)), field)

    def _calls(self, tokenizer: Tokenizer, *, several: bool, opened: bool = False) -> str:
        markers = self.markers
        opening = "" if opened else "" if markers.may_be_bare else _marker(markers.open, tokenizer)
        if markers.list_open:
            more = ' (", " call)*' if several else ""
            return f'{opening} " "? {literal(markers.list_open)} call{more} {literal(markers.close)}'
        if markers.separator:
            more = f" ({literal(markers.separator + ' ')} call)*" if several else ""
            return f"{opening} call{more}"
        closing = _marker(markers.close, tokenizer)
        again = f' ("\\n" {_marker(markers.open, tokenizer)} "\\n" call "\\n" {closing})*' if several else ""
        return f'{opening} "\\n" call "\\n" {closing}{again}'

    def _rules(self, functions: Sequence[Function], field: str) -> tuple[str, ...]:
        rules = [f"call: {' | '.join(f'call_{place}' for place in range(len(functions)))}"]
        for place, function in enumerate(functions):
            head = f'{{"name": {literal(function.name)}, "{self.arguments_key}": '
            rules.append(f'call_{place}: {literal(head)} arguments_{place} "}}"')
            rules.append(f"arguments_{place}: %json {function.source(f'{field}[{place}].function.parameters')}")
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
