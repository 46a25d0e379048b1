"""Answer several prompts as if they were one request. Knows event streams; knows nothing of HTTP or of providers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import TypeVar

import msgspec

from autobot_llm.errors import ProviderError
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import Event, Finish, Start, Timings, Usage

QUEUE_LIMIT = 64  # events that may wait for a slow reader before the streams are held back

NumberT = TypeVar("NumberT", int, float)


async def merge_streams(
    streams: Sequence[AsyncGenerator[Event, None]], num_choices: int
) -> AsyncGenerator[Event, None]:
    """Run the streams together and pass their events on as one stream.

    Choice `i` of stream `p` becomes choice `p * num_choices + i`. There is one `Start` and one `Finish`: usage and
    savings are summed up, and times are the longest. The first error ends all; closing this closes all.
    """
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue(QUEUE_LIMIT)
    tasks = [
        asyncio.create_task(_forward(stream, position * num_choices, queue)) for position, stream in enumerate(streams)
    ]
    started = False
    finishes: list[Finish] = []
    try:
        while len(finishes) < len(streams):
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finish):
                finishes.append(event)
            elif not isinstance(event, Start):
                yield event
            elif not started:
                started = True
                yield event
        yield _summed(finishes)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    stream: AsyncGenerator[Event, None], first_index: int, queue: asyncio.Queue[Event | Exception]
) -> None:
    event: Event | None = None
    try:
        async with aclosing(stream):
            async for event in stream:
                if not isinstance(event, Start | Finish):
                    event = msgspec.structs.replace(event, index=first_index + event.index)
                await queue.put(event)
        if not isinstance(event, Finish):
            await queue.put(ProviderError("the answer to one of the prompts ended without its finish"))
    except Exception as error:
        await queue.put(error)


def _summed(finishes: Sequence[Finish]) -> Finish:
    usages = [finish.usage for finish in finishes]
    usage = Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        cache_write_tokens=sum(usage.cache_write_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )
    timings = [finish.timings for finish in finishes]
    longest = Timings(
        queued=max(_known(timing.queued for timing in timings), default=None),
        queue_position=max(_known(timing.queue_position for timing in timings), default=None),
        time_to_first_token=max(_known(timing.time_to_first_token for timing in timings), default=None),
        total=max(_known(timing.total for timing in timings), default=None),
    )
    by_name: dict[tuple[str, bool], list[OptimizationOutcome]] = {}
    for outcome in (outcome for finish in finishes for outcome in finish.optimizations):
        by_name.setdefault((outcome.name, outcome.applied), []).append(outcome)
    return Finish(usage=usage, timings=longest, optimizations=tuple(_summed_outcome(same) for same in by_name.values()))


def _summed_outcome(outcomes: Sequence[OptimizationOutcome]) -> OptimizationOutcome:
    tokens = _known(outcome.tokens_saved for outcome in outcomes)
    milliseconds = _known(outcome.milliseconds_saved for outcome in outcomes)
    num_bytes = _known(outcome.bytes_saved for outcome in outcomes)
    return msgspec.structs.replace(
        outcomes[0],
        tokens_saved=sum(tokens) if tokens else None,
        milliseconds_saved=sum(milliseconds) if milliseconds else None,
        bytes_saved=sum(num_bytes) if num_bytes else None,
    )


def _known(values: Iterable[NumberT | None]) -> list[NumberT]:
    return [value for value in values if value is not None]
