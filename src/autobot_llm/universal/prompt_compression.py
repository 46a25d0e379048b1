"""Shorten a request's prompt on its way to the provider. Knows which parts of a request may be touched; the strategies
are in compression/, loaded when a request first needs them.

Lossy, and therefore off: AUTOBOT_PROMPT_COMPRESSION_ENABLED switches the rules on for every request, a request asks by
itself with `compression` (in `extra_body`; over HTTP a field of the body), and one that needs every word as it is says
`{"mode": "off"}`. Never touched: raw prompts, tools, schemas, images, tool results, and the turns of the conversation
other than the system's; the last user message only by the strategies that are asked for by name.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from autobot_llm.cloud.pricing import PriceTable, cost_of, load_prices
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.providers.base import Link, Provider, Streamer, TextScorer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import ChatMessage, Event, Finish, LLMRequest, Start, Usage

if TYPE_CHECKING:
    from autobot_llm.universal.compression.compressor import PromptCompressor
    from autobot_llm.universal.compression.result import CompressionResult

NAME = "prompt_compression"
FIELD = "compression"
LONG_TEXT = 20_000  # characters from which the work is done beside the event loop

_Result = TypeVar("_Result")
Strategy = Literal["rules", "context", "perplexity"]
_ShortenContext = Callable[[str, str], Coroutine[Any, Any, "CompressionResult"]]


class CompressionControl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request wants of compression. `default`: rules where the settings or a ratio ask for them, else nothing.

    `rules` shorten system messages. `context` and `perplexity` do that and shorten the last user message too, all but
    its question. `off`: every word reaches the model. `ratio` None is AUTOBOT_PROMPT_COMPRESSION_RATIO.
    """

    mode: Literal["default", "off", "rules", "context", "perplexity"] = "default"
    ratio: Annotated[float, Meta(gt=0, le=1)] | None = None


def prompt_compression(settings: Settings) -> PromptCompression:
    """The link of one interface."""
    return PromptCompression(settings)


class PromptCompression(Link):
    """Compression in front of every provider of an interface; they share the small model that judges words."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_compressed: Counter[str] = Counter()  # requests, by provider
        self.tokens_saved: Counter[str] = Counter()
        self._judge: Provider | None = None
        self._starting = asyncio.Lock()

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return _CompressingChain(self, chain, provider)

    def state(self) -> tuple[bool, str]:
        if self.settings.prompt_compression_enabled:
            return True, "system prompts are shortened by rules; lossy"
        return False, "AUTOBOT_PROMPT_COMPRESSION_ENABLED is off: it is lossy; a request may ask for it"

    def metrics_of(self, provider: str) -> dict[str, float]:
        return {
            "num_compressed_requests": self.num_compressed[provider],
            "num_tokens_saved_by_compression": self.tokens_saved[provider],
        }

    def with_dollars(self, line: OptimizationOutcome, answered: Start) -> OptimizationOutcome:
        """`line` with what its tokens would have cost at the model that answers, where that has a price."""
        if not line.tokens_saved or (price := self._prices.of(answered.provider, answered.model)) is None:
            return line
        cost = cost_of(price, Usage(prompt_tokens=line.tokens_saved, completion_tokens=0))
        return msgspec.structs.replace(line, dollars_saved=cost.spent)

    @cached_property
    def _prices(self) -> PriceTable:
        return load_prices(self.settings.cloud_prices)

    async def close(self) -> None:
        judge, self._judge = self._judge, None
        if judge is not None:
            await judge.close()

    async def judge(self) -> TextScorer:
        """The embedded model, on the CPU, started when first needed. Raises UnsupportedError where it cannot be."""
        async with self._starting:
            if self._judge is None:
                try:
                    from autobot_llm.providers.native import NativeProvider
                except ModuleNotFoundError as exc:
                    raise UnsupportedError(
                        f"compression: perplexity needs {exc.name}, which is not installed: "
                        'pip install "autobot_llm[engine]"',
                        param=FIELD,
                    ) from exc
                # Not the user's settings: those are for the models that answer.
                judge = NativeProvider(
                    Settings(
                        device="cpu",
                        warm_prefixes=False,
                        cache_dir=self.settings.cache_dir,
                        compiled_step=self.settings.compiled_step,
                        cpu_threads=self.settings.cpu_threads,
                    )
                )
                try:
                    await judge.start()
                except BaseException:
                    await judge.close()
                    raise
                self._judge = judge
        scorer: object = self._judge
        assert isinstance(scorer, TextScorer), "the native provider scores texts"
        return scorer


class _CompressingChain:
    """Compression in front of one provider's chain."""

    def __init__(self, shared: PromptCompression, inner: Streamer, provider: Provider) -> None:
        self._shared = shared
        self._inner = inner
        self._name = provider.name
        teller: object = provider
        self._scorer = teller if isinstance(teller, TextScorer) else None

    def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        if FIELD not in request.extra_body and not self._shared.settings.prompt_compression_enabled:
            return self._inner.stream(request)
        return self._compressed(request)

    async def _compressed(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        control = _control(request.extra_body.get(FIELD))
        extra = {name: value for name, value in request.extra_body.items() if name != FIELD}
        request = msgspec.structs.replace(request, extra_body=extra)
        request, line = await self._shorter(request, control)
        async with aclosing(self._inner.stream(request)) as events:
            async for event in events:
                if type(event) is Start:
                    line = self._shared.with_dollars(line, event)
                elif type(event) is Finish:
                    event = msgspec.structs.replace(event, optimizations=(line, *event.optimizations))
                yield event

    async def _shorter(
        self, request: LLMRequest, control: CompressionControl
    ) -> tuple[LLMRequest, OptimizationOutcome]:
        strategy = self._strategy(control)
        if strategy is None:
            reason = "the request asks for every word" if control.mode == "off" else "off unless a request names a mode"
            return request, OptimizationOutcome(name=NAME, applied=False, reason=reason)
        if request.messages is None:
            reason = "a raw prompt is continued as it is"
            return request, OptimizationOutcome(name=NAME, applied=False, reason=reason)
        ratio = control.ratio or self._shared.settings.prompt_compression_ratio
        compressor = await self._compressor(request, ratio)
        edit = _Edit()
        system = compressor.compress_system_prompt
        messages = [
            await edit.message(message, lambda text: _aside_if_long(system, text))
            if message.role in ("system", "developer")
            else message
            for message in request.messages
        ]
        if strategy != "rules":
            shorten = await self._context_strategy(strategy, compressor)
            await _shorten_question(messages, edit, shorten)
        if edit.tokens_saved <= 0:
            reason = f"{strategy}: nothing to remove"
            return request, OptimizationOutcome(name=NAME, applied=False, reason=reason)
        self._shared.num_compressed[self._name] += 1
        self._shared.tokens_saved[self._name] += edit.tokens_saved
        return msgspec.structs.replace(request, messages=messages), edit.outcome(strategy, ratio)

    def _strategy(self, control: CompressionControl) -> Strategy | None:
        if control.mode == "off":
            return None
        if control.mode == "default":
            is_asked_for = control.ratio is not None or self._shared.settings.prompt_compression_enabled
            return "rules" if is_asked_for else None
        return control.mode

    async def _compressor(self, request: LLMRequest, ratio: float) -> PromptCompressor:
        from autobot_llm.universal.compression.compressor import PromptCompressor

        count = None if self._scorer is None else await self._scorer.text_counter(request.model)
        return PromptCompressor(ratio=ratio, count_tokens=count)

    async def _context_strategy(self, strategy: Strategy, compressor: PromptCompressor) -> _ShortenContext:
        if strategy == "context":

            async def select(question: str, context: str) -> CompressionResult:
                return await _aside_if_long(lambda text: compressor.compress_context(question, text), context)

            return select
        scorer = self._scorer or await self._shared.judge()

        async def prune(question: str, context: str) -> CompressionResult:
            return await compressor.compress_by_perplexity(context, scorer, question=question)

        return prune


class _Edit:
    """The texts of one request that became shorter, and what that saved."""

    def __init__(self) -> None:
        self.tokens_before = 0
        self.tokens_saved = 0
        self._is_estimate = False

    async def message(
        self, message: ChatMessage, shorten: Callable[[str], Coroutine[Any, Any, CompressionResult]]
    ) -> ChatMessage:
        """`message` with each of its texts shortened; parts of other kinds, and what else a part says, stay."""
        if isinstance(message.content, str):
            return msgspec.structs.replace(message, content=await self.text(message.content, shorten))
        parts = [
            {**part, "text": await self.text(part["text"], shorten)} if is_text(part) else part
            for part in message.content or ()
        ]
        return message if message.content is None else msgspec.structs.replace(message, content=parts)

    async def text(self, text: str, shorten: Callable[[str], Coroutine[Any, Any, CompressionResult]]) -> str:
        result = await shorten(text)
        if result.tokens_saved <= 0 or not result.compressed_text:
            return text
        self.tokens_before += result.original_tokens
        self.tokens_saved += result.tokens_saved
        self._is_estimate |= result.is_estimate
        return result.compressed_text

    def outcome(self, strategy: Strategy, ratio: float) -> OptimizationOutcome:
        after = self.tokens_before - self.tokens_saved
        counted = "estimated as a token for four characters" if self._is_estimate else "by the model's tokenizer"
        return OptimizationOutcome(
            name=NAME,
            applied=True,
            lossy=True,
            reason=f"{strategy}: {self.tokens_before} -> {after} tokens, {after / self.tokens_before:.0%} "
            f"(target {ratio:.0%}), {counted}",
            tokens_saved=self.tokens_saved,
        )


def is_text(part: dict[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


async def _shorten_question(messages: list[ChatMessage], edit: _Edit, shorten: _ShortenContext) -> None:
    """Shorten what the last message, if it is the user's, says besides its question: its last paragraph."""
    from autobot_llm.universal.compression.structure import paragraphs

    last = messages[-1] if messages else None
    if last is None or last.role != "user" or last.content is None:
        return
    texts = [last.content] if isinstance(last.content, str) else [p["text"] for p in last.content if is_text(p)]
    if not texts:
        return
    *_, question = await _aside_if_long(paragraphs, texts[-1].strip())

    async def all_but_the_question(text: str) -> CompressionResult:
        context, found, rest = text.rpartition(question)
        if not found or rest.strip():
            return await shorten(question, text)
        result = await shorten(question, context.rstrip())
        return msgspec.structs.replace(result, compressed_text=f"{result.compressed_text}\n\n{question}")

    messages[-1] = await edit.message(last, all_but_the_question)


async def _aside_if_long(work: Callable[[str], _Result], text: str) -> _Result:
    return await asyncio.to_thread(work, text) if len(text) > LONG_TEXT else work(text)


def _control(value: object) -> CompressionControl:
    if value is None:
        return CompressionControl()
    try:
        return msgspec.convert({"mode": value} if isinstance(value, str) else value, CompressionControl)
    except msgspec.ValidationError as exc:
        raise InvalidRequestError(
            f"{FIELD}: {exc}; expected mode (default, off, rules, context, perplexity) and ratio (above 0, at most 1)",
            param=FIELD,
        ) from exc
