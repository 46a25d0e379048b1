"""An answer from memory, as it is given to one request at once. Knows entries and their forms; knows no store.

A hit need not be walked through event by event: what follows from the events alone (the collected answer, the part of
a reply that is the same each time) is made when it is first asked for and kept with the entry. `events` is the slow
twin: what is given here is what its events make.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypedDict, runtime_checkable

import msgspec

from autobot_llm.collect import Collected
from autobot_llm.report import RESPONSE_CACHING, OptimizationOutcome, dollars_worth
from autobot_llm.types import ChoiceEnd, Event, Finish, LLMRequest, LLMResponse, Start, Usage
from autobot_llm.universal.entries import Entry

_OVERHEAD = 600  # bytes that a collected answer takes in memory beside its text, about


class _Savings(TypedDict):
    tokens_saved: int | None
    milliseconds_saved: float | None
    dollars_saved: float | None


class Forms:
    """What was made of one entry; `num_bytes` is about what that takes in memory."""

    __slots__ = ("num_bytes", "pieces", "response", "written")

    def __init__(self) -> None:
        self.response: LLMResponse | None = None
        self.pieces: tuple[int, int] | None = None
        self.written: dict[str, bytes] = {}
        self.num_bytes = 0


def exact_line(entry: Entry, reason: str, began: float) -> OptimizationOutcome:
    """The report's line of the kept answer to an equal request, which waits since `began`."""
    return OptimizationOutcome(name=RESPONSE_CACHING, applied=True, reason=reason, **_savings(entry, began))


def with_savings(line: OptimizationOutcome, entry: Entry, began: float) -> OptimizationOutcome:
    """`line`, with what it saves to give `entry` again."""
    return msgspec.structs.replace(line, **_savings(entry, began))


def _savings(entry: Entry, began: float) -> _Savings:
    finish = entry.events[-1]
    assert isinstance(finish, Finish), "only whole answers are kept"
    return {
        "tokens_saved": finish.usage.total_tokens,
        "milliseconds_saved": max(0.0, entry.milliseconds - (time.perf_counter() - began) * 1000),
        "dollars_saved": dollars_worth(finish.optimizations),
    }


class KeptAnswer:
    """`entry` as the answer to the request `request_id`, which waits since `began` (of `time.perf_counter`).

    `line` says in the report how it came to be given, and marks it at its start where that was lossy. `grow` is told
    how many bytes more the entry takes whenever a form of it is made.
    """

    __slots__ = ("_began", "_entry", "_forms", "_grow", "_start", "line", "usage")

    def __init__(
        self,
        entry: Entry,
        line: OptimizationOutcome,
        request_id: str | None,
        began: float,
        forms: Forms | None = None,
        grow: Callable[[int], None] | None = None,
    ) -> None:
        start, finish = entry.events[0], entry.events[-1]
        assert isinstance(start, Start) and isinstance(finish, Finish), "only whole answers are kept"
        self._began = began
        self._entry = entry
        self._forms = Forms() if forms is None else forms
        self._grow = grow
        if request_id is not None or line.lossy:
            start = Start(
                request_id=request_id or start.request_id,
                model=start.model,
                provider=start.provider,
                reused=line if line.lossy else None,
            )
        self._start = start
        self.usage: Usage = finish.usage
        self.line = line

    @property
    def model(self) -> str:
        return self._start.model

    @property
    def num_pieces(self) -> tuple[int, int]:
        """How many pieces the answer came in, and how many of them were not the first one of their choice."""
        if self._forms.pieces is None:
            places = [event.index for event in self._entry.events if not isinstance(event, Start | ChoiceEnd | Finish)]
            self._forms.pieces = len(places), len(places) - len(set(places))
        return self._forms.pieces

    def events(self) -> list[Event]:
        """The answer in the pieces in which it came."""
        events = list(self._entry.events)
        events[0] = self._start
        events[-1] = Finish(usage=self.usage, optimizations=(self.line,))
        return events

    def response(self) -> LLMResponse:
        """The answer as `collect` makes it. Raises ProviderError as it does, where something of it is missing."""
        base = self._collected()
        elapsed = time.perf_counter() - self._began
        return LLMResponse(
            content=base.content,
            model=base.model,
            provider=base.provider,
            usage=base.usage,
            finish_reason=base.finish_reason,
            choices=base.choices,
            request_id=self._start.request_id,
            tool_calls=base.tool_calls,
            reasoning=base.reasoning,
            cached=True,
            processing_time=elapsed,
            time_to_first_token=elapsed if self.num_pieces[0] else None,
            optimizations=(self.line,),
        )

    def written(self, form: str, write: Callable[[LLMResponse], bytes]) -> bytes:
        """What `write` makes of the answer, kept under the name `form`: nothing that differs between requests."""
        found = self._forms.written.get(form)
        if found is None:
            found = self._forms.written[form] = write(self._collected())
            self._grew(len(found))
        return found

    def _collected(self) -> LLMResponse:
        """The answer apart from what is this request's own."""
        forms = self._forms
        if forms.response is None:
            answer = Collected()
            for event in self._entry.events[:-1]:
                answer.add(event)
            forms.response = response = answer.response(Finish(usage=self.usage))
            self._grew(_OVERHEAD + sum(len(choice.content) + len(choice.reasoning) for choice in response.choices))
        return forms.response

    def _grew(self, num_bytes: int) -> None:
        self._forms.num_bytes += num_bytes
        if self._grow is not None:
            self._grow(num_bytes)


@runtime_checkable
class AnswersAtOnce(Protocol):
    """What a chain can do besides whose outermost link may have the answer in memory."""

    def kept(self, request: LLMRequest) -> KeptAnswer | None:
        """What `stream` would give to the valid `request` from memory, counted as given; None where it would not."""
        ...
