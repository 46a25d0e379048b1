"""`autobot-llm models`: what can be asked now. Knows how to print a list; knows nothing of where models come from."""

from __future__ import annotations

import asyncio

import click
import msgspec

from autobot_llm.cli.options import given
from autobot_llm.cli.progress import Progress
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.base import ModelInfo
from autobot_llm.settings import Settings, load_settings


@click.command(
    short_help="List the models that can be asked now.",
    epilog="""\b
Examples:
  autobot-llm models
  autobot-llm models --json
  autobot-llm models --provider native""",
)
@click.option("--provider", help="Whose models, instead of AUTOBOT_LLM_PROVIDER.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def models(provider: str | None, as_json: bool) -> None:
    """List the models that can be asked now, with their context length in tokens."""
    with Progress("Asking the provider for its models"):
        found = asyncio.run(_available(load_settings(overrides=given(provider=provider))))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    for model in found:
        context = f"{model.context_length} tokens" if model.context_length else "context length not told"
        click.echo(f"{model.provider}/{model.id}  {context}")


async def _available(settings: Settings) -> list[ModelInfo]:
    async with LLMInterface(settings) as llm:
        return await llm.get_available_models()
