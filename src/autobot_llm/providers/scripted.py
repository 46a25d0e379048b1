"""A provider that plays a script, for tests and documentation. Knows the order of events; knows nothing of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

from autobot_llm.errors import ModelNotFoundError, ProviderUnavailable
from autobot_llm.providers.base import ModelInfo, ProviderStatus
from autobot_llm.types import ChoiceEnd, Event, Finish, LLMRequest, Start, TextDelta, Usage

Line = str | Event | Exception
Script = Sequence[Line]


class ScriptedProvider:
    """Answers every request with `script`, or with what `script(request)` returns.

    A string is played as a TextDelta and an exception is raised at its place. Unless the script says otherwise, a
    Start comes before its first line, and after its last a ChoiceEnd for each choice that was begun and a Finish,
    whose usage counts words of the prompt and pieces of the answer; `complete=False` leaves the ending out.
    A request without a model gets the first of `models`, and one for a model that is not among them is refused.
    `delay` is in seconds, before each line. `requests` holds what was asked, `num_open_streams` and
    `num_closed_streams` count the streams that are being read and those that have ended in any way.
    """

    def __init__(
        self,
        script: Script | Callable[[LLMRequest], Script] = (),
        *,
        name: str = "scripted",
        models: Sequence[str] = ("scripted",),
        delay: float = 0.0,
        complete: bool = True,
    ) -> None:
        self.name = name
        self.requests: list[LLMRequest] = []
        self.num_open_streams = 0
        self.num_closed_streams = 0
        self._script = script
        self._models = tuple(models)
        self._delay = delay
        self._complete = complete
        self._is_started = False

    async def start(self) -> None:
        self._is_started = True

    async def close(self) -> None:
        self._is_started = False

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo(id=model, provider=self.name) for model in self._models]

    def status(self) -> ProviderStatus:
        return ProviderStatus(name=self.name, state="ready" if self._is_started else "stopped")

    def metrics(self) -> dict[str, float]:
        return {"num_running": float(self.num_open_streams)}

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        if not self._is_started:
            raise ProviderUnavailable(f"provider {self.name!r} is not started")
        if request.model is not None and request.model not in self._models:
            served = ", ".join(self._models)
            raise ModelNotFoundError(f"model {request.model!r} is not served here; served are {served}", param="model")
        self.requests.append(request)
        self.num_open_streams += 1
        try:
            for line in self._lines(request):
                await asyncio.sleep(self._delay)
                if isinstance(line, Exception):
                    raise line
                yield line
        finally:
            self.num_open_streams -= 1
            self.num_closed_streams += 1

    def _lines(self, request: LLMRequest) -> Iterator[Event | Exception]:
        script = self._script(request) if callable(self._script) else self._script
        lines = [TextDelta(line) if isinstance(line, str) else line for line in script]
        if not any(isinstance(line, Start) for line in lines):
            model = request.model or self._models[0]
            yield Start(request_id=request.request_id or "scripted", model=model, provider=self.name)
        yield from lines
        if self._complete and not any(isinstance(line, Finish) for line in lines):
            yield from _ending(request, lines)


def _ending(request: LLMRequest, lines: Iterable[Event | Exception]) -> Iterator[Event]:
    begun = {line.index for line in lines if isinstance(line, TextDelta)} or {0}
    ended = {line.index for line in lines if isinstance(line, ChoiceEnd)}
    yield from (ChoiceEnd(finish_reason="stop", index=index) for index in sorted(begun - ended))
    num_pieces = sum(isinstance(line, TextDelta) for line in lines)
    yield Finish(usage=Usage(prompt_tokens=_num_words(request), completion_tokens=num_pieces))


def _num_words(request: LLMRequest) -> int:
    if request.messages is None:
        return len(request.prompt.split()) if isinstance(request.prompt, str) else len(request.prompt or ())
    return sum(len(turn.content.split()) for turn in request.messages if isinstance(turn.content, str))
