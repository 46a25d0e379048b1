"""Which quantization is chosen and advised, and which server settings are recommended."""

from __future__ import annotations

import pytest

from autobot_llm.dialects.ollama.models import Details, Shown, Tag
from autobot_llm.providers.ollama.variants import (
    advice,
    choose_variant,
    find_tag,
    full_name,
    machine_memory,
    server_settings,
)
from autobot_llm.settings import Settings

GB = 10**9
BILLIONS = Shown(model_info={"general.parameter_count": 7_248_023_552})


def tag(name: str, level: str, size: float) -> Tag:
    return Tag(name=name, size=int(size * GB), details=Details(quantization_level=level))


LLAMA = [
    tag("llama3:8b-fp16", "F16", 16),
    tag("llama3:8b-q4_K_M", "Q4_K_M", 4.9),
    tag("llama3:8b-q8_0", "Q8_0", 8.5),
    tag("mistral:latest", "Q4_K_M", 4.4),
]


def test_a_name_without_a_tag_is_the_latest() -> None:
    assert full_name("mistral") == "mistral:latest"
    assert full_name("me/mistral") == "me/mistral:latest"
    assert full_name("box:5000/me/mistral") == "box:5000/me/mistral:latest"
    assert full_name("mistral:7b") == "mistral:7b"
    assert find_tag(LLAMA, "Mistral") is LLAMA[3]
    assert find_tag(LLAMA, "llama3") is None


@pytest.mark.parametrize(
    ("model", "memory", "chosen"),
    [
        ("llama3:8b-fp16", 64 * GB, "llama3:8b-q8_0"),
        ("llama3:8b-fp16", None, "llama3:8b-q8_0"),
        ("llama3:8b-fp16", 8 * GB, "llama3:8b-q4_K_M"),
        ("llama3:8b-fp16", 2 * GB, None),
        ("llama3:8b", 64 * GB, "llama3:8b-q8_0"),  # not there itself, but its variants are
        ("llama3:8b-q4_K_M", 64 * GB, None),
        ("mistral", 64 * GB, None),
        ("unknown", 64 * GB, None),
    ],
)
def test_the_most_faithful_variant_that_fits_is_chosen(model: str, memory: int | None, chosen: str | None) -> None:
    variant = choose_variant(model, LLAMA, memory)
    assert (variant.name if variant is not None else None) == chosen


@pytest.mark.parametrize(
    ("found", "shown", "memory", "line"),
    [
        (None, None, 16 * GB, "m is not there: `ollama pull m`"),
        (tag("m", "Q4_K_M", 4.4), BILLIONS, None, "Q4_K_M, 4.4 GB"),
        (tag("m", "Q4_K_M", 4.4), BILLIONS, 8 * GB, "Q4_K_M, 4.4 GB: fits 8.0 GB"),
        (tag("m", "Q4_K_M", 4.4), None, 64 * GB, "Q4_K_M, 4.4 GB: fits 64.0 GB"),
        (tag("m", "Q8_0", 7.7), BILLIONS, 64 * GB, "Q8_0, 7.7 GB: fits 64.0 GB"),
        (tag("m", "Q4_K_M", 4.4), BILLIONS, 16 * GB,
         "Q4_K_M, 4.4 GB; q8_0 (about 7.7 GB) would fit 16.0 GB and is closer to the original"),
        (tag("m", "F16", 14.5), BILLIONS, 16 * GB,
         "F16, 14.5 GB: more than fits 16.0 GB of memory; a q4_K_M variant needs the least"),
    ],
)  # fmt: skip
def test_the_advice_says_what_fits(found: Tag | None, shown: Shown | None, memory: int | None, line: str) -> None:
    assert advice("m", found, shown, memory) == line


def test_this_machines_memory_is_known() -> None:
    memory = machine_memory()
    assert memory is not None
    assert memory > GB // 4


def test_a_lossy_cache_is_recommended_only_where_one_is_asked_for() -> None:
    assert "KV_CACHE" not in server_settings(Settings())
    assert "OLLAMA_KV_CACHE_TYPE=q8_0" in server_settings(Settings(kv_cache_dtype="fp8"))
    assert "OLLAMA_NUM_PARALLEL=8" in server_settings(Settings(workload="batch"))
