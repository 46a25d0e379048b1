"""Say our settings as knobs. Knows which setting is which knob; knows no engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from autobot_llm.settings import SETTINGS, Settings
from autobot_llm.settings.meaning import EVERY, NATIVE

GIB = 2**30
# What a workload asks of an engine's scheduler: the same figures as our own engine's profiles.
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "interactive": {"performance_mode": "interactivity", "max_num_seqs": 64, "max_num_batched_tokens": 4096},
    "batch": {"performance_mode": "throughput", "max_num_seqs": 256, "max_num_batched_tokens": 16384},
    "mixed": {"performance_mode": "balanced", "max_num_seqs": 128, "max_num_batched_tokens": 8192},
}


class Source(msgspec.Struct, frozen=True):
    """How one setting becomes a knob. `values` translates its values; one that is not in it says nothing."""

    field: str
    knob: str
    values: Mapping[Any, Any] | None = None
    scale: int | None = None
    only_changed: bool = False


SOURCES = (
    Source("max_model_len", "max_model_len"),
    Source("gpu_memory_utilization", "gpu_memory_utilization"),
    Source("max_num_seqs", "max_num_seqs"),
    Source("max_num_batched_tokens", "max_num_batched_tokens"),
    Source("scheduling_policy", "scheduling_policy"),
    Source("max_waiting_time_ms", "max_waiting_time_ms"),
    Source("attention_backend", "attention_backend", only_changed=True),
    Source("cuda_graphs", "enforce_eager", {"off": True}),
    Source("kv_cache_dtype", "kv_cache_dtype", only_changed=True),
    Source("kv_sliding_window", "sliding_window", only_changed=True),
    Source("kv_heavy_hitters", "kv_heavy_hitters", only_changed=True),
    Source("preemption", "preemption_mode", only_changed=True),
    Source("swap_memory", "swap_space", scale=GIB),
    Source("quantization_type", "quantization_type", only_changed=True),
    Source("vllm_multi_step", "num_scheduler_steps"),
    Source("vllm_prefix_caching", "enable_prefix_caching"),
    Source("vllm_async_output", "enable_async_output_proc"),
    Source("speculation_num_tokens", "num_speculative_tokens"),
    Source("speculation_min_acceptance_rate", "min_acceptance_rate"),
)
_SETTINGS = {setting.field: setting for setting in SETTINGS}

SPECULATION_LEFT_OFF = (
    "speculation stays off: without a draft model, auto could draft from the text alone, which is slower wherever text "
    "does not repeat, and vLLM has no switch for that; AUTOBOT_SPECULATION_METHOD=ngram insists"
)


class Wish(msgspec.Struct, frozen=True):
    """One knob that the settings have an opinion on, and the variable that says so."""

    knob: str
    value: Any
    variable: str


def wishes(settings: Settings, engine: str) -> list[Wish]:
    """What the settings want of an engine that is not ours; what they leave to the engine is left out.

    A setting that cannot act on the engine is in only if it was changed: then its fate is worth a line.
    """
    found = {wish.knob: wish for wish in (*_of_workload(settings, engine), *_of_speculation(settings))}
    for source in SOURCES:
        setting = _SETTINGS[source.field]
        value = getattr(settings, source.field)
        if value == setting.default and (source.only_changed or engine not in setting.about.on):
            continue
        if source.values is not None:
            value = source.values.get(value)
        if value is not None:
            found[source.knob] = Wish(source.knob, value / source.scale if source.scale else value, setting.variable)
    if not settings.speculation_enabled:
        found.pop("num_speculative_tokens", None)
    return list(found.values())


def own_wishes(settings: Settings) -> list[Wish]:
    """What the settings want of our own engine: every one that is about engines, acts on it and was changed."""
    about_engines = (one for one in SETTINGS if NATIVE <= one.about.on < EVERY and one.field != "cache_dir")
    changed = ((setting, getattr(settings, setting.field)) for setting in about_engines)
    return [Wish(setting.field, value, setting.variable) for setting, value in changed if value != setting.default]


def drafting_method(settings: Settings) -> str | None:
    """Who is to draft on an engine that cannot choose; None where nobody is.

    Drafting from the text itself has to be asked for: such an engine goes on with it where it loses.
    """
    if not settings.speculation_enabled or settings.speculation_method == "none":
        return None
    if settings.speculation_method != "auto":
        return "draft_model" if settings.speculation_method == "draft" else settings.speculation_method
    if settings.speculation_draft_model is not None:
        return "draft_model"
    use_ngram = _SETTINGS["speculation_use_ngram"].variable
    return "ngram" if settings.speculation_use_ngram and use_ngram in settings.sources else None


def _of_workload(settings: Settings, engine: str) -> Iterator[Wish]:
    setting = _SETTINGS["workload"]
    if engine in setting.about.on:
        for knob, value in WORKLOADS[settings.workload].items():
            yield Wish(knob, value, setting.variable)


def _of_speculation(settings: Settings) -> Iterator[Wish]:
    method = drafting_method(settings)
    if method is not None:
        yield Wish("speculative_method", method, _SETTINGS["speculation_method"].variable)
    if method not in (None, "ngram") and settings.speculation_draft_model is not None:
        variable = _SETTINGS["speculation_draft_model"].variable
        yield Wish("speculative_model", settings.speculation_draft_model, variable)
