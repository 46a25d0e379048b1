"""`autobot-llm quantize`: a model in fewer bits, and what that costs. Knows options and words; knows no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click
import msgspec

from autobot_llm.cli.progress import Progress
from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import load_settings

if TYPE_CHECKING:
    from autobot_llm.providers.native.quantizing import Outcome

TYPES = ("w8a8", "w8", "w4", "gptq", "awq", "fp8")


@click.command(
    short_help="Store a model's weights in 8 or 4 bits, and measure what that costs.",
    epilog="""\b
Examples:
  autobot-llm quantize DIR --type fp8
  autobot-llm quantize DIR --type gptq --calibration chat.txt --calibration prose.txt --evaluate heldout.txt
  autobot-llm quantize tiny --type w8a8 --calibration train.txt --samples 128 --length 512 --json

\b
Types:
  w8a8   INT8 weights and activations (SmoothQuant, GPTQ); reads the calibration text
  w8     INT8 weights; no calibration
  w4     INT4 weights in groups of 128, rounded; no calibration
  gptq   INT4 weights in groups of 128 (GPTQ); reads the calibration text
  awq    INT4 weights in groups of 128 with zero points (AWQ); reads the calibration text
  fp8    8-bit floats, weights and activations; better with a calibration text, which it can do without

The folder is in compressed-tensors' format, which vLLM, transformers and this engine read. All types are lossy.
Ctrl-C leaves nothing behind; after a crash the same command goes on where it stopped.""",
)
@click.argument("model")
@click.option("--type", "kind", type=click.Choice(TYPES), required=True, help="What to store the weights as.")
@click.option("--out", type=click.Path(path_type=Path), help="The new folder; default: MODEL with -TYPE, here.")
@click.option("--calibration", type=click.File(encoding="utf-8"), multiple=True,
              help="Text like that the model will see; may be given again for more.")  # fmt: skip
@click.option("--evaluate", type=click.File(encoding="utf-8"), multiple=True,
              help="Text to measure on that calibration does not read; may be given again.")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=512, show_default=True, help="Passages to calibrate with.")
@click.option("--length", type=click.IntRange(16), default=2048, show_default=True, help="Tokens of each, at most.")
@click.option(
    "--windows",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Passages to measure on; the whole text, if it has fewer.",
)
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="128", show_default=True,
              help="Inputs that share a scale, for 4 bits.")  # fmt: skip
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="SmoothQuant's strength.")
@click.option("--llm-compressor", type=click.Choice(["off", "installed", "install"]), default="off", show_default=True,
              help="Have llm-compressor do it: where it is installed, or install it first (1.5 GB).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def quantize(
    model: str,
    kind: str,
    out: Path | None,
    calibration: Sequence[IO[str]],
    evaluate: Sequence[IO[str]],
    samples: int,
    length: int,
    windows: int,
    group_size: str,
    alpha: float,
    llm_compressor: str,
    as_json: bool,
) -> None:
    """Quantize MODEL, a folder or "tiny" (the embedded model), and measure the result against it.

    Without --evaluate the last tenth of the calibration text is kept for measuring; without either nothing is measured.
    """
    texts = {name: _read(files) for name, files in (("calibration", calibration), ("evaluate", evaluate))}
    settings = load_settings()
    with Progress(f"Quantizing {model} to {kind}") as progress:
        from autobot_llm.providers.native.quantizing import Order, carry_out

        order = Order(
            model=model, kind=kind, out=out, calibration_text=texts["calibration"], evaluation_text=texts["evaluate"],
            samples=samples, length=length, windows=windows, group_size=int(group_size), alpha=alpha,
            compressor_mode=llm_compressor,
        )  # fmt: skip
        outcome = carry_out(order, settings.cache_dir, progress.advance)
    if as_json:
        click.echo(msgspec.json.encode(outcome.as_json(), enc_hook=str))
        return
    for name, text in lines(outcome):
        click.echo(f"{click.style(f'{name:<16}', bold=True)}{text}")


def _read(files: Sequence[IO[str]]) -> str | None:
    texts = []
    for file in files:
        try:
            texts.append(file.read())
        except UnicodeDecodeError as exc:
            raise ConfigurationError(f"{file.name} is not UTF-8: {exc}") from exc
    return "\n".join(texts) if files else None


def lines(outcome: Outcome) -> list[tuple[str, str]]:
    """Name and text of each line of the report."""
    made, quality = outcome.made, outcome.quality
    share = made.num_linear_bytes / made.num_linear_bytes_before
    told = [
        ("folder", str(made.folder)),
        ("scheme", f"{made.scheme.name}, by {made.by} in {made.seconds:.0f} s"),
        (
            "linear weights",
            f"{_mb(made.num_linear_bytes_before)} -> {_mb(made.num_linear_bytes)} ({100 * share:.0f} %)",
        ),
        ("all tensors", f"{_mb(made.num_bytes_before)} -> {_mb(made.num_bytes)}"),
    ]
    if made.num_resumed_layers:
        told.append(("resumed", f"{made.num_resumed_layers} layers were there from an earlier run"))
    if quality is not None:
        change = f"{100 * quality.perplexity_change:+.2f} %"
        if quality.perplexity_change_error is not None:
            change += f" \u00b1 {100 * quality.perplexity_change_error:.2f}"
        perplexities = f"{quality.perplexity_before:.3f} -> {quality.perplexity:.3f}"
        told += [
            ("measured on", outcome.measured_on),
            ("perplexity", f"{perplexities} ({change}), {quality.num_tokens:,} tokens"),
            ("KL", f"{quality.kl:.4f} nats a token"),
            ("top-1", f"{100 * quality.top1_agreement:.1f} % of the tokens"),
            ("continuations", f"{quality.exact_continuations} of {quality.num_continuations} are the same"),
            ("decoding", f"{quality.tokens_per_second_before:.0f} -> {quality.tokens_per_second:.0f} tokens/s, "
                         f"{quality.speedup:.2f} times as fast ({quality.step})"),
        ]  # fmt: skip
    return [*told, *(("verdict" if i == 0 else "", text) for i, text in enumerate(outcome.verdict))]


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
