"""`autobot-llm plan`: what of a model fits on a card. Knows options and tables; knows no sizes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from autobot_llm.errors import ConfigurationError
from autobot_llm.settings.values import BadValue, Size, parse_text

if TYPE_CHECKING:
    from autobot_llm.tuning.plan import Card, Plan, Recommendation

GIB = 2**30
PIPED_WIDTH = 200


@click.command(
    short_help="Show what of a model fits in a GPU's memory, before it is downloaded.",
    epilog="""\b
Examples:
  autobot-llm plan DIR --gpu 4090
  autobot-llm plan DIR/config.json --gpu-memory 8GiB
  autobot-llm plan DIR --gpu 4090 --kv-sliding-window 4096
  autobot-llm plan DIR --gpu H100 --json

config.json is all that is read. 4 and 8 bits are of the layers' matrices; the embedding and the head stay whole.""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--gpu", help="A card by its name: RTX4090, L4, A100-80, H100 ...")
@click.option("--gpu-memory", help="Its memory: 8GiB, 24GB ...")
@click.option("--workload", type=click.Choice(["interactive", "batch", "mixed"]), default="mixed", show_default=True,
              help="How many sequences share a step: steps need memory, too.")  # fmt: skip
@click.option("--kv-sliding-window", type=click.IntRange(min=0), default=0, metavar="TOKENS",
              help="Look back so many tokens at most (lossy): AUTOBOT_KV_SLIDING_WINDOW of our engine.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(
    model: Path, gpu: str | None, gpu_memory: str | None, workload: str, kv_sliding_window: int, as_json: bool
) -> None:
    """Show how many sequences of which length fit beside MODEL's weights, at each quantization.

    MODEL is a folder with a config.json, that file, or "tiny". Nothing is loaded and no GPU is needed.
    """
    if (gpu is None) == (gpu_memory is None):
        raise click.UsageError("give either --gpu NAME or --gpu-memory SIZE")
    from autobot_llm.tuning.plan import card_named, make_plan, recommend

    card = None if gpu is None else card_named(gpu)
    memory = int(card.memory_gib * GIB) if card is not None else _size(gpu_memory or "")
    if str(model) == "tiny" and not model.exists():
        model = Path(__file__).parents[1] / "assets" / "tiny"
    found = make_plan(model, memory, workload=workload, sliding_window=kv_sliding_window)
    recommended = recommend(found, card)
    if as_json:
        click.echo(msgspec.json.encode(_document(found, recommended, card)))
        return
    _print(found, recommended)


def _size(text: str) -> int:
    try:
        return int(parse_text(Size, text))
    except BadValue as exc:
        raise ConfigurationError(f"--gpu-memory {text!r}: expected a size such as 8GiB or 24GB") from exc


def _document(found: Plan, recommended: tuple[Recommendation, ...], card: Card | None) -> dict[str, Any]:
    return {
        **asdict(found),
        "card": None if card is None else card.name,
        "recommendations": [asdict(one) for one in recommended],
    }


def _print(found: Plan, recommended: tuple[Recommendation, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    click.echo(
        f"{found.model}: {found.num_parameters / 1e9:.2f}B parameters, context {found.max_context:,}; "
        f"{found.memory_bytes / GIB:.1f} GiB, of which 90 % may be used"
    )
    contexts = list(found.rows[0].sequences)
    names = ("weights", "KV", "GiB", "KiB/token", "steps", "cache")
    table = Table(*names, *(_short(context) for context in contexts), box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found.rows:
        sizes = (row.weight_bytes, row.activation_bytes + row.graph_bytes, row.cache_bytes)
        weights, steps, cache = (f"{size / GIB:.2f}" for size in sizes)
        counts = (str(row.sequences[context]) if row.sequences[context] else "-" for context in contexts)
        per_token = f"{row.kv_bytes_per_token / 1024:.0f}"
        table.add_row(row.weights, row.kv_cache, weights, per_token, steps, cache if row.fits else "-", *counts)
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)
    click.echo("Under each context: how many sequences of that length fit at once. Steps: activations and CUDA graphs.")
    click.echo("Weights of fewer bits and 8-bit KV caches are lossy.")
    if found.window:
        whose = "AUTOBOT_KV_SLIDING_WINDOW, lossy; our engine alone" if found.is_window_lossy else "the model's own"
        click.echo(f"Of a sequence those tokens stay that a window of {found.window:,} looks back to ({whose}).")
    for one in recommended:
        click.echo(f"{click.style(f'{one.engine:<8}', bold=True)}{one.text or '-'}\n        {one.reason}")


def _short(num_tokens: int) -> str:
    """8192 is 8k."""
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else str(num_tokens)
