"""Grammars for the tests, and the walk of a text through one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import numpy as np

from autobot_llm.engine.grammar.compiler import GrammarCompiler
from autobot_llm.engine.grammar.matcher import Grammar, Matcher
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.tokenizer import Tokenizer

FIELD = "response_format"


def compiled(compiler: GrammarCompiler, spec: GrammarSpec) -> Grammar:
    return asyncio.run(compiler.compile(spec, FIELD))


def schema_grammar(compiler: GrammarCompiler, schema: dict[str, Any]) -> Grammar:
    return compiled(compiler, GrammarSpec.json_schema(schema, FIELD))


def allowed(matcher: Matcher) -> set[int]:
    return set(np.flatnonzero(matcher.mask()).tolist())


def walk(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar takes a text, token by token, each of them allowed by the mask before it."""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        is_allowed = token_id in allowed(matcher)
        if is_allowed != (matcher.num_allowed([token_id]) == 1):
            # A text that is forced is written in one way only; the parser would take it in others, too.
            assert len(allowed(matcher)) == 1
        if not matcher.advance(token_id):
            return False
    return True


def is_valid(schema: dict[str, Any], text: str) -> bool:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return True
