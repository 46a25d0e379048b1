"""`autobot-llm routes`: which optimization could run where, and which does. Knows how to print it, not who knows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import click
import msgspec

from autobot_llm.cli.options import given
from autobot_llm.cli.progress import Progress
from autobot_llm.interface import LLMInterface
from autobot_llm.optimization_matrix import OptimizationState, ProviderRow
from autobot_llm.settings import Settings, load_settings

RUNS, COULD, CANNOT = "runs", "could", "-"
STYLES = {RUNS: "bold green", COULD: "yellow", CANNOT: "dim"}


@click.command(
    short_help="Show which optimization could run at which provider, and which runs.",
    epilog="""\b
Examples:
  autobot-llm routes
  autobot-llm routes --provider vllm
  autobot-llm routes --json

A running server tells the same of itself at /v1/optimizations.""",
)
@click.option("--provider", help="Which provider to start and ask, instead of AUTOBOT_LLM_PROVIDER.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def routes(provider: str | None, as_json: bool) -> None:
    """Show which optimization could run at which provider, and which runs.

    The default provider is started, to tell what runs in it; below the table it says why each one does or does not.
    """
    with Progress("Asking the provider what runs in it"):
        rows = asyncio.run(_rows(load_settings(overrides=given(provider=provider))))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    _print_table(rows)
    for row in rows:
        if row.state != "stopped":
            click.echo("\n".join(reason_lines(row)))


async def _rows(settings: Settings) -> list[ProviderRow]:
    async with LLMInterface(settings) as llm:
        return llm.get_optimizations()


def reason_lines(row: ProviderRow) -> list[str]:
    """Why each optimization runs at one provider or does not."""
    version = f" {row.engine_version}" if row.engine_version else ""
    lines = [f"{row.provider}{version}: {row.state}"]
    return lines + [f"  {one.name:24}{_word(one):7}{one.reason}" for one in row.optimizations]


def _word(state: OptimizationState) -> str:
    return RUNS if state.runs else COULD if state.could_apply else CANNOT


def _print_table(rows: Sequence[ProviderRow]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("optimization", *(row.provider for row in rows), box=box.SIMPLE_HEAD, pad_edge=False)
    for states in zip(*(row.optimizations for row in rows), strict=True):
        words = [_word(state) for state in states]
        table.add_row(states[0].name, *(Text(word, STYLES[word]) for word in words))
    Console().print(table)
