"""Print one answer. Knows a stream's events and the terminal; knows nothing of conversations."""

from __future__ import annotations

import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field

import click
import msgspec

from autobot_llm.interface import LLMInterface
from autobot_llm.types import ChoiceEnd, Finish, LLMRequest, TextDelta

# A model's text must not move the cursor, retitle the window or answer terminal queries.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
CONTROL_CHARACTERS = {code: None for code in _CONTROLS if chr(code) not in "\n\t"}


def for_terminal(text: str) -> str:
    """`text` without what a terminal would obey. A file or a pipe gets the answer as it is."""
    return text.translate(CONTROL_CHARACTERS)


@dataclass(slots=True)
class Answer:
    """What was printed so far. It is filled while the stream runs, so that an interrupted answer is not lost."""

    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def print_answer(
    llm: LLMInterface, request: LLMRequest, *, stats: bool = False, answer: Answer | None = None
) -> None:
    """Stream the answer's text to stdout as it comes, then its figures to stderr if `stats`."""
    answer = Answer() if answer is None else answer
    on_terminal = sys.stdout.isatty()
    start = time.perf_counter()
    first = last = None
    finish_reason = ""
    finish = None
    try:
        async with aclosing(llm.stream(request)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    last = time.perf_counter()
                    first = first or last
                    answer.pieces.append(event.text)
                    shown = for_terminal(event.text) if on_terminal else event.text
                    click.echo(shown, nl=False)
                elif isinstance(event, ChoiceEnd):
                    finish_reason = event.finish_reason
                elif isinstance(event, Finish):
                    finish = event
    finally:
        if answer.pieces and not answer.pieces[-1].endswith("\n"):
            click.echo()
    if stats and finish is not None:
        click.echo(_figures(finish, finish_reason, start, first, last), err=True)


def _figures(finish: Finish, finish_reason: str, start: float, first: float | None, last: float | None) -> str:
    usage = finish.usage
    parts = [
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)",
        f"{usage.completion_tokens} answer tokens",
        f"ended by {finish_reason}",
    ]
    if first is not None and last is not None:
        parts.append(f"first text after {(first - start) * 1000:.0f} ms")
        if last > first and usage.completion_tokens > 1:
            parts.append(f"{(usage.completion_tokens - 1) / (last - first):.0f} tokens/s")
    return ", ".join(parts)


async def print_json(llm: LLMInterface, request: LLMRequest) -> None:
    """Print the complete response as one line of JSON."""
    response = await llm.chat_completion(request)
    click.echo(msgspec.json.encode(response))
