"""Quantized models in the engine: which step computes them, what it holds in memory, and the loader that finds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_folders import TINY
from quantized_folders import as_whole_weights, sequences, small_model

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kernels.cpu.build import compiler
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.loader import LoadedModel, QuantizedModelLoader
from autobot_llm.engine.quantization.online import quantize_online
from autobot_llm.engine.quantization.quality import _logits, compare, compare_all, open_engines
from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.registry import QUANTIZED_MODEL_REGISTRY, variants_of
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.errors import ConfigurationError, ModelLoadError
from autobot_llm.settings.registry import user_cache_dir

TEXT = "Once upon a time there was a little girl who had a big red ball. " * 60
TASKS = Path("/proc/self/task")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")


def cache_dir() -> Path:
    import os

    return user_cache_dir(os.environ)


def engine_of(folder: Path, *, compiled: bool, kind: QuantizationType = QuantizationType.NONE) -> Engine:
    options = EngineOptions(
        folder=folder, cache_dir=cache_dir(), device="cpu", compiled_step="on" if compiled else "off",
        cpu_threads=1, max_model_len=256, quantization=kind, prefix_caching=False,
    )  # fmt: skip
    return load_engine(options)


def all_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    try:
        return torch.cat([logits.clone() for logits, _ in _logits(engine, ids)])
    finally:
        engine.close()


def quantized(folder: Path, source: Path, kind: str, **more: object) -> Path:
    config = QuantizationConfig(type=QuantizationType(kind), **more)
    quantize_folder(source, folder, config, sequences_BL=sequences())
    return folder


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("kind", "bits"), [("w8", "8-bit"), ("w8a8", "8-bit"), ("gptq", "4-bit"), ("awq", "4-bit")])
def test_the_compiled_step_reads_quantized_weights_as_they_are(
    tmp_path: Path, family: str, kind: str, bits: str
) -> None:
    source = small_model(tmp_path / "model", family, intermediate_size=288, dtype="float32")
    group = {"group_size": 32}  # two groups and more for each matrix, and panels that are not full
    folder = quantized(tmp_path / "quantized", source, kind, **group)
    engine = engine_of(folder, compiled=True)
    assert engine.executor.reason.startswith(f"{bits} weights")
    ids = sequences(1)[0].tolist()
    found = all_logits(engine, ids)
    twin = all_logits(engine_of(as_whole_weights(tmp_path / "twin", folder), compiled=False), ids)
    assert (found - twin).norm() < 1e-5 * twin.norm()


@needs_compiler
def test_quantized_logits_are_the_same_bits_in_one_step_and_in_many(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "quantized", small_model(tmp_path / "model"), "awq")
    ids = sequences(1)[0].tolist()
    whole = all_logits(engine_of(folder, compiled=True), ids)
    engine = engine_of(folder, compiled=True)
    engine.scheduler.max_num_batched_tokens = 7
    assert torch.equal(all_logits(engine, ids), whole)


@needs_compiler
def test_what_the_compiled_step_cannot_read_is_dequantized_and_says_so(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "quantized", small_model(tmp_path / "model"), "fp8")
    engine = engine_of(folder, compiled=True)
    assert "FP8" in engine.executor.reason and "dequantized" in engine.executor.reason
    ids = sequences(1)[0].tolist()
    twin = all_logits(engine_of(as_whole_weights(tmp_path / "twin", folder), compiled=False), ids)
    assert (all_logits(engine, ids) - twin).norm() < 0.02 * twin.norm()  # bfloat16 weights


@pytest.mark.parametrize("kind", ["w8a8", "w8", "w4", "fp8"])
def test_a_model_is_quantized_while_it_is_loaded(tmp_path: Path, kind: str) -> None:
    source = small_model(tmp_path / "model")
    ids = sequences(1)[0].tolist()
    before = all_logits(engine_of(source, compiled=False), ids)
    engine = engine_of(source, compiled=False, kind=QuantizationType(kind))
    after = all_logits(engine, ids)
    change = float((after - before).norm() / before.norm())
    assert 1e-4 < change < (0.5 if kind == "w4" else 0.2)


@pytest.mark.parametrize(("kind", "share"), [("w8", 0.53), ("w4", 0.28), ("fp8", 0.53)])
def test_quantized_matrices_take_the_memory_that_they_should(tmp_path: Path, kind: str, share: float) -> None:
    source = small_model(tmp_path / "model", vocab_size=8192)
    weights = load_weights(source, load_config(source), dtype=None, device="cpu")
    smaller = quantize_online(weights, QuantizationType(kind))
    embedding = weights.embed_VE.numel() * 2
    assert smaller.num_bytes - embedding < share * (weights.num_bytes - embedding)


def test_gptq_cannot_be_made_at_load_and_says_what_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gptq cannot be made at load: expected w8a8, w8, w4, fp8"):
        engine_of(small_model(tmp_path / "model"), compiled=False, kind=QuantizationType.GPTQ)


def test_a_quantized_engine_answers(tmp_path: Path) -> None:
    engine = engine_of(TINY, compiled=False, kind=QuantizationType.W8)
    prompt = engine.tokenizer.encode("Once upon a time", add_special_tokens=False)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    engine.add(1, EngineRequest(prompt_ids=prompt, params=(params,)), RequestStats())
    text = ""
    while engine.has_work:
        text += "".join(output.text for output in engine.step())
    engine.close()
    assert len(text.split()) >= 4


def test_quality_of_the_embedded_model_in_int8_is_measured(tmp_path: Path) -> None:
    quantize_folder(TINY, tmp_path / "tiny-w8", QuantizationConfig(type=QuantizationType.W8))
    text = (TINY / "MODEL_CARD.md").read_text()
    quality = compare(TINY, tmp_path / "tiny-w8", text, cache_dir(), num_windows=2, length=128)
    assert quality.num_tokens == 254
    assert abs(quality.perplexity_change) < 0.02
    assert 0 < quality.kl < 0.02
    assert quality.top1_agreement > 0.9
    assert quality.num_continuations == 2
    assert quality.perplexity_change_error is not None and 0 < quality.perplexity_change_error < 0.02
    same, other = compare_all(TINY, [TINY, tmp_path / "tiny-w8"], text, cache_dir(), num_windows=1, length=64)
    assert (same.perplexity_change, same.top1_agreement, same.exact_continuations) == (0.0, 1.0, 1)
    assert other.kl > 0 and other.perplexity_before == same.perplexity and other.perplexity_change_error is None


@needs_compiler
@pytest.mark.skipif(not TASKS.is_dir(), reason="this system does not list a process's threads")
def test_engines_opened_before_one_that_cannot_be_are_closed(tmp_path: Path) -> None:
    """The threads of a compiled step end with it."""
    good = EngineOptions(folder=TINY, cache_dir=cache_dir(), device="cpu", cpu_threads=3, max_model_len=64)
    num_threads = len(list(TASKS.iterdir()))
    with open_engines([good, good]) as engines:
        assert len(engines) == 2
        assert len(list(TASKS.iterdir())) > num_threads
    assert len(list(TASKS.iterdir())) == num_threads
    with (
        pytest.raises(ModelLoadError, match=r"config\.json"),
        open_engines([good, replace(good, folder=tmp_path)]),
    ):
        pass
    assert len(list(TASKS.iterdir())) == num_threads


# The loader


def load(model: Path, cache: Path, kind: str, **more: object) -> LoadedModel:
    config = QuantizationConfig(type=QuantizationType(kind), calibration_samples=2, calibration_sequence_length=64)
    return QuantizedModelLoader(config, **more).load_or_quantize(model, cache)


def test_a_model_is_quantized_once_and_found_again(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    first = load(source, tmp_path / "cache", "gptq", calibration_text=TEXT)
    assert (first.origin, first.by) == ("quantized now", "autobot_llm")
    second = load(source, tmp_path / "cache", "gptq", calibration_text=TEXT)
    assert (second.origin, second.folder, second.by) == ("cache", first.folder, "autobot_llm")
    other = load(source, tmp_path / "cache", "gptq", calibration_text=TEXT + "More.")
    assert other.folder != first.folder
    assert load(first.folder, tmp_path / "cache", "gptq").origin == "already quantized"
    assert load(source, tmp_path / "cache", "none").origin == "unquantized"


def test_a_variant_beside_the_model_comes_first(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    (tmp_path / "model-int8").mkdir()  # no model, so not a variant
    variant = quantized(tmp_path / "model-gptq", source, "gptq")
    found = load(source, tmp_path / "cache", "gptq")
    assert (found.origin, found.folder) == ("known variant", variant)
    assert load(source, tmp_path / "cache", "w8").origin == "quantized now"


def test_a_hub_is_asked_for_the_registered_names(tmp_path: Path) -> None:
    variant = quantized(tmp_path / "v", small_model(tmp_path / "model"), "w8")
    asked = []

    class Shelf:
        def fetch(self, name: str) -> Path | None:
            asked.append(name)
            return variant if name == "neuralmagic/Mistral-7B-Instruct-v0.2-INT8" else None

    found = load(Path("mistralai/Mistral-7B-Instruct-v0.2"), tmp_path / "cache", "w8a8", hub=Shelf())
    assert (found.origin, found.folder) == ("known variant", variant)
    with pytest.raises(ConfigurationError, match="expected a model folder, or a name that the hub knows"):
        load(Path("nobody/knows-me"), tmp_path / "cache", "w8a8", hub=Shelf())
    assert asked[-3:] == ["nobody/knows-me-int8", "nobody/knows-me-w8a8", "nobody/knows-me"]


def test_the_registry_names_what_the_design_names() -> None:
    names = ["Mistral-7B-Instruct-v0.2", "Llama-2-7b-chat-hf", "Llama-2-13b-chat-hf"]
    assert [name.rpartition("/")[2] for name in QUANTIZED_MODEL_REGISTRY] == names
    for name in names:
        assert next(variants_of(name, QuantizationType.GPTQ)) == f"TheBloke/{name}-GPTQ"
    assert list(variants_of("/m/x", QuantizationType.AWQ)) == ["/m/x-awq"]


def test_without_llm_compressor_our_quantizers_do_it_and_say_why(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    found = load(source, tmp_path / "cache", "gptq", calibration_text=TEXT, compressor_mode="installed")
    assert found.by.startswith("autobot_llm (llm-compressor is not installed in")
    found = load(source, tmp_path / "cache", "awq", calibration_text=TEXT, compressor_mode="installed")
    if not Path("/dev/nvidiactl").exists():
        assert "needs a GPU" in found.by


def test_half_an_environment_is_removed_and_the_error_tells_what_pip_said(tmp_path: Path) -> None:
    from autobot_llm.engine.quantization.compressor import CompressorError, environment

    requirement = str(tmp_path / "no-such-wheel.whl")
    with pytest.raises(CompressorError, match="no-such-wheel"):
        environment(tmp_path / "cache", may_install=True, requirements=(requirement,))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["llmcompressor-0.14.0.lock"]


def test_calibration_without_a_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="AUTOBOT_QUANTIZATION_CALIBRATION"):
        load(small_model(tmp_path / "model"), tmp_path / "cache", "awq")


@pytest.mark.parametrize(
    ("field", "value"),
    [("smooth_quant_alpha", 1.5), ("group_size", 100), ("calibration_samples", 0), ("calibration_sequence_length", 3)],
)
def test_a_bad_value_of_the_configuration_names_itself(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{field}={value}: expected"):
        replace(QuantizationConfig(), **{field: value})
