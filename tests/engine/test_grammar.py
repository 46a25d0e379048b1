"""Compiled grammars and their masks: what they allow, what they refuse, what a hostile one can cost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import TINY
from grammars import FIELD, allowed, compiled, schema_grammar, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_every_kind import KINDS, write_tokenizer

from autobot_llm.engine.detokenizer import Detokenizer, token_bytes
from autobot_llm.engine.grammar.compiler import MAX_WAITING, GrammarCompiler
from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.grammar.spec import MAX_SCHEMA_CHARACTERS, GrammarSpec
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import InvalidRequestError, OverloadedError, ProviderUnavailable

VOCAB_SIZE = 8192
END_IDS = frozenset({0, 4})
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS)
    yield made
    made.close()


# --- what a grammar allows --------------------------------------------------------------------------------------------


def test_the_end_is_allowed_exactly_where_the_grammar_is_satisfied(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiled(compiler, GrammarSpec.regex("[0-9]{1,3}", FIELD)).start()
    for digit in "123":
        assert bool(END_IDS & allowed(matcher)) == matcher.is_satisfied
        assert allowed(matcher) >= END_IDS or not END_IDS & allowed(matcher)
        assert walk(matcher, tokenizer, digit)
    assert matcher.is_complete
    assert allowed(matcher) == END_IDS


def test_where_one_continuation_is_possible_the_mask_leaves_one_token(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiled(compiler, GrammarSpec.choice(["the only answer"], FIELD)).start()
    spelled = []
    while not matcher.is_complete:
        (token_id,) = allowed(matcher)
        spelled.append(token_id)
        assert matcher.advance(token_id)
    assert tokenizer.decode(spelled) == "the only answer"
    assert spelled == tokenizer.encode("the only answer", add_special_tokens=False)


def test_special_tokens_are_no_text_to_a_grammar(compiler: GrammarCompiler) -> None:
    matcher = compiled(compiler, GrammarSpec.regex("(?s:.*)", FIELD)).start()
    assert not allowed(matcher) & {1, 2, 3}
    assert len(allowed(matcher)) > 7000


@pytest.mark.parametrize(
    "text", ["yes", "no\n", 'a "quoted" \\ one', "Grüße, 火 and 🦊", "tab\tand \x07 bell", "%json {}"]
)
def test_a_choice_is_any_text_and_nothing_else(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str) -> None:
    grammar = compiled(compiler, GrammarSpec.choice([text, "another"], FIELD))
    matcher = grammar.start()
    assert walk(matcher, tokenizer, text)
    assert matcher.is_complete
    assert not walk(grammar.start(), tokenizer, "other")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
def test_any_texts_can_be_choices(choices: list[str]) -> None:
    compiler, tokenizer = _shared()
    grammar = compiled(compiler, GrammarSpec.choice(choices, FIELD))
    for text in choices:
        matcher = grammar.start()
        taken = b""
        while not (matcher.is_satisfied and taken == text.encode()):
            left = text.encode()[len(taken) :]
            spellings = {token_id: token_bytes(tokenizer, token_id) for token_id in allowed(matcher) - END_IDS}
            token_id = max((i for i, piece in spellings.items() if left.startswith(piece)), key=lambda i: spellings[i])
            assert matcher.advance(token_id)
            taken += spellings[token_id]
    assert not grammar.start().is_satisfied


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ('{"name":"Red","age":3}', True),
        ('{"name": "Red", "age": 3}', True),
        ('{\n  "name": "Red",\n  "age": 3\n}', True),
        ('{"name": "Red",   "age": 3}', False),  # blanks without end would be an answer without end
        ('{"age": 3, "name": "Red"}', False),
        ('{"name": "Red"}', False),
        ('{"name": "Red", "age": 3.5}', False),
    ],
)
def test_a_schema_takes_the_usual_ways_to_write_json(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, is_taken: bool
) -> None:
    matcher = schema_grammar(compiler, PERSON).start()
    assert (walk(matcher, tokenizer, text) and matcher.is_satisfied) == is_taken


def test_a_draft_is_cut_at_the_first_token_that_is_forbidden(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = schema_grammar(compiler, PERSON).start()
    draft = tokenizer.encode('{"name":"Red","age":x}', add_special_tokens=False)
    num_allowed = matcher.num_allowed(draft)
    assert tokenizer.decode(draft[:num_allowed]) == '{"name":"Red","age":'
    assert allowed(matcher) == {draft[0]}, "looking ahead moves nothing"


@given(st.lists(st.integers(0, 12), max_size=6))
def test_a_matcher_that_went_back_is_as_if_it_had_never_gone(steps: list[int]) -> None:
    compiler, tokenizer = _shared()
    ids = tokenizer.encode('{"name": "Red of the hill", "age": 31}', add_special_tokens=False)
    matcher = schema_grammar(compiler, PERSON).start()
    taken = 0
    for step in steps:
        forward = min(step, len(ids) - taken)
        for token_id in ids[taken : taken + forward]:
            assert matcher.advance(token_id)
        back = min(forward, step // 2)
        matcher.rollback(back)
        taken += forward - back
    fresh = schema_grammar(compiler, PERSON).start()
    for token_id in ids[:taken]:
        assert fresh.advance(token_id)
    assert allowed(matcher) == allowed(fresh)


_SHARED: list[tuple[GrammarCompiler, Tokenizer]] = []


def _shared() -> tuple[GrammarCompiler, Tokenizer]:
    """Hypothesis takes no fixtures of a narrower kind."""
    if not _SHARED:
        tokenizer = Tokenizer.from_folder(TINY)
        _SHARED.append((GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS), tokenizer))
    return _SHARED[0]


def test_clones_go_their_own_ways(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiled(compiler, GrammarSpec.choice(["red fox", "red hen"], FIELD)).start()
    assert walk(matcher, tokenizer, "red")
    clone = matcher.clone()
    assert walk(clone, tokenizer, " fox")
    assert clone.is_complete and not matcher.is_complete
    assert walk(matcher, tokenizer, " hen")


# --- every kind of vocabulary -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_constrained_answer_is_what_the_grammar_took(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, KINDS[kind]()))
    vocab_size = tokenizer.vocab_size + 5  # a model's vocabulary may be padded
    compiler = GrammarCompiler.for_model(tokenizer, vocab_size, frozenset({1}))
    text = " the fox ran home"
    matcher = compiled(compiler, GrammarSpec.choice([text, text + " again"], FIELD)).start()
    detokenizer = Detokenizer(tokenizer, keeps_leading_space=True)
    shown, taken = "", b""
    for _ in range(40):
        if matcher.is_satisfied:
            break
        token_id = min(allowed(matcher))
        assert token_id < tokenizer.vocab_size
        assert matcher.advance(token_id)
        shown += detokenizer.push(token_id)
        taken += token_bytes(tokenizer, token_id)
    compiler.close()
    assert (shown + detokenizer.flush()).startswith(text)
    assert taken.decode().startswith(text)


def test_a_vocabulary_that_cannot_spell_the_answer_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, KINDS["WordPiece"]()))
    compiler = GrammarCompiler.for_model(tokenizer, 200, frozenset({1}))
    with pytest.raises(InvalidRequestError, match="no token of this model's vocabulary continues the answer"):
        compiled(compiler, GrammarSpec.choice(["§"], FIELD))
    compiler.close()


def test_a_model_without_an_end_token_ends_where_nothing_can_follow(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, frozenset())
    matcher = compiled(compiler, GrammarSpec.regex("ab?", FIELD)).start()
    assert walk(matcher, tokenizer, "a")
    assert allowed(matcher) == set(tokenizer.encode("b"))
    compiler.close()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "https://example.com/a"}, "not present"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"enum": ["\ud800"]}, "hex escape"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_with_the_librarys_reason(
    compiler: GrammarCompiler, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        schema_grammar(compiler, schema)
    assert caught.value.param == FIELD
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("expression", ["(a", "[z-a]", "(?=a)b", r"\bword\b", "("], ids=repr)
def test_an_expression_that_is_none_is_refused(compiler: GrammarCompiler, expression: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{FIELD}: ") as caught:
        compiled(compiler, GrammarSpec.regex(expression, FIELD))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("schema", [[], "text", None, 3, True])
def test_what_is_no_schema_is_refused(schema: object) -> None:
    with pytest.raises(InvalidRequestError, match="expected a JSON schema"):
        GrammarSpec.json_schema(schema, FIELD)


@pytest.mark.parametrize("choices", [[], "yes", [""], [1], None, ["a"] * 5000, ["a" * MAX_SCHEMA_CHARACTERS, "b"]])
def test_what_is_no_list_of_choices_is_refused(choices: object) -> None:
    with pytest.raises(InvalidRequestError, match=FIELD):
        GrammarSpec.choice(choices, FIELD)


def test_settings_of_the_library_in_a_schema_have_no_effect(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = PERSON | {"x-guidance": {"item_separator": ";", "lenient": True}}
    assert walk(schema_grammar(compiler, schema).start(), tokenizer, '{"name":"Red","age":3}')
    with pytest.raises(InvalidRequestError, match="Unimplemented"):
        schema_grammar(compiler, {"not": {}, "x-guidance": {"lenient": True}})


# --- hostile grammars -------------------------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"value {number}" for number in range(60_000)]},  # a megabyte
        deep(10_000),
        {"type": "object", "properties": {f"p{number}": deep(3) for number in range(20_000)}},
    ],
    ids=["megabyte", "deep", "wide"],
)
def test_a_schema_that_is_too_big_is_refused_before_it_is_compiled(schema: dict[str, Any]) -> None:
    begin = time.perf_counter()
    with pytest.raises(InvalidRequestError, match="expected at most|nested more than"):
        GrammarSpec.json_schema(schema, FIELD)
    assert time.perf_counter() - begin < 2.0


COSTLY = {
    "recursive": {"$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "string"}]}}, "$ref": "#/$defs/n"},
    "doubling": {
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
        | {"d30": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
    "products": {
        "type": "object",
        "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)],
    },
    "required": {
        "type": "object",
        "properties": {f"p{number}": {"type": "string"} for number in range(3_000)},
        "required": [f"p{number}" for number in range(3_000)],
    },
    "nested lists": {"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6}},
    "long": {"type": "string", "minLength": 10**9},
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_schema_holds_up_neither_the_event_loop_nor_the_process(compiler: GrammarCompiler, name: str) -> None:
    """It compiles or it is refused, and the loop's other work goes on meanwhile."""

    async def ask() -> tuple[float, float]:
        began = latest = time.perf_counter()
        longest_pause = 0.0
        task = asyncio.create_task(compiler.compile(GrammarSpec.json_schema(COSTLY[name], FIELD), FIELD))
        while not task.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest_pause, latest = max(longest_pause, now - latest), now
        await asyncio.gather(task, return_exceptions=True)
        error = task.exception()
        assert error is None or isinstance(error, InvalidRequestError)
        return time.perf_counter() - began, longest_pause

    seconds, longest_pause = asyncio.run(ask())
    assert seconds < 10.0
    assert longest_pause < 1.0


@pytest.mark.parametrize(
    "expression",
    [r"(a+)+$", r"(.*a.{200}){3}", r"((a{0,1000}){0,1000}){0,1000}b", r"(.*(x|y).{0,400}(x|e|a).{0,400}){5}"],
)
def test_an_expression_that_explodes_elsewhere_is_followed_or_given_up(
    compiler: GrammarCompiler, tokenizer: Tokenizer, expression: str
) -> None:
    matcher = compiled(compiler, GrammarSpec.regex(expression, FIELD)).start()
    longest = 0.0
    try:
        for place in range(150):
            begin = time.perf_counter()
            tokens = sorted(allowed(matcher) - END_IDS)
            longest = max(longest, time.perf_counter() - begin)
            if not tokens:
                break
            assert matcher.advance(tokens[(place * 7919) % len(tokens)])
    except InvalidRequestError as error:
        assert "too costly" in error.message and error.param == FIELD
    assert longest < 0.5


def test_an_answer_has_a_bound_on_the_time_its_masks_may_take(compiler: GrammarCompiler) -> None:
    library_matcher = schema_grammar(compiler, PERSON)._matcher
    matcher = Grammar(library_matcher, VOCAB_SIZE, FIELD, max_mask_seconds=0.0).start()
    with pytest.raises(InvalidRequestError, match="too costly to follow: its masks took"):
        for _ in range(1000):  # a clock may be coarse
            matcher.mask()


def test_no_more_grammars_wait_than_are_bounded(tokenizer: Tokenizer) -> None:
    async def ask() -> list[object]:
        compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS)
        specs = [GrammarSpec.choice([str(number)], FIELD) for number in range(MAX_WAITING + 3)]
        results = await asyncio.gather(*(compiler.compile(spec, FIELD) for spec in specs), return_exceptions=True)
        compiler.close()
        return [type(result) for result in results if isinstance(result, BaseException)]

    assert asyncio.run(ask()) == [OverloadedError] * 3


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_once_and_the_least_recently_used_is_dropped(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS, max_grammars=2)
    for word in ("a", "b", "a", "c", "a", "b"):  # c drops b
        compiled(compiler, GrammarSpec.choice([word], FIELD))
    assert (compiler.num_compiled, compiler.num_reused) == (4, 2)
    compiler.close()


def test_requests_that_ask_for_a_grammar_at_once_wait_for_one_compilation(tokenizer: Tokenizer) -> None:
    async def ask() -> GrammarCompiler:
        compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS)
        spec = GrammarSpec.json_schema(PERSON, FIELD)
        first, second = await asyncio.gather(compiler.compile(spec, FIELD), compiler.compile(spec, FIELD))
        assert first is second
        compiler.close()
        return compiler

    assert asyncio.run(ask()).num_compiled == 1


def test_tenants_share_no_grammar(tokenizer: Tokenizer) -> None:
    async def ask() -> int:
        compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS)
        for tenant in ("one", "another", "one"):
            await compiler.compile(GrammarSpec.choice(["yes"], FIELD), FIELD, tenant)
        compiler.close()
        return compiler.num_compiled

    assert asyncio.run(ask()) == 2


def test_a_grammar_that_met_a_limit_is_compiled_anew(compiler: GrammarCompiler) -> None:
    """Else the first answer that a limit ends would end all later ones at their first token."""
    spec = GrammarSpec.regex(r"(\w+\s?){1,500}", FIELD)
    for _ in range(2):
        grammar = compiled(compiler, spec)
        matcher = grammar.start()
        assert allowed(matcher)
        with pytest.raises(InvalidRequestError, match="too costly"):
            for place in range(300):
                tokens = sorted(allowed(matcher) - END_IDS)
                assert matcher.advance(tokens[(place * 7919) % len(tokens)])
        assert grammar.is_spent


def test_what_waits_when_the_compiler_closes_is_told_so(tokenizer: Tokenizer) -> None:
    async def ask() -> list[object]:
        compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, END_IDS)
        specs = [GrammarSpec.choice([str(number)], FIELD) for number in range(20)]
        waiting = [asyncio.create_task(compiler.compile(spec, FIELD)) for spec in specs]
        await asyncio.sleep(0)
        compiler.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        return [type(result) for result in results if isinstance(result, BaseException)]

    errors = asyncio.run(ask())
    assert errors and set(errors) == {ProviderUnavailable}


def test_the_order_of_properties_is_part_of_a_grammar() -> None:
    turned = {**PERSON, "properties": dict(reversed(PERSON["properties"].items()))}  # type: ignore[attr-defined]
    assert json.dumps(turned, sort_keys=True) == json.dumps(PERSON, sort_keys=True)
    assert GrammarSpec.json_schema(turned, FIELD) != GrammarSpec.json_schema(PERSON, FIELD)
