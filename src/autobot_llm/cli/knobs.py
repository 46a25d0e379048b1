"""`autobot-llm knobs`: what each setting becomes in a release of an engine. Knows how to print it, not the facts."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import SETTINGS, Settings, load_settings
from autobot_llm.settings.values import show
from autobot_llm.tuning.knobs import (
    DESIGN_CONFIGS,
    ENGINES,
    Fate,
    KnobAnswer,
    Translation,
    facts_of,
    installed_version,
    translate_knobs,
    translate_settings,
    versions_in_words,
)

UNLIMITED = 10_000  # columns, where no terminal limits them
STYLES = {Fate.PASSED: "green", Fate.RENAMED: "cyan", Fate.REMOVED: "yellow", Fate.NEVER_EXISTED: "yellow"}


@click.command(
    short_help="Show what each setting becomes in a release of an engine.",
    epilog="""\b
Examples:
  autobot-llm knobs --engine vllm --version 0.33
  autobot-llm knobs --engine vllm --version 0.10.2 --config OPTIMIZED_VLLM_CONFIG
  autobot-llm knobs --engine vllm --config my_knobs.toml --json
  AUTOBOT_KV_CACHE_DTYPE=int8 autobot-llm knobs --engine ollama

Without --config it is the settings that are told. A file is JSON or TOML; a name is one of
OPTIMIZED_VLLM_CONFIG, KV_CACHE_CONFIG, CONTINUOUS_BATCHING_CONFIG, CUDA_GRAPH_CONFIG.""",
)
@click.option("--engine", default="vllm", show_default=True, help=f"One of {', '.join(ENGINES)}.")
@click.option("--version", help="Its version; without it, the one installed here, else the newest that was read.")
@click.option(
    "--config", "configs", multiple=True, metavar="FILE|NAME", help="Knobs to tell instead of the settings; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def knobs(engine: str, version: str | None, configs: Sequence[str], as_json: bool) -> None:
    """Show what each setting becomes in a release of an engine: passed, renamed, removed, or never known there.

    Below the table stand the arguments that result: vLLM's command line, Ollama's options and environment, or ours.
    """
    facts = facts_of(engine)
    version = version or installed_version(engine) or facts.read[-1]
    settings = load_settings()
    if configs:
        asked = {name: value for config in configs for name, value in read_knobs(config).items()}
        translation = translate_knobs(engine, version, asked)
    else:
        translation = translate_settings(engine, version, settings)
    if as_json:
        document = msgspec.to_builtins(translation) | {"read_versions": facts.read}
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
        return
    click.echo(_heading(translation))
    if translation.knobs:
        _print_table(translation.knobs)
    click.echo("\n".join(result_lines(translation, settings)))


def read_knobs(config: str) -> Mapping[str, Any]:
    """The knobs of one of the design's dictionaries, or of a JSON or TOML file. Raises ConfigurationError."""
    if config in DESIGN_CONFIGS:
        return DESIGN_CONFIGS[config]
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError as exc:
        raise ConfigurationError(f"--config {config}: expected a file, or {', '.join(DESIGN_CONFIGS)}") from exc
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"--config {config} cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise ConfigurationError(f"--config {config}: expected an object of knobs and their values")
    return found


def _heading(translation: Translation) -> str:
    engine = translation.engine
    return (
        f"{engine} {translation.version}, by the facts of {translation.facts_from} (known: {versions_in_words(engine)})"
    )


def result_lines(translation: Translation, settings: Settings) -> Iterator[str]:
    """What the engine is told, in the form in which it is told."""
    if translation.engine == "vllm":
        model = "MODEL" if settings.default_model == "tiny" else settings.default_model
        yield f"command line   {translation.command_line('vllm', 'serve', model)}"
    else:
        yield from (f"environment    {name}={value}" for name, value in translation.environment.items())
    if translation.options:
        yield f"options        {json.dumps(translation.options)}"
    for setting in SETTINGS:
        if setting.field in translation.settings:
            value = show(setting.kind, translation.settings[setting.field])
            yield f"setting        {setting.variable}={value}"
    if not translation.knobs:
        yield f"nothing        no setting that concerns {translation.engine} was changed"
    yield from (f"note           {note}" for note in translation.notes)


def _print_table(answers: Sequence[KnobAnswer]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a pipe a row stays one line, for grep.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
    table = Table("knob", "value", "fate", "told as, or instead", "note", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"
    for answer in answers:
        fate = f"removed in {answer.removed_in}" if answer.removed_in else str(answer.fate)
        table.add_row(
            Text(answer.variable or answer.name),
            Text(answer.value if isinstance(answer.value, str) else json.dumps(answer.value)),
            Text(fate, STYLES[answer.fate]),
            Text(answer.to or answer.instead),
            Text(answer.note, "dim"),
        )
    Console(width=width).print(table)
