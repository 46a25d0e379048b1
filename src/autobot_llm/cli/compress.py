"""`autobot-llm compress`: a prompt before and after. Knows files and figures; knows nothing of how texts shrink."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, TextIO

import click
import msgspec

from autobot_llm.cli.options import given
from autobot_llm.cli.progress import Progress
from autobot_llm.settings import Settings, load_settings

if TYPE_CHECKING:
    from autobot_llm.universal.compression import CompressionResult


@click.command(
    short_help="Shorten a prompt, and show what that saves.",
    epilog="""\b
Examples:
  autobot-llm compress system_prompt.txt
  autobot-llm compress system_prompt.txt --ratio 0.9 --json
  autobot-llm compress notes.txt --strategy context --question "When is the refund paid?" --ratio 0.4
  cat notes.txt | autobot-llm compress - --strategy perplexity > shorter.txt

In a pipe only the shorter text goes to the standard output; the figures go to stderr.""",
)
@click.argument("file", type=click.File(encoding="utf-8"))
@click.option("--ratio", type=float, help="Tokens to keep, of 1; instead of AUTOBOT_PROMPT_COMPRESSION_RATIO.")
@click.option(
    "--strategy",
    type=click.Choice(["rules", "context", "perplexity"]),
    default="rules",
    show_default=True,
    help="Rules for instructions; choice of passages, or a small model's judgement, for contexts.",
)
@click.option("--question", default="", help="What the context is to answer; `context` needs it.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def compress(file: TextIO, ratio: float | None, strategy: str, question: str, as_json: bool) -> None:
    """Shorten the prompt in FILE ("-": the standard input) and show it before and after.

    Tokens are counted by the embedded model's tokenizer under `perplexity`; otherwise one is taken for four characters.
    """
    if strategy == "context" and not question:
        raise click.UsageError("--strategy context needs a --question")
    try:
        text = file.read()
    except UnicodeDecodeError as exc:
        raise click.UsageError(f"{file.name} is not UTF-8: {exc}") from exc
    settings = load_settings(overrides=given(prompt_compression_ratio=ratio))
    result = asyncio.run(_compressed(text, strategy, question, settings))
    if as_json:
        document = {"strategy": strategy, "target_ratio": settings.prompt_compression_ratio, "original_text": text}
        click.echo(msgspec.json.encode({**document, **msgspec.to_builtins(result)}))
        return
    if sys.stdout.isatty():
        click.echo(f"{click.style('before', bold=True)}\n{text.rstrip()}\n\n{click.style('after', bold=True)}")
    click.echo(result.compressed_text)
    click.echo(summary(result), err=True)


def summary(result: CompressionResult) -> str:
    """`247 -> 198 tokens, 80 % (estimated: a token for four characters)`."""
    how = " (estimated: a token for four characters)" if result.is_estimate else ""
    return f"{result.original_tokens} -> {result.compressed_tokens} tokens, {100 * result.compression_ratio:.0f} %{how}"


async def _compressed(text: str, strategy: str, question: str, settings: Settings) -> CompressionResult:
    from autobot_llm.universal.compression import PromptCompressor
    from autobot_llm.universal.prompt_compression import PromptCompression

    ratio = settings.prompt_compression_ratio
    if strategy == "rules":
        return PromptCompressor(ratio=ratio).compress_system_prompt(text)
    if strategy == "context":
        return PromptCompressor(ratio=ratio).compress_context(question, text)
    link = PromptCompression(settings)
    try:
        with Progress("Reading the text with the embedded model"):
            judge = await link.judge()
            compressor = PromptCompressor(ratio=ratio, count_tokens=await judge.text_counter())
            return await compressor.compress_by_perplexity(text, judge, question=question)
    finally:
        await link.close()
