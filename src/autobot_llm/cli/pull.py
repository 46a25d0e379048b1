"""`autobot-llm pull`: have Ollama fetch a model. Knows how to show how far it is; knows nothing of how it is done."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from autobot_llm.cli.progress import Progress
from autobot_llm.settings import Settings, load_settings

if TYPE_CHECKING:
    from autobot_llm.dialects.ollama.models import Progress as Step


@click.command(
    short_help="Have Ollama fetch a model from its library.",
    epilog="""\b
Examples:
  autobot-llm pull mistral:7b-instruct-q4_K_M
  AUTOBOT_OLLAMA_ENDPOINT=http://box:11434 autobot-llm pull qwen3:8b""",
)
@click.argument("model")
def pull(model: str) -> None:
    """Have Ollama fetch MODEL from its library, which may be several gigabytes; nothing else here ever does.

    Ctrl-C stops it; what has come is kept by Ollama, and the next pull goes on from there.
    """
    name = model.removeprefix("ollama/")
    with Progress(f"Fetching {name}") as progress:
        asyncio.run(_pull(load_settings(), name, progress))
    click.echo(f"{name} is there")


async def _pull(settings: Settings, model: str, progress: Progress) -> None:
    from autobot_llm.providers.ollama import OllamaProvider

    provider = OllamaProvider(settings)
    await provider.start()
    layers: dict[str, Step] = {}
    try:
        async with aclosing(provider.pull(model)) as steps:
            async for step in steps:
                if step.total:
                    layers[step.digest] = step
                    total = sum(layer.total for layer in layers.values())
                    progress.advance("layers", sum(layer.completed for layer in layers.values()), total)
    finally:
        await provider.close()
