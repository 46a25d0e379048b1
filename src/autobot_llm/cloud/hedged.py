"""Ask a second time where an answer is slow to begin, and take the one that begins first. Knows events and clocks;
knows nothing of HTTP.

After Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013: the second call is sent once the first has taken longer
than 95 % of the model's calls, so that few are sent and most of the slow tail goes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec

from autobot_llm.cloud.rate_limited import RateLimited
from autobot_llm.cloud.retry import RetryBudget
from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import Event, Finish, LLMRequest, SecondCall

NAME = "hedging"
SHARE = 0.05  # of all calls that may be made a second time
LEAST_SAMPLES = 20  # before anything is known of a model's pace
MOST_SAMPLES = 200
QUANTILE = 0.95
MOST_MODELS = 1000

Wishes = Literal["deterministic", "all"]


def hedging(settings: Settings) -> Link | None:
    """None where the settings leave it off."""
    wishes = settings.cloud_hedging
    return None if wishes == "off" else HedgeLink(wishes)


class HedgeLink(Link):
    """Puts `Hedged` in front of every provider over HTTP; each has a share of its own."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._hedged: dict[str, Hedged] = {}

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        if not isinstance(chain, RateLimited):
            return chain  # without its limits a second call might be one too many
        self._hedged[provider.name] = hedged = Hedged(chain, self._wishes)
        return hedged

    def metrics_of(self, provider: str) -> dict[str, float]:
        hedged = self._hedged.get(provider)
        return hedged.metrics() if hedged is not None else {}


class Pace:
    """How soon a model's answers begin, in seconds, by the latest of them."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=MOST_SAMPLES)
        self._limit: float | None = None
        self._num_since = 0

    def add(self, seconds: float) -> None:
        self._samples.append(seconds)
        self._num_since += 1

    def limit(self) -> float | None:
        """The time within which 95 % began; None while too few are known."""
        if len(self._samples) < LEAST_SAMPLES:
            return None
        if self._limit is None or self._num_since >= LEAST_SAMPLES:
            ordered = sorted(self._samples)
            self._limit, self._num_since = ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))], 0
        return self._limit


class Hedged:
    """`inner`, asked a second time where its answer is slow to begin and the request may be made twice.

    `wishes` "deterministic" leaves requests alone whose answer is drawn at random. None with side effects is ever made
    twice, and none while the model's rate limit makes others wait.
    """

    def __init__(self, inner: RateLimited, wishes: Wishes) -> None:
        self._inner = inner
        self._wishes = wishes
        self._budget = RetryBudget(reserve=0.0, share=SHARE, most=10.0)
        self._paces: OrderedDict[tuple[str | None, bool], Pace] = OrderedDict()
        self._num_hedges = 0
        self._num_won = 0

    def metrics(self) -> dict[str, float]:
        return {"num_hedges": self._num_hedges, "num_hedges_won": self._num_won}

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """The answer that begins first; the other call is given up at once. Raises the first call's error where
        neither begins.
        """
        pace = self._pace(request)
        self._budget.note_call()
        clock = asyncio.get_running_loop().time
        began = clock()
        why_not = self._why_not(request)
        patience = pace.limit() if why_not is None else None
        first = _Call(self._inner.stream(request))
        second: _Call | None = None
        try:
            if patience is not None:
                await first.begins_within(patience)
                if not first.has_begun and not self._inner.makes_wait(request.model) and self._budget.take():
                    self._num_hedges += 1
                    second = _Call(self._inner.stream(_again(request), may_wait=False))
                    await _one_begins(first, second)
            winner = second if second is not None and not first.has_begun and second.has_begun else first
            loser = first if winner is second else second
            if loser is not None:
                await loser.close()
            self._num_won += winner is second
            event = await winner.first()
            if not self._inner.makes_wait(request.model):
                pace.add(clock() - began)  # of the first call at least so long, where it lost
            outcome = _outcome(why_not, patience, second, winner)
            async with aclosing(winner.events) as events:
                yield _reported(event, outcome)
                async for event in events:
                    yield _reported(event, outcome)
        finally:
            await first.close()
            if second is not None:
                await second.close()

    def _pace(self, request: LLMRequest) -> Pace:
        key = (request.model, request.stream)
        if (pace := self._paces.get(key)) is None:
            if len(self._paces) >= MOST_MODELS:
                self._paces.popitem(last=False)
            pace = self._paces[key] = Pace()
        return pace

    def _why_not(self, request: LLMRequest) -> str | None:
        if request.has_side_effects:
            return "the request has side effects at the provider"
        if self._wishes == "deterministic" and request.temperature != 0 and request.seed is None:
            return "the answer is drawn at random, and AUTOBOT_CLOUD_HEDGING=deterministic"
        return None


class _Call:
    """One of two calls: its first event is waited for in a task of its own."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self.events = events
        self.task: asyncio.Task[Event] = asyncio.create_task(_next(events))

    @property
    def has_begun(self) -> bool:
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None

    async def begins_within(self, seconds: float) -> None:
        await asyncio.wait((self.task,), timeout=seconds)

    async def first(self) -> Event:
        return await self.task

    async def close(self) -> None:
        """Give it up, which closes its connection. May be called again."""
        if not self.task.done():
            self.task.cancel()
            await asyncio.wait((self.task,))
        if not self.task.cancelled():
            self.task.exception()  # nobody else may look at it
        await self.events.aclose()


async def _next(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events)


def _again(request: LLMRequest) -> LLMRequest:
    if type(request) is not LLMRequest:
        return request
    return SecondCall(**{name: getattr(request, name) for name in LLMRequest.__struct_fields__})


async def _one_begins(first: _Call, second: _Call) -> None:
    """Return when one of them has begun, or neither will."""
    waiting = {first.task, second.task}
    while waiting and not (first.has_begun or second.has_begun):
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


def _outcome(why_not: str | None, patience: float | None, second: _Call | None, winner: _Call) -> OptimizationOutcome:
    if second is not None:
        won = "began first" if winner is second else "was given up, as the first began after all"
        reason = f"the answer had not begun after {patience:.2f} s, as 95 % do; a second call was made and {won}"
        return OptimizationOutcome(name=NAME, applied=True, reason=reason)
    if why_not is None:
        why_not = (
            "too few of the model's answers were timed" if patience is None else "the answer began soon enough, or "
            "no second call was allowed"
        )  # fmt: skip
    return OptimizationOutcome(name=NAME, applied=False, reason=why_not)


def _reported(event: Event, outcome: OptimizationOutcome) -> Event:
    if type(event) is not Finish:
        return event
    return msgspec.structs.replace(event, optimizations=(*event.optimizations, outcome))
