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

import llguidance

from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.grammar.vocabulary import Vocabulary
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import InvalidRequestError, OverloadedError

MAX_GRAMMARS = 256
MAX_WAITING = 64
# Work for one place of a grammar. The library's speed makes this about 10 ms at worst, when a hostile expression is met
# for the first time; ordinary ones take hundredths of that.
MAX_LEXER_FUEL_PER_STEP = 100_000


class GrammarCompiler:
    """Compiled grammars of one model, the least recently used of `max_grammars` dropped first.

    `make_vocabulary` is called with the first grammar, on the compiler's thread. `num_compiled` and `num_reused` count.
    """

    def __init__(self, make_vocabulary: Callable[[], Vocabulary], *, max_grammars: int = MAX_GRAMMARS) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._max_grammars = max_grammars
        self._grammars: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="autobot-grammar")
        self._num_waiting = 0
        self.num_compiled = 0
        self.num_reused = 0

    @classmethod
    def for_model(cls, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> GrammarCompiler:
        """`end_ids` are the tokens that end an answer of this model."""
        return cls(partial(Vocabulary, tokenizer, vocab_size, end_ids))

    async def compile(self, spec: GrammarSpec, field: str) -> Grammar:
        """The grammar of `spec`. Raises InvalidRequestError with `field` and the library's reason where it is none,
        OverloadedError while too many wait to be compiled."""
        if (known := self._known(spec)) is not None:
            return known.named(field)
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} grammars are waiting to be compiled", retry_after=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, spec, field)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Let the thread go, once it is done with what it does."""
        self._thread.shutdown(cancel_futures=True)

    def _known(self, spec: GrammarSpec) -> Grammar | None:
        with self._lock:
            if (grammar := self._grammars.get(spec)) is not None:
                self._grammars.move_to_end(spec)
                self.num_reused += 1
            return grammar

    def _compile(self, spec: GrammarSpec, field: str) -> Grammar:
        if (known := self._known(spec)) is not None:  # another request asked for it meanwhile
            return known.named(field)
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        grammar = _compiled(spec, self._vocabulary, field)
        with self._lock:
            self._grammars[spec] = grammar
            self.num_compiled += 1
            if len(self._grammars) > self._max_grammars:
                self._grammars.popitem(last=False)
        return grammar


_DRAWING = re.compile(r"<|(\d+ )?\| ")
_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
    "regex": llguidance.LLMatcher.grammar_from_regex,
    "lark": llguidance.LLMatcher.grammar_from_lark,
}


def _compiled(spec: GrammarSpec, vocabulary: Vocabulary, field: str) -> Grammar:
    limits = llguidance.LLParserLimits(step_lexer_fuel=MAX_LEXER_FUEL_PER_STEP, verbose_errors=False)
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
