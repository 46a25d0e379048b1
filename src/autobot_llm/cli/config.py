"""`autobot-llm config`: every setting, its value, source and effect. Knows how to print them, not what they do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import click
import msgspec

from autobot_llm.settings import SettingRow, describe_settings, load_settings

UNLIMITED = 10_000  # columns, where no terminal limits them


@click.command(
    short_help="Print every setting, its value and its source.",
    epilog="""\b
Examples:
  autobot-llm config
  autobot-llm config --json | python3 -m json.tool
  AUTOBOT_PORT=9000 autobot-llm config | grep PORT""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with defaults and explanations.")
def config(as_json: bool) -> None:
    """Print every setting with its value, where it came from, and whether it has an effect.

    Secrets are masked. Names that begin with AUTOBOT_ and that nothing here reads are reported on stderr. A value that
    cannot be used is an error, with exit code 2.
    """
    settings = load_settings()
    rows = describe_settings(settings)
    if as_json:
        document = msgspec.json.encode({"settings": rows, "warnings": settings.warnings})
        click.echo(msgspec.json.format(document, indent=2))
        return
    _print_table(rows)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_table(rows: Sequence[SettingRow]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a pipe a row stays one line, for grep.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
    table = Table("setting", "value", "from", "effect", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"
    for row in rows:
        chosen = "bold" if row.source != "default" else ""
        table.add_row(
            Text(row.variable, chosen),
            Text(str(row.value), chosen),
            Text(row.source),
            Text(row.effect, "yellow" if row.source != "default" else "dim"),
        )
    Console(width=width).print(table)
