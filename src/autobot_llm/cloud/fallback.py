"""Have another model answer where the one that was asked for cannot. Knows settings, models and errors; knows nothing
of how a model is reached.

It stands outside of every chain: the other model's answer is kept, deduplicated and paid for as that model's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec

from autobot_llm.errors import LLMError, OverloadedError, ProviderError
from autobot_llm.providers.base import Streamer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import Event, Finish, LLMRequest

logger = logging.getLogger("autobot_llm.cloud")

NAME = "fallback"
ANY = "*"


class FallbackTable:
    """Who answers instead of whom, from lines such as "openai/gpt-5.4 > anthropic/claude-sonnet-5 > native/tiny".

    The first name may be a model with or without its provider, "openai/*" for every model of a provider, or "*".
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self._alternatives: dict[str, tuple[str, ...]] = {}
        for line in lines:
            model, *others = (name.strip() for name in line.split(">"))
            self._alternatives[model] = (*self._alternatives.get(model, ()), *others)

    def of(self, provider: str, model: str | None) -> tuple[str, ...]:
        """The models to try after `model` of `provider`, by the most exact of the names that fit."""
        if not self._alternatives:
            return ()
        names = (
            [f"{provider}/{ANY}", ANY] if model is None else [f"{provider}/{model}", model, f"{provider}/{ANY}", ANY]
        )
        return next((self._alternatives[name] for name in names if name in self._alternatives), ())


class WithFallbacks:
    """`chain`, then each of `alternatives` in turn, until one has begun to answer.

    `reach` makes of a request for another model the chain that answers it and the request as that chain wants it.
    """

    def __init__(
        self,
        chain: Streamer,
        alternatives: Sequence[str],
        reach: Callable[[LLMRequest], Awaitable[tuple[Streamer, LLMRequest]]],
        *,
        default_timeout: float | None,
    ) -> None:
        self._chain = chain
        self._alternatives = alternatives
        self._reach = reach
        self._default_timeout = default_timeout

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """The first answer that begins. Raises the error of the model that was asked for where none does."""
        began = asyncio.get_running_loop().time()
        has_begun = False
        try:
            async with aclosing(self._chain.stream(request)) as events:
                async for event in events:
                    has_begun = True
                    yield event
                return
        except (ProviderError, OverloadedError) as error:
            if has_begun:
                raise
            failure = error
        for model in self._alternatives:
            try:
                chain, other = await self._reach(self._asking(request, model, began))
                async with aclosing(chain.stream(other)) as events:
                    async for event in events:
                        has_begun = True
                        yield _marked(event, request, other, failure) if type(event) is Finish else event
                    return
            except LLMError as error:
                if has_begun:
                    raise
                logger.warning("%s could not answer instead of %s: %s", model, _name(request), error.message)
        raise failure

    def _asking(self, request: LLMRequest, model: str, began: float) -> LLMRequest:
        """`request` for another model, with the time that is left."""
        timeout = request.timeout if request.timeout is not None else self._default_timeout
        if timeout is not None:
            timeout = max(0.001, timeout - (asyncio.get_running_loop().time() - began))
        return msgspec.structs.replace(request, model=model, provider=None, timeout=timeout)


def _name(request: LLMRequest) -> str:
    return f"{request.provider}/{request.model}" if request.model else f"{request.provider}'s model"


def _marked(finish: Finish, asked: LLMRequest, answered: LLMRequest, failure: LLMError) -> Finish:
    outcome = OptimizationOutcome(
        name=NAME,
        applied=True,
        reason=f"{_name(answered)} answered instead of {_name(asked)}, which failed: {failure.message}",
    )
    return msgspec.structs.replace(finish, fallback_used=True, optimizations=(*finish.optimizations, outcome))
