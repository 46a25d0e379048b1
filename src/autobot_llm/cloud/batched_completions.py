"""Have completions of plain prompts made in one call. Knows requests and events; when they go together, the batcher
knows.

Only what may wait comes here: a setting says so. Chats and streams are never delayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from autobot_llm.cloud.request_batching import CloudRequestBatcher
from autobot_llm.errors import InvalidRequestError, ProviderError
from autobot_llm.providers.base import Streamer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import ChoiceEnd, Event, Finish, LLMRequest, MergedRequest, Start, TextDelta, Usage

NAME = "request_batching"
MOST_CHARACTERS = 60_000  # what is longer gains little from company

Events = tuple[Event, ...]


class BatchedCompletions:
    """`inner`, asked for up to `max_size` prompts at a time that come within `window_ms` and are alike otherwise.

    Where a shared call is refused, each prompt is sent alone, so that one that is wrong does not fail the others.
    """

    def __init__(self, inner: Streamer, window_ms: float, max_size: int) -> None:
        self._inner = inner
        self._window_ms = window_ms
        self._max_size = max_size
        self._num_under_way: dict[bytes, int] = {}
        self._batchers: dict[bytes, CloudRequestBatcher[LLMRequest, Events]] = {}
        self._num_shared_calls = 0
        self._num_shared_requests = 0

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """The answer; of a shared call, this request's part. Its tokens and costs are divided by length."""
        key = _key(request)
        if key is None:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    yield event
            return
        self._num_under_way[key] = self._num_under_way.get(key, 0) + 1
        try:
            if (batcher := self._batchers.get(key)) is None:
                batcher = CloudRequestBatcher(self._window_ms, self._max_size, send=self._send)
                self._batchers[key] = batcher
            answer = await batcher.add_request(request)
        finally:
            self._num_under_way[key] -= 1
            if not self._num_under_way[key]:
                del self._num_under_way[key]
                self._batchers.pop(key, None)
        for event in answer:
            yield event

    async def close(self) -> None:
        """Give up what is under way. May be called again."""
        await asyncio.gather(*(batcher.close() for batcher in tuple(self._batchers.values())))

    def metrics(self) -> dict[str, float]:
        return {"num_shared_calls": self._num_shared_calls, "num_requests_in_shared_calls": self._num_shared_requests}

    async def _send(self, requests: Sequence[LLMRequest]) -> Sequence[Events | Exception]:
        if len(requests) == 1:
            return [await self._alone(requests[0], f"no other one like it came within {self._window_ms:g} ms")]
        try:
            events = await self._events(_merged(requests))
        except InvalidRequestError:
            why = "the provider refused the call that it was part of, so it was sent alone"
            alone = await asyncio.gather(*(self._alone(one, why) for one in requests), return_exceptions=True)
            return [_raised_unless_ours(one) for one in alone]
        self._num_shared_calls += 1
        self._num_shared_requests += len(requests)
        return _divided(events, requests)

    async def _alone(self, request: LLMRequest, why: str) -> Events:
        *events, last = await self._events(request)
        line = OptimizationOutcome(name=NAME, applied=False, reason=why)
        return (*events, _with(last, line))

    async def _events(self, request: LLMRequest) -> Events:
        async with aclosing(self._inner.stream(request)) as events:
            answer = tuple([event async for event in events])
        if not answer or type(answer[-1]) is not Finish:
            raise ProviderError("the answer was cut short: the provider's stream ended without a Finish event")
        return answer


def _key(request: LLMRequest) -> bytes | None:
    """What requests have alike that can share a call; None for one that cannot share any.

    With a seed and a temperature, a prompt's place in the call could change what is drawn for it.
    """
    prompt = request.prompt
    if prompt is None or request.stream or request.has_side_effects or len(prompt) > MOST_CHARACTERS:
        return None
    if request.seed is not None and request.temperature != 0:
        return None
    kind: str | list[int] = "" if isinstance(prompt, str) else []
    alike = msgspec.structs.replace(request, prompt=kind, request_id=None, timeout=None, metadata={})
    return msgspec.json.encode(alike)


def _merged(requests: Sequence[LLMRequest]) -> MergedRequest:
    timeouts = [request.timeout for request in requests]
    fields = {name: getattr(requests[0], name) for name in LLMRequest.__struct_fields__}
    fields["timeout"] = None if None in timeouts else max(timeout for timeout in timeouts if timeout is not None)
    return MergedRequest(**fields, prompts=[one.prompt for one in requests if one.prompt is not None])


def _divided(events: Events, requests: Sequence[LLMRequest]) -> list[Events | Exception]:
    """Each request's part of the answer."""
    num_choices = requests[0].n
    start = next(event for event in events if isinstance(event, Start))
    finish = events[-1]
    assert isinstance(finish, Finish)
    parts: list[list[Event]] = [[] for _ in requests]
    lengths = [0] * len(requests)
    num_ended = [0] * len(requests)
    for event in events:
        if isinstance(event, Start | Finish):
            continue
        place, index = divmod(event.index, num_choices)
        if not 0 <= place < len(requests):
            return [ProviderError(f"{start.provider} answered a prompt that it was not sent")] * len(requests)
        parts[place].append(msgspec.structs.replace(event, index=index))
        num_ended[place] += isinstance(event, ChoiceEnd)
        if isinstance(event, TextDelta):
            lengths[place] += len(event.logprobs) or len(event.text)
    usages = _divided_usage(finish.usage, [len(one.prompt or "") for one in requests], lengths)
    answers: list[Events | Exception] = []
    for request, part, ended, usage in zip(requests, parts, num_ended, usages, strict=True):
        if ended < num_choices:
            answers.append(ProviderError(f"{start.provider} left a prompt of a shared call without its answer"))
            continue
        own_start = msgspec.structs.replace(start, request_id=request.request_id or start.request_id)
        share = usage.total_tokens / max(1, finish.usage.total_tokens)
        lines = tuple(_share_of(line, share) for line in finish.optimizations)
        shared = OptimizationOutcome(
            name=NAME, applied=True,
            reason=f"one call for {len(requests)} prompts; tokens and costs are divided by length, an estimate",
        )  # fmt: skip
        own_finish = msgspec.structs.replace(finish, usage=usage, optimizations=(*lines, shared))
        answers.append((own_start, *part, own_finish))
    return answers


def _divided_usage(usage: Usage, prompt_lengths: Sequence[int], answer_lengths: Sequence[int]) -> list[Usage]:
    """Whole tokens for each, which add up to what was told."""
    prompts = _divided_number(usage.prompt_tokens, prompt_lengths)
    answers = _divided_number(usage.completion_tokens, answer_lengths)
    cached = _divided_number(usage.cached_tokens, prompt_lengths)
    written = _divided_number(usage.cache_write_tokens, prompt_lengths)
    return [
        Usage(prompt_tokens=one, completion_tokens=two, cached_tokens=three, cache_write_tokens=four)
        for one, two, three, four in zip(prompts, answers, cached, written, strict=True)
    ]


def _divided_number(total: int, lengths: Sequence[int]) -> list[int]:
    if not any(lengths):
        lengths = [1] * len(lengths)
    whole = sum(lengths)
    parts, so_far, told = [], 0, 0
    for length in lengths:
        so_far += length
        until_here = total * so_far // whole
        parts.append(until_here - told)
        told = until_here
    return parts


def _share_of(line: OptimizationOutcome, share: float) -> OptimizationOutcome:
    return msgspec.structs.replace(
        line,
        tokens_saved=None if line.tokens_saved is None else round(line.tokens_saved * share),
        dollars_spent=None if line.dollars_spent is None else line.dollars_spent * share,
        dollars_saved=None if line.dollars_saved is None else line.dollars_saved * share,
    )


def _with(finish: Event, line: OptimizationOutcome) -> Event:
    assert isinstance(finish, Finish)
    return msgspec.structs.replace(finish, optimizations=(*finish.optimizations, line))


def _raised_unless_ours(outcome: Events | BaseException) -> Events | Exception:
    if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
        raise outcome
    return outcome
