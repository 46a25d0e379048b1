"""AUTOBOT_QUANTIZATION_TYPE on our own engine: quantized at load or once for all, and the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_folders import small_model

from autobot_llm import LLMInterface
from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.native import NativeProvider
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


async def test_a_variant_beside_the_model_is_run_in_its_place(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    quantize_folder(model, tmp_path / "model-w8a8", QuantizationConfig(type=QuantizationType.W8))
    async with interface(tmp_path / "cache", default_model=str(model), quantization_type="int8") as llm:
        _, _, reason = await quantization_of(llm)
    assert reason.startswith("W8A16")  # the folder's; made at load it would be W8A8


async def test_use_quantized_models_takes_what_is_there_and_makes_nothing(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    settings = {"default_model": str(model), "use_quantized_models": True}
    revisions = set()
    for is_there in (False, True):
        if is_there:
            quantize_folder(model, tmp_path / "model-int4", QuantizationConfig(type=QuantizationType.W4))
        async with interface(tmp_path / "cache", **settings) as llm:
            runs, _, reason = await quantization_of(llm)
        assert runs is is_there
        assert reason.startswith("W4A16" if is_there else "the weights are not quantized")
        provider = NativeProvider(load_settings(environ={}, env_file=None, overrides=settings))
        revisions.add(provider.revision(None))
    assert len(revisions) == 2  # an answer of the one is not reused as the other's
    assert not (tmp_path / "cache" / "quantized").exists()


async def test_without_the_setting_a_variant_is_left_alone(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    quantize_folder(model, tmp_path / "model-int4", QuantizationConfig(type=QuantizationType.W4))
    async with interface(tmp_path / "cache", default_model=str(model)) as llm:
        runs, _, _ = await quantization_of(llm)
    assert not runs
