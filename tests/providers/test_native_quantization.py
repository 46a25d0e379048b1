"""AUTOBOT_QUANTIZATION_TYPE on our own engine: quantized at load or once for all, and the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_folders import small_model

from autobot_llm import LLMInterface
from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import load_settings


def interface(cache: Path, **overrides: object) -> LLMInterface:
    defaults = {"cache_dir": cache, "compiled_step": "off", "device": "cpu", "cache_enabled": False}
    return LLMInterface(load_settings(environ={}, env_file=None, overrides={**defaults, **overrides}))


async def quantization_of(llm: LLMInterface) -> tuple[bool, bool, str]:
    answer = await llm.chat_completion([{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens > 0
    row = next(row for row in llm.get_optimizations() if row.provider == "native")
    found = next(one for one in row.optimizations if one.name == "quantization")
    return found.runs, found.could_apply, found.reason


@pytest.mark.parametrize(("kind", "scheme"), [("int8", "W8A8"), ("int4", "W4A16 group 128"), ("fp8", "FP8")])
async def test_a_model_is_quantized_at_load_and_the_report_says_so(tmp_path: Path, kind: str, scheme: str) -> None:
    async with interface(tmp_path, quantization_type=kind) as llm:
        runs, _, reason = await quantization_of(llm)
    assert runs and reason.startswith(scheme)
    assert not (tmp_path / "quantized").exists()


async def test_without_the_setting_nothing_is_quantized(tmp_path: Path) -> None:
    async with interface(tmp_path) as llm:
        runs, could_apply, reason = await quantization_of(llm)
    assert not runs and could_apply and reason == "the weights are not quantized"


async def test_with_a_text_a_folder_is_made_once(tmp_path: Path) -> None:
    model, text = small_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who had a big red ball. " * 20)
    settings = {"default_model": str(model), "quantization_type": "gptq", "quantization_calibration": text}
    for _ in range(2):
        async with interface(tmp_path / "cache", **settings) as llm:
            runs, _, reason = await quantization_of(llm)
        assert runs and reason.startswith("W4A16 group 128")
        assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 1


async def test_calibrated_types_without_a_text_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="AUTOBOT_QUANTIZATION_CALIBRATION"):
        async with interface(tmp_path, quantization_type="gptq"):
            pass


async def test_a_text_that_is_not_there_names_itself(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    with pytest.raises(ConfigurationError, match=r"AUTOBOT_QUANTIZATION_CALIBRATION='.*missing\.txt' cannot be read"):
        async with interface(tmp_path, quantization_type="int8", quantization_calibration=missing):
            pass
