"""The knob translator: settings, and an older design's names, told to any release of an engine.

    translation = translate_settings("vllm", "0.33", settings)
    translation.arguments         # for `vllm serve MODEL ...`
    translation.knobs             # what became of each setting, and why

Knows engines by their tables of facts; knows nothing of running ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import Settings
from autobot_llm.tuning.knobs.design import (
    CONTINUOUS_BATCHING_CONFIG,
    CUDA_GRAPH_CONFIG,
    DESIGN_CONFIGS,
    KV_CACHE_CONFIG,
    OPTIMIZED_VLLM_CONFIG,
)
from autobot_llm.tuning.knobs.facts import EngineFacts
from autobot_llm.tuning.knobs.from_settings import SPECULATION_LEFT_OFF, drafting_method, own_wishes, wishes
from autobot_llm.tuning.knobs.native import NATIVE
from autobot_llm.tuning.knobs.ollama import OLLAMA
from autobot_llm.tuning.knobs.translate import Fate, KnobAnswer, Translation, translate
from autobot_llm.tuning.knobs.versions import in_words, reading_of
from autobot_llm.tuning.knobs.vllm import VLLM

__all__ = [
    "CONTINUOUS_BATCHING_CONFIG",
    "CUDA_GRAPH_CONFIG",
    "DESIGN_CONFIGS",
    "ENGINES",
    "KV_CACHE_CONFIG",
    "OPTIMIZED_VLLM_CONFIG",
    "EngineFacts",
    "Fate",
    "KnobAnswer",
    "Translation",
    "accepts",
    "facts_of",
    "installed_version",
    "releases_that_accept",
    "translate_knobs",
    "translate_settings",
    "versions_in_words",
]

ENGINES: Mapping[str, EngineFacts] = {facts.engine: facts for facts in (VLLM, OLLAMA, NATIVE)}


def facts_of(engine: str) -> EngineFacts:
    """The facts about an engine; raises ConfigurationError, with the known ones, for another."""
    if engine not in ENGINES:
        raise ConfigurationError(f"engine {engine!r}: expected {', '.join(ENGINES)}")
    return ENGINES[engine]


def installed_version(engine: str) -> str | None:
    """The version of the engine that is installed in this environment; None where it is not, or is no package."""
    package = facts_of(engine).package
    if package is None:
        return None
    import importlib.metadata  # a tenth of the package's whole import time

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def translate_knobs(engine: str, version: str, knobs: Mapping[str, Any]) -> Translation:
    """`knobs`, by the names of our table or of the older design, told to that version. Raises ConfigurationError."""
    return translate(facts_of(engine), version, knobs)


def translate_settings(engine: str, version: str, settings: Settings) -> Translation:
    """The settings told to that version of the engine. Raises ConfigurationError."""
    facts = facts_of(engine)
    asked = own_wishes(settings) if facts is NATIVE else wishes(settings, engine)
    variables = {wish.knob: wish.variable for wish in asked}
    translation = translate(facts, version, {wish.knob: wish.value for wish in asked})
    answers = tuple(replace(answer, variable=variables[answer.name]) for answer in translation.knobs)
    is_left_off = facts is VLLM and settings.speculation_enabled and drafting_method(settings) is None
    notes = (SPECULATION_LEFT_OFF,) if is_left_off else ()
    return replace(translation, knobs=answers, notes=(*translation.notes, *notes))


def accepts(engine: str, version: str, argument: str, value: object) -> bool:
    """Whether that version takes the value: `accepts("vllm", "0.32", "speculative_config.method", "medusa")`.

    For a version that is not one, or older than what was read, the newest release answers.
    """
    facts = facts_of(engine)
    try:
        release = reading_of(version, facts.read, engine).release
    except ConfigurationError:
        release = facts.read[-1]
    return argument in facts.arguments and facts.arguments[argument].accepts(value, release)


def releases_that_accept(engine: str, argument: str, value: object) -> tuple[str, ...]:
    """The read releases of the engine that take the value, oldest first."""
    facts = facts_of(engine)
    return tuple(release for release in facts.read if facts.arguments[argument].accepts(value, release))


def versions_in_words(engine: str) -> str:
    """What `version` may be: "0.8 to 0.33"."""
    return in_words(facts_of(engine).read)
