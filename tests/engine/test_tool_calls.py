"""Tool calls in answers: found however the text is cut, in each family's form, and nothing that was written is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from engines import TINY
from grammars import compiled
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.grammar.compiler import GrammarCompiler
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.engine.tool_calls.formats import HERMES, LLAMA, MISTRAL, CallFormat, Function
from autobot_llm.engine.tool_calls.json_call import CallArguments, CallStart, Piece, Text
from autobot_llm.engine.tool_calls.parser import ToolCallParser
from autobot_llm.errors import InvalidRequestError

FUNCTIONS = (Function("get_weather"), Function("add"), Function("no.arguments-1"))
FORMS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}
TOKENIZER = Tokenizer.from_folder(TINY)
Found = tuple[str, list[tuple[str, str]]]


def parse(form: CallFormat, texts: Sequence[str]) -> Found:
    """The text beside the calls, and the calls: (name, arguments)."""
    parser: ToolCallParser = form.parser(FUNCTIONS)
    pieces: list[Piece] = [piece for text in texts for piece in parser.push(text)] + parser.finish()
    text, calls = "", dict[int, tuple[str, str]]()
    for piece in pieces:
        if isinstance(piece, Text):
            text += piece.text
        elif isinstance(piece, CallStart):
            assert piece.position == len(calls)
            calls[piece.position] = (piece.name, "")
        else:
            assert isinstance(piece, CallArguments)
            name, arguments = calls[piece.position]
            calls[piece.position] = (name, arguments + piece.text)
    assert parser.num_calls == len(calls)
    return text, list(calls.values())


WEATHER = '{"city": "Köln <b>", "days": [1, {"a": "}"}], "q": "\\"{"}'

ANSWERS: list[tuple[str, str, Found]] = [
    ("hermes", "Just text, with 3 < 4 and a { brace }.", ("Just text, with 3 < 4 and a { brace }.", [])),
    (
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
        ("", [("get_weather", WEATHER)]),
    ),
    (
        "hermes",
        'I will look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>{"name":"add","arguments":{"a":2}}</tool_call>\n',
        ("I will look.\n", [("add", '{"a": 1}'), ("add", '{"a":2}')]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {}}</tool_call> and so on',
        (" and so on", [("add", "{}")]),
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}', ("", [("add", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": ', ("", [("add", '{"a": ')])),
    (  # a brace is missing: the marker ends the call
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call>\n<tool_call>{"name": "add", "arguments": {}}',
        ("", [("add", '{"a": 1}'), ("add", "{}")]),
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', ("", [("add", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', ("", [("add", '{"a": 1}')])),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    ("llama", '\n<|python_tag|>{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    (
        "llama",
        '{"name": "add", "parameters": {"a": 1}}; {"name": "get_weather", "arguments": {}}\n',
        ("", [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ),
    ("llama", 'Sum: <|python_tag|>{"name": "add", "parameters": {}}', ("Sum: ", [("add", "{}")])),
    ("llama", 'It is {"name": "add", "parameters": {}}', ('It is {"name": "add", "parameters": {}}', [])),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', ("", [("add", '{"a": 1}')])),
    (
        "mistral",
        'Yes.[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "add", "arguments": {}}]',
        ("Yes.", [("add", '{"a": 1}'), ("add", "{}")]),
    ),
    ("mistral", "A list: [1, 2]", ("A list: [1, 2]", [])),
]

MALFORMED: list[tuple[str, str]] = [
    ("hermes", "<tool_call>\nnot JSON\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>'),
    ("hermes", '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "no JSON"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a\\x", "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\n"),
    ("hermes", "text <tool_ca"),
    ("hermes", '<tool_call>\n{"name": "ad'),
    ("hermes", "<tool_call><tool_call>"),
    ("hermes", "<tool_call>{" + '"a":[' * 5000),
    ("llama", '{"answer": 42}'),
    ("llama", '<|python_tag|>brave_search.call(query="fox")'),
    ("llama", '{"name": "Red", "parameters": {"age": 3}}'),
    ("llama", "  { "),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral", "[TOOL_CALLS] [ ]"),
    ("mistral", '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
]


@pytest.mark.parametrize(("form", "answer", "found"), ANSWERS)
def test_calls_are_found_and_the_text_beside_them_is_kept(form: str, answer: str, found: Found) -> None:
    assert parse(FORMS[form], [answer]) == found


@pytest.mark.parametrize(("form", "answer"), MALFORMED)
def test_what_looks_like_a_call_and_is_none_stays_text(form: str, answer: str) -> None:
    assert parse(FORMS[form], [answer]) == (answer, [])
    assert parse(FORMS[form], list(answer)) == (answer, [])


@pytest.mark.parametrize(("form", "answer", "found"), ANSWERS)
def test_letter_by_letter_the_same_is_found(form: str, answer: str, found: Found) -> None:
    assert parse(FORMS[form], list(answer)) == found


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", "{", "}", ",", ";", "\n", " ", '"',
     "\\", "<", "text", "é", '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": ', '"name"', ": ",
     '{"arguments": {}, "name": "get_weather"}', '{"name": "other", "arguments": {}}', "1"]
)  # fmt: skip


@given(st.sampled_from(sorted(FORMS)), st.lists(FRAGMENTS, max_size=14), st.lists(st.integers(0, 400), max_size=12))
def test_any_text_gives_the_same_however_it_is_cut(form: str, fragments: list[str], places: list[int]) -> None:
    text = "".join(fragments)
    whole = parse(FORMS[form], [text])
    assert parse(FORMS[form], cut(text, places)) == whole
    assert parse(FORMS[form], list(text)) == whole


VALUES = st.recursive(
    st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from([f.name for f in FUNCTIONS]), st.dictionaries(st.text(max_size=4), VALUES, max_size=3)),
    min_size=1,
    max_size=3,
)


def written(form: str, calls: list[tuple[str, dict[str, Any]]], indent: int | None) -> str:
    key = "parameters" if form == "llama" else "arguments"
    texts = [json.dumps({"name": name, key: arguments}, indent=indent, ensure_ascii=False) for name, arguments in calls]
    if form == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    return "; ".join(texts) if form == "llama" else f"[TOOL_CALLS] [{', '.join(texts)}]"


@given(st.sampled_from(sorted(FORMS)), CALLS, st.sampled_from([None, 2]), st.lists(st.integers(0, 400), max_size=12))
def test_whatever_the_arguments_hold_they_arrive_as_written(
    form: str, calls: list[tuple[str, dict[str, Any]]], indent: int | None, places: list[int]
) -> None:
    text, found = parse(FORMS[form], cut(written(form, calls, indent), places))
    assert text == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_arguments_come_while_they_are_written() -> None:
    parser = HERMES.parser(FUNCTIONS)
    kinds = [[type(piece) for piece in parser.push(text)] for text in
             ['<tool_call>\n{"name": "add", "argu', 'ments": ', '{"a', '": 1', "}}", "\n</tool_call>"]]  # fmt: skip
    assert kinds == [[], [], [CallStart, CallArguments], [CallArguments], [CallArguments], []]


def test_a_long_answer_takes_time_in_proportion_to_its_length() -> None:
    """A megabyte of arguments in small pieces; quadratic work would take minutes."""
    parser = HERMES.parser(FUNCTIONS)
    parser.push('<tool_call>{"name": "add", "arguments": {"a": "')
    num_characters = sum(
        len(piece.text)
        for _ in range(100_000)
        for piece in parser.push("abcdefghij")
        if isinstance(piece, CallArguments)
    )
    assert num_characters == 1_000_000


# --- the grammars of calls --------------------------------------------------------------------------------------------

ZONE = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
TIMES = (Function("tell_time", ZONE | {"additionalProperties": False}), Function("now"))
CALLED = {
    "hermes": '<tool_call>\n{"name": "tell_time", "arguments": {"zone": "UTC"}}\n</tool_call>',
    "llama": '{"name": "tell_time", "parameters": {"zone": "UTC"}}',
    "mistral": '[TOOL_CALLS] [{"name": "tell_time", "arguments": {"zone": "UTC"}}]',
}
TWICE = {
    "hermes": f"{CALLED['hermes']}\n{CALLED['hermes']}",
    "llama": f"{CALLED['llama']}; {CALLED['llama']}",
    "mistral": CALLED["mistral"][:-1] + ", " + CALLED["mistral"][len("[TOOL_CALLS] [") :],
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler.for_model(TOKENIZER, TOKENIZER.vocab_size, frozenset({0, 4}))
    yield made
    made.close()


def takes(compiler: GrammarCompiler, spec: GrammarSpec, text: str) -> bool:
    matcher = compiled(compiler, spec).start()
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.num_allowed(ids) == len(ids) and all(map(matcher.advance, ids)) and matcher.is_satisfied


@pytest.mark.parametrize("name", FORMS)
def test_a_forced_answer_is_a_call_in_the_familys_form_and_nothing_else(compiler: GrammarCompiler, name: str) -> None:
    one = FORMS[name].forced(TIMES, TOKENIZER, "tools", several=False)
    several = FORMS[name].forced(TIMES, TOKENIZER, "tools", several=True)
    assert takes(compiler, one, CALLED[name]) and takes(compiler, several, CALLED[name])
    assert takes(compiler, several, TWICE[name]) and not takes(compiler, one, TWICE[name])
    for wrong in ("UTC", "tell_time", "name"):
        assert not takes(compiler, several, CALLED[name].replace(wrong, "other"))
    assert not takes(compiler, several, "Some text")
    assert not takes(compiler, several, "Some text " + CALLED[name])
    assert parse_as(FORMS[name], TWICE[name]) == ("", [("tell_time", '{"zone": "UTC"}')] * 2)


@pytest.mark.parametrize("name", FORMS)
def test_an_offered_call_is_a_valid_one_and_words_are_free(compiler: GrammarCompiler, name: str) -> None:
    offered = FORMS[name].offered(TIMES, TOKENIZER, "tools", several=True)
    for text in ("", "Just words, with { braces } < and [ brackets ]\n", CALLED[name], TWICE[name]):
        assert takes(compiler, offered, text)
    assert not takes(compiler, offered, CALLED[name].replace("UTC", "other"))
    if name != "llama":  # its calls are whole answers
        assert takes(compiler, offered, f"Words first. {CALLED[name]}")
        assert not takes(compiler, offered, f"Words first. {CALLED[name].replace('UTC', 'other')}")


def parse_as(form: CallFormat, text: str) -> Found:
    parser = form.parser(TIMES)
    pieces = parser.push(text) + parser.finish()
    shown = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    names = [piece.name for piece in pieces if isinstance(piece, CallStart)]
    arguments = [piece.text for piece in pieces if isinstance(piece, CallArguments)]
    return shown, list(zip(names, arguments, strict=True))


def test_functions_whose_schemas_are_too_big_together_are_refused() -> None:
    many = tuple(Function(f"f{n}", {"enum": ["x" * 1000] * 20}) for n in range(20))
    with pytest.raises(InvalidRequestError, match="expected at most") as caught:
        HERMES.forced(many, TOKENIZER, "tools", several=False)
    assert caught.value.param == "tools"
