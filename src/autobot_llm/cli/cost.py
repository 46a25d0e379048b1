"""`autobot-llm cost`: what was spent, by day and model. Knows how to print the account; knows no prices."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import click
import msgspec

from autobot_llm.cloud.ledger import FILE_NAME, Spending, read_spending
from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import Settings, load_settings

_UNLIMITED = 10_000  # columns


@click.command(
    short_help="Show what was spent, by day and model.",
    epilog="""\b
Examples:
  autobot-llm cost
  autobot-llm cost --days 31
  autobot-llm cost --json""",
)
@click.option("--days", type=click.IntRange(1), default=7, show_default=True, help="How many days back, with today.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def cost(days: int, as_json: bool) -> None:
    """Show what was spent in US dollars, by day (UTC), model and tenant, and what the provider's cache saved.

    Only answers of models whose price is known are counted; AUTOBOT_CLOUD_PRICES adds prices.
    """
    settings = load_settings()
    path = settings.cache_dir / FILE_NAME
    since = (datetime.now(UTC).date() - timedelta(days=days - 1)).isoformat()
    try:
        lines = read_spending(path, since)
    except sqlite3.Error as exc:
        raise ConfigurationError(f"the account {path} cannot be read: {exc}") from exc
    if as_json:
        document = {"since": since, "dollars_spent": _spent(lines), "lines": lines}
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
        return
    if lines:
        _print_table(lines)
    click.echo("\n".join(summary(lines, since, settings)))


def summary(lines: Sequence[Spending], since: str, settings: Settings) -> list[str]:
    """The sum, and where the budgets stand as far as the lines tell."""
    told = [f"{_spent(lines):.4f} dollars since {since}, {sum(line.dollars_saved for line in lines):.4f} saved"]
    if settings.cloud_budget_per_day is not None:
        today = datetime.now(UTC).date().isoformat()
        spent = _spent([line for line in lines if line.day == today])
        told.append(f"{spent:.4f} of {settings.cloud_budget_per_day:g} dollars of today's budget")
    return told


def _spent(lines: Sequence[Spending]) -> float:
    return sum(line.dollars_spent for line in lines)


def _print_table(lines: Sequence[Spending]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a pipe a row stays one line, for grep.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    table = Table("day", "model", "tenant", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("requests", "prompt", "cached", "answer", "spent $", "saved $"):
        table.add_column(heading, justify="right")
    for line in lines:
        figures = (line.num_requests, line.prompt_tokens, line.cached_tokens, line.completion_tokens)
        table.add_row(
            line.day, Text(f"{line.provider}/{line.model}"), Text(line.tenant), *(f"{figure:,}" for figure in figures),
            f"{line.dollars_spent:.4f}", f"{line.dollars_saved:.4f}",
        )  # fmt: skip
    Console(width=width).print(table)
