"""A conversation in the terminal. Knows turns and /commands; knows nothing of how an answer is made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import click
import msgspec

from autobot_llm.cli.answer import Answer, print_answer
from autobot_llm.errors import LLMError
from autobot_llm.interface import LLMInterface
from autobot_llm.types import ChatMessage, LLMRequest

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message; without TEXT, show it
/exit           end; Ctrl-D does the same
Ctrl-C stops an answer."""


class Session:
    """The conversation so far and its options.

    `read_line` is given the prompt and returns a line; it raises EOFError at the end and KeyboardInterrupt for Ctrl-C.
    Lines are read between the answers, so the event loop of `runner` turns only while there is an answer to print.
    """

    def __init__(
        self,
        llm: LLMInterface,
        options: LLMRequest,
        runner: asyncio.Runner,
        *,
        system: str | None = None,
        stats: bool = False,
        read_line: Callable[[str], str] | None = None,
    ) -> None:
        self._llm = llm
        self._options = options
        self._runner = runner
        self._system = system
        self._stats = stats
        self._read_line = read_line or _terminal_line
        self._turns: list[ChatMessage] = []

    def run(self) -> None:
        click.echo("/help says what you can do; Ctrl-D ends.", err=True)
        while True:
            try:
                line = self._read_line("> ").strip()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /exit ends)", err=True)
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        if name == "/reset":
            self._turns.clear()
            click.echo("The conversation is forgotten.", err=True)
        elif name == "/system":
            self._system = text.strip() or self._system
            click.echo(f"system: {self._system or '(none)'}", err=True)
        elif name == "/help":
            click.echo(HELP, err=True)
        else:
            click.echo(f"There is no {name}.\n{HELP}", err=True)

    def _answer(self, line: str) -> None:
        """Ask, print, remember. A question that failed is forgotten; a stopped answer stays as far as it got."""
        question = ChatMessage("user", line)
        system = [ChatMessage("system", self._system)] if self._system else []
        request = msgspec.structs.replace(self._options, messages=[*system, *self._turns, question])
        answer = Answer()
        try:
            self._runner.run(print_answer(self._llm, request, stats=self._stats, answer=answer))
        except LLMError as error:
            click.echo(f"error: {error.message}", err=True)
            return
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)
        if answer.pieces:
            self._turns += [question, ChatMessage("assistant", answer.text)]


def _terminal_line(prompt: str) -> str:
    """Read a line with editing and this session's history where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it changes what input() does)
    return input(prompt)
