"""Which quantization of a model fits the memory, and which server settings help. Knows tags and sizes, no server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from autobot_llm.dialects.ollama.models import Shown, Tag
from autobot_llm.settings import Settings
from autobot_llm.tuning.gguf import BITS_PER_WEIGHT

FULL_PRECISION = ("F16", "BF16", "F32")
ROOM = 1.2  # a model's file times this is what it takes with its cache and buffers
_SUFFIX = re.compile(r"-(?:fp16|bf16|f16|f32|i?q\d\w*)$", re.IGNORECASE)

# Slots that Ollama fills at the same time; each one costs a context's keys and values.
_SLOTS = {"interactive": 2, "mixed": 4, "batch": 8}
_CACHE_TYPES = {"int8": "q8_0", "fp8": "q8_0"}


def full_name(model: str) -> str:
    """The name with its tag: "mistral" is "mistral:latest"."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def find_tag(tags: Iterable[Tag], model: str) -> Tag | None:
    wanted = full_name(model).lower()
    return next((tag for tag in tags if full_name(tag.name).lower() == wanted), None)


def choose_variant(model: str, tags: Iterable[Tag], memory: int | None) -> Tag | None:
    """The most faithful quantized variant of `model` that is there and fits `memory` bytes (None: unknown, all fit).

    None where the model is quantized already, as most default tags of Ollama's library are, or has no such variant.
    """
    tags = list(tags)
    own = find_tag(tags, model)
    if own is not None and own.details.quantization_level.upper() not in FULL_PRECISION:
        return None
    base = _SUFFIX.sub("", model)
    for quantization in BITS_PER_WEIGHT:
        tag = find_tag(tags, f"{base}-{quantization}")
        if tag is not None and fits(tag.size, memory):
            return tag
    return None


def fits(num_bytes: float, memory: int | None) -> bool:
    return memory is None or num_bytes * ROOM <= memory


def advice(model: str, tag: Tag | None, shown: Shown | None, memory: int | None) -> str:
    """One line about the model's quantization on this machine; empty where nothing can be said."""
    if tag is None:
        return f"{model} is not there: `ollama pull {model}`"
    level = tag.details.quantization_level or "unknown quantization"
    has = f"{level}, {_gigabytes(tag.size)}"
    if memory is None:
        return has
    if not fits(tag.size, memory):
        return f"{has}: more than fits {_gigabytes(memory)} of memory; a q4_K_M variant needs the least"
    num_parameters = shown.num_parameters if shown is not None else None
    q8_0 = (num_parameters or 0) * BITS_PER_WEIGHT["q8_0"] / 8
    if num_parameters and level.upper().startswith("Q4") and fits(q8_0, memory):
        return f"{has}; q8_0 (about {_gigabytes(q8_0)}) would fit {_gigabytes(memory)} and is closer to the original"
    return f"{has}: fits {_gigabytes(memory)}"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def machine_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def server_settings(settings: Settings) -> str:
    """The environment that suits an Ollama server to these settings; it is read when `ollama serve` starts.

    A quantized cache is lossy and stays out unless AUTOBOT_KV_CACHE_DTYPE asks for one.
    """
    variables = {"OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_NUM_PARALLEL": str(_SLOTS[settings.workload])}
    if (cache_type := _CACHE_TYPES.get(settings.kv_cache_dtype)) is not None:
        variables["OLLAMA_KV_CACHE_TYPE"] = cache_type
    return " ".join(f"{name}={value}" for name, value in variables.items())
