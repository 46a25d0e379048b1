"""Answers under grammars, step by step: they parse, and nobody beside them notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import TINY, Driver, greedy, num_leaked_blocks, request, tiny_engine
from fake_device import VOCAB_SIZE, FakePipelinedDevice
from grammars import FIELD, compiled, is_valid, schema_grammar
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.grammar.compiler import GrammarCompiler
from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import InvalidRequestError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine(cache_dir: Path) -> Iterator[Engine]:
    made = tiny_engine(cache_dir, compiled=True, max_num_seqs=32)
    yield made
    made.close()


@pytest.fixture(scope="module")
def compiler(engine: Engine) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler.for_model(engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids)
    yield made
    made.close()


def ending(engine: Engine, grammar: Grammar | None, max_tokens: int = 120, **params: Any) -> SamplingParams:
    return greedy(max_tokens, grammar=grammar, stop_token_ids=engine.config.eos_token_ids, **params)


def prompt(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(f"<|user|>\n{text}<|end|>\n<|assistant|>\n")


def drawn(seed: int) -> dict[str, Any]:
    return {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": seed}


# --- any schema -------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
SCALARS = st.one_of(WORDS, st.integers(-(10**6), 10**6), st.booleans(), st.none())


@st.composite
def integers(draw: st.DrawFn) -> dict[str, Any]:
    low, high = sorted((draw(st.integers(-1000, 1000)), draw(st.integers(-1000, 1000))))
    return {"type": "integer", "minimum": low, "maximum": high}


LEAVES = st.one_of(
    st.builds(lambda length: {"type": "string", "maxLength": length}, st.integers(0, 12)),
    st.builds(lambda least: {"type": "string", "minLength": least, "maxLength": least + 6}, st.integers(0, 6)),
    st.sampled_from([r"^[A-Z]{2}-\d{2,4}$", "^(fox|hen)( and (fox|hen))?$", r"^[^\s]{1,8}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
    integers(),
    st.builds(
        lambda low, width: {"type": "number", "minimum": low, "maximum": low + width},
        st.integers(-9, 9),
        st.integers(1, 9),
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"$ref": "#/$defs/shared"}]),
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
)


@st.composite
def objects(draw: st.DrawFn, children: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    names = draw(st.lists(WORDS, min_size=0, max_size=3, unique=True))
    return {
        "type": "object",
        "properties": {name: draw(children) for name in names},
        "required": [name for name in names if draw(st.booleans())],
        "additionalProperties": False,
    }


def nested(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        children,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return st.one_of(objects(children), arrays, st.lists(children, min_size=1, max_size=2).map(lambda c: {"anyOf": c}))


SCHEMAS = objects(st.recursive(LEAVES, nested, max_leaves=5)).map(
    lambda schema: schema | {"$defs": {"shared": {"enum": ["shared", "värde", 7]}}}
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_an_answer_under_any_schema_parses_and_is_valid(
    engine: Engine, compiler: GrammarCompiler, schema: dict[str, Any], seed: int
) -> None:
    """Cold and hot, alone in its batch and beside another: valid, or cut by max_tokens and said to be."""
    grammar = schema_grammar(compiler, schema)
    driver = Driver(engine)
    ids = prompt(engine, "Give me an example in JSON.")
    driver.add(0, request(ids, ending(engine, grammar), ending(engine, grammar, **drawn(seed))))
    driver.add(1, request(ids, ending(engine, grammar, temperature=1.0, seed=seed)))
    driver.run()
    for key, output in driver.ended.items():
        assert output.error is None
        event(str(output.end))
        if output.end == "stop":
            assert is_valid(schema, driver.texts[key])
        else:
            assert (output.end, output.num_tokens) == ("length", 120)
    assert num_leaked_blocks(engine) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_json_object_parses(engine: Engine, compiler: GrammarCompiler, temperature: float) -> None:
    grammar = compiled(compiler, GrammarSpec.json_object())
    driver = Driver(engine)
    params = (ending(engine, grammar, 200, temperature=temperature, seed=seed) for seed in range(12))
    driver.add(0, request(prompt(engine, "Tell me of a fox in JSON."), *params))
    driver.run()
    complete = [driver.texts[key] for key, output in driver.ended.items() if output.end == "stop"]
    assert len(complete) >= 6
    assert all(isinstance(json.loads(text), dict) for text in complete)
    cut = [output for output in driver.ended.values() if output.end != "stop"]
    assert all((output.end, output.num_tokens) == ("length", 200) for output in cut)


def test_the_last_token_of_a_complete_answer_ends_it_though_max_tokens_is_reached(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    grammar = compiled(compiler, GrammarSpec.choice(["red and blue"], FIELD))
    num_tokens = len(engine.tokenizer.encode("red and blue"))
    for max_tokens, end in ((num_tokens, "stop"), (num_tokens - 1, "length")):
        driver = Driver(engine)
        driver.add(0, request(prompt(engine, "Colours?"), ending(engine, grammar, max_tokens)))
        driver.run()
        output = driver.ended[0, 0]
        assert (output.end, output.num_tokens) == (end, max_tokens)
    assert driver.texts[0, 0] == "red and"


# --- neighbours -------------------------------------------------------------------------------------------------------

PLAIN = {
    "greedy": {},
    "drawn": drawn(7),
    "free": {"temperature": 1.3, "seed": 3},
    "penalized": {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.5, "logit_bias": {40: -3.0}},
}


def tokens_of(engine: Engine, others: list[SamplingParams], **more: Any) -> dict[str, list[int]]:
    """The tokens of four ordinary requests, beside `others`."""
    driver = Driver(engine)
    for number, params in enumerate(others):
        driver.add(100 + number, request(prompt(engine, f"Tell me of fox {number} in JSON."), params))
    for number, kind in enumerate(PLAIN):
        params = greedy(40, num_logprobs=0, **PLAIN[kind], **more)
        driver.add(number, request(prompt(engine, "Tell me a story."), params))
    driver.run()
    return {kind: driver.token_ids[number, 0] for number, kind in enumerate(PLAIN)}


def test_who_has_no_grammar_gets_the_same_tokens_beside_those_who_have(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    grammar = schema_grammar(compiler, PERSON)
    crowd = [ending(engine, grammar), ending(engine, grammar, temperature=1.0, seed=1), ending(engine, grammar)]
    assert tokens_of(engine, crowd) == tokens_of(engine, [])


def test_a_constrained_answer_is_the_same_alone_and_in_a_crowd(engine: Engine, compiler: GrammarCompiler) -> None:
    grammar = schema_grammar(compiler, PERSON)
    choice = compiled(compiler, GrammarSpec.choice(["yes", "no", "may be"], FIELD))
    wanted = [ending(engine, grammar), ending(engine, grammar, **drawn(11)), ending(engine, choice, **drawn(2))]

    def answers(num_others: int, together: bool) -> list[str]:
        drivers = [Driver(engine) for _ in wanted]
        for place, params in enumerate(wanted):
            driver = drivers[0 if together else place]
            driver.add(place, request(prompt(engine, "Who is Red?"), params))
            if not together:
                driver.run()
        for number in range(num_others):
            drivers[0].add(50 + number, request(prompt(engine, f"Story {number}"), greedy(30)))
        drivers[0].run()
        return [drivers[0 if together else place].texts[place, 0] for place in range(len(wanted))]

    assert answers(0, together=False) == answers(20, together=True)


def test_preempted_answers_go_on_in_their_grammar(cache_dir: Path, compiler: GrammarCompiler, engine: Engine) -> None:
    """A cache too small for all: some are thrown out in the middle and recomputed, and nothing else differs."""
    crowded = tiny_engine(cache_dir, compiled=True, num_blocks=24, prefix_caching=False)
    grammar = schema_grammar(
        compiler, {**PERSON, "properties": {"name": {"type": "string", "minLength": 60}, "age": {}}}
    )
    texts = []
    for used in (engine, crowded):
        driver = Driver(used)
        stats = [
            driver.add(number, request(prompt(used, f"Number {number}"), ending(used, grammar, 90, **drawn(number))))
            for number in range(6)
        ]
        driver.run()
        texts.append(driver.texts)
    assert sum(one.num_preemptions for one in stats) > 0
    assert texts[0] == texts[1]
    assert num_leaked_blocks(crowded) == 0
    crowded.close()


def test_choices_of_one_request_have_places_of_their_own(engine: Engine, compiler: GrammarCompiler) -> None:
    grammar = schema_grammar(compiler, PERSON)
    driver = Driver(engine)
    params = tuple(ending(engine, grammar, temperature=1.2, seed=seed) for seed in range(8))
    driver.add(0, request(prompt(engine, "Who is it?"), *params))
    driver.run()
    complete = [driver.texts[key] for key, output in driver.ended.items() if output.end == "stop"]
    assert len(set(complete)) > 3
    assert all(is_valid(PERSON, text) for text in complete)


def test_an_abort_in_the_middle_of_a_grammar_leaves_nothing(engine: Engine, compiler: GrammarCompiler) -> None:
    driver = Driver(engine)
    driver.add(0, request(prompt(engine, "Who?"), ending(engine, schema_grammar(compiler, PERSON))))
    for _ in range(5):
        driver.step()
    engine.abort(0)
    assert not engine.has_work
    assert num_leaked_blocks(engine) == 0
    assert not engine._sampler._rows


# --- beside other fields ----------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(engine: Engine, compiler: GrammarCompiler) -> None:
    """The grammar takes part in choosing, and not in what the model thought of it."""
    grammar = compiled(compiler, GrammarSpec.choice(["Zebra"], FIELD))
    driver = Driver(engine)
    driver.add(0, request(prompt(engine, "Colour?"), ending(engine, grammar, num_logprobs=3)))
    driver.run()
    assert engine.tokenizer.decode(driver.token_ids[0, 0]) == "Zebra"
    assert min(driver.logprobs[0, 0]) < -5.0


def test_a_bias_moves_the_choice_within_the_grammar_and_not_out_of_it(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    grammar = compiled(compiler, GrammarSpec.choice(["fox", "hen"], FIELD))
    ids = {text: engine.tokenizer.encode(text)[0] for text in ("fox", "hen", "dog")}
    for wanted in ("fox", "hen"):
        driver = Driver(engine)
        bias = {ids[wanted]: 100.0, ids["dog"]: 100.0}
        driver.add(0, request(prompt(engine, "Which?"), ending(engine, grammar, logit_bias=bias)))
        driver.run()
        assert driver.texts[0, 0] == wanted


@pytest.mark.parametrize("sampling", [drawn(3), {"temperature": 1.0, "seed": 3}, {"temperature": 0.0}], ids=str)
def test_every_way_to_draw_stays_among_few_tokens(
    engine: Engine, compiler: GrammarCompiler, sampling: dict[str, Any]
) -> None:
    grammar = compiled(compiler, GrammarSpec.regex("[01]{24}", FIELD))
    driver = Driver(engine)
    driver.add(0, request(prompt(engine, "Bits?"), ending(engine, grammar, **sampling)))
    driver.run()
    assert len(driver.texts[0, 0]) == 24 and set(driver.texts[0, 0]) <= {"0", "1"}


def test_a_grammar_that_becomes_too_costly_ends_its_own_answer_only(engine: Engine, compiler: GrammarCompiler) -> None:
    costly = compiled(compiler, GrammarSpec.regex("(.*(x|y).{0,400}(x|e|a).{0,400}){5}", FIELD))
    driver = Driver(engine)
    driver.add(0, request(prompt(engine, "Go on."), ending(engine, costly, 250, temperature=1.5, seed=1)))
    driver.add(1, request(prompt(engine, "Tell me a story."), greedy(60)))
    driver.run()
    alone = Driver(engine)
    alone.add(1, request(prompt(engine, "Tell me a story."), greedy(60)))
    alone.run()
    assert driver.texts[1, 0] == alone.texts[1, 0]
    error = driver.ended[0, 0].error
    assert isinstance(error, InvalidRequestError) and error.param == FIELD
    assert num_leaked_blocks(engine) == 0


# --- a device that works beside the host ------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
def test_a_grammar_that_comes_while_a_step_is_under_way_changes_nobody_elses_tokens(lazy: bool) -> None:
    """40 tokens, and a device that samples by itself until somebody needs the host."""
    tokenizer = Tokenizer.from_folder(TINY)
    compiler = GrammarCompiler.for_model(tokenizer, VOCAB_SIZE, frozenset({0}))
    grammar = compiled(compiler, GrammarSpec.regex("[0-9]{9}", FIELD))
    compiler.close()

    def run(with_grammar: bool) -> Driver:
        pool = BlockPool(32, 4, prefix_caching=True)
        scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32)
        device = FakePipelinedDevice(32, 4, lazy=lazy)
        driver = Driver(Engine(load_config(TINY), tokenizer, device, scheduler, Sampler(VOCAB_SIZE), bytes_per_block=8))
        driver.add(0, request([20, 21], greedy(20)))
        driver.add(1, request([22, 21], greedy(20, temperature=1.0, seed=4)))
        for _ in range(3):
            driver.step()
        if with_grammar:
            driver.add(2, request([23], greedy(12, grammar=grammar, stop_token_ids=frozenset({0}))))
        driver.run()
        assert num_leaked_blocks(driver.engine) == 0
        return driver

    beside, without = run(True), run(False)
    assert {key: beside.texts[key] for key in without.texts} == without.texts
    assert beside.texts[2, 0].isdigit() and len(beside.texts[2, 0]) == 9
    assert beside.ended[2, 0].end == "stop"
