"""The part of `autobot-llm serve` that starts a vLLM of our own. Knows what to show; knows nothing of processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from autobot_llm.cli.progress import Progress
from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import Settings

if TYPE_CHECKING:
    from autobot_llm.providers.vllm.launch import LaunchedVllm

MAX_LINE = 100  # characters of vLLM's latest line beside the spinner


@contextlib.asynccontextmanager
async def launched(settings: Settings, further: Sequence[str]) -> AsyncIterator[Settings]:
    """The settings, with the address of a vLLM that runs while the block does; `further` are arguments for it.

    Raises ConfigurationError where it cannot be launched at all, and ProviderUnavailable where it does not get ready.
    """
    if settings.provider != "vllm":
        raise ConfigurationError(f"--launch starts vLLM, and the provider is {settings.provider}: add --provider vllm")
    from autobot_llm.providers.vllm.launch import launched_vllm

    what = f"Starting vllm for {settings.default_model}"
    async with contextlib.AsyncExitStack() as stack:
        with Progress(what) as progress:
            heard = functools.partial(_say, progress, what)
            vllm = await stack.enter_async_context(launched_vllm(settings, further, on_line=heard))
        click.echo("\n".join(_lines(vllm)))
        yield replace(settings, vllm_endpoints=(vllm.address,))


def _say(progress: Progress, what: str, line: str) -> None:
    progress.say(f"{what}: {line.strip()[:MAX_LINE]}")


def _lines(vllm: LaunchedVllm) -> Iterator[str]:
    """Where it runs, what it was told, and which settings could not be told."""
    translation = vllm.translation
    yield f"vllm        {translation.version} at {vllm.address}, process {vllm.server.pid}, log {vllm.server.log.path}"
    yield f"  told          {translation.command_line() or 'nothing'}"
    for answer in translation.knobs:
        if answer.to is None and answer.removed_in is not None:
            yield f"  not told      {answer.variable}: removed in {answer.removed_in}; {answer.instead}".rstrip("; ")
    yield from (f"  note          {note}" for note in translation.notes)
