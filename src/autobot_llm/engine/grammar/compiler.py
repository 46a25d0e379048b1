"""Compile grammars away from the event loop and the device, and keep them. Knows specs and one model's vocabulary;
knows nothing of requests.

A schema comes from a stranger. Its size is bounded before it gets here (spec.py), the library's work by its own limits,
the compilations that wait by a number; none of it runs on the thread that owns the device.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import llguidance

from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.grammar.vocabulary import Vocabulary
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import InvalidRequestError, OverloadedError, ProviderUnavailable

MAX_GRAMMARS = 128
MAX_WAITING = 64
# Work for one place of a grammar: some 4 ms at worst, of expressions made to explode; ordinary ones stay below 1 ms.
MAX_LEXER_FUEL_PER_STEP = 100_000
MAX_LEXER_STATES = 50_000  # of one grammar, half a kilobyte to two each; the library's own limit is five times that


class _Key(NamedTuple):
    """What a compiled grammar is kept under. Tenants share none: not its limits, and not the time that it saves."""

    spec: GrammarSpec
    field: str
    tenant: str


class GrammarCompiler:
    """Compiled grammars of one model, the least recently used of `max_grammars` dropped first.

    `make_vocabulary` is called with the first grammar, on the compiler's thread. `num_compiled` and `num_reused` count.
    """

    def __init__(self, make_vocabulary: Callable[[], Vocabulary], *, max_grammars: int = MAX_GRAMMARS) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._max_grammars = max_grammars
        self._grammars: OrderedDict[_Key, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="autobot-grammar")
        self._num_waiting = 0
        self._is_closed = False
        self.num_compiled = 0
        self.num_reused = 0

    @classmethod
    def for_model(
        cls, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int], *, max_grammars: int = MAX_GRAMMARS
    ) -> GrammarCompiler:
        """`end_ids` are the tokens that end an answer of this model."""
        return cls(partial(Vocabulary, tokenizer, vocab_size, end_ids), max_grammars=max_grammars)

    async def compile(self, spec: GrammarSpec, field: str, tenant: str = "") -> Grammar:
        """The grammar of `spec`. Raises InvalidRequestError with `field` and the library's reason where it is none,
        OverloadedError while too many wait to be compiled, ProviderUnavailable when the compiler is closed meanwhile.
        """
        key = _Key(spec, field, tenant)
        if (known := self._known(key)) is not None:
            return known
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} grammars are waiting to be compiled", retry_after=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, key)
        except asyncio.CancelledError:
            if self._is_closed and not _is_cancelled():
                raise ProviderUnavailable("the engine was stopped") from None
            raise
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Let the thread go, once it is done with what it does; what waits for it is given up."""
        self._is_closed = True
        self._thread.shutdown(cancel_futures=True)

    def _known(self, key: _Key) -> Grammar | None:
        with self._lock:
            grammar = self._grammars.get(key)
            if grammar is None or grammar.is_spent:
                return None
            self._grammars.move_to_end(key)
            self.num_reused += 1
            return grammar

    def _compile(self, key: _Key) -> Grammar:
        if (known := self._known(key)) is not None:  # another request asked for it meanwhile
            return known
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        grammar = _compiled(key.spec, self._vocabulary, key.field)
        with self._lock:
            self._grammars[key] = grammar
            self._grammars.move_to_end(key)
            self.num_compiled += 1
            if len(self._grammars) > self._max_grammars:
                self._grammars.popitem(last=False)
        return grammar


def _is_cancelled() -> bool:
    """Whether it is the request that was given up, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_DRAWING = re.compile(r"<|(\d+ )?\| ")
_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
    "regex": llguidance.LLMatcher.grammar_from_regex,
    "lark": llguidance.LLMatcher.grammar_from_lark,
}


def _compiled(spec: GrammarSpec, vocabulary: Vocabulary, field: str) -> Grammar:
    limits = llguidance.LLParserLimits(
        step_lexer_fuel=MAX_LEXER_FUEL_PER_STEP, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False
    )
    try:
        source = _SOURCES[spec.kind](spec.source)
        matcher = llguidance.LLMatcher(vocabulary.library_tokenizer, source, log_level=0, limits=limits)
    except ValueError as error:
        raise InvalidRequestError(f"{field}: {error}", param=field) from error
    if matcher.is_error():
        raise InvalidRequestError(f"{field}: {_reason(matcher.get_error())}", param=field)
    grammar = Grammar(matcher, vocabulary.vocab_size, field)
    grammar.start().mask()  # what compiling left open shows at the first place
    return grammar


def _reason(error: str) -> str:
    """The library's reason in one line, without the drawing of the grammar around it."""
    lines = [line.strip() for line in error.splitlines()]
    return " ".join(line for line in lines if line.strip("^ ") and not _DRAWING.match(line))[:500]
