"""Quantized matrices in the layout of the GPU's kernels: the same numbers, or a reason that is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import write_random_model
from quantized_folders import as_auto_awq, as_auto_gptq, small_model

from autobot_llm.engine.gpu.packing import WeightPacker
from autobot_llm.engine.memory import weight_bytes
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import MATRICES, DecoderWeights, load_weights
from autobot_llm.engine.quantization.online import quantize_online
from autobot_llm.engine.quantization.packed import PackedWeight, packed, why_not_packed
from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.rounding import round_to_nearest
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType, Scheme
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.errors import ConfigurationError

HOPPER, AMPERE = (9, 0), (8, 0)
PACKED = [
    Scheme("int", 8, "channel"),
    Scheme("int", 8, "tensor"),
    Scheme("float", 8, "channel"),
    Scheme("int", 4, "channel"),
    Scheme("int", 4, "group", 32),
    Scheme("int", 4, "group", 64, symmetric=False),
    Scheme("int", 4, "group", 128, symmetric=False),
    Scheme("int", 4, "group", 192),
    Scheme("int", 4, "group", 256, symmetric=False),
]


def rounded(scheme: Scheme, *, inputs: int = 416) -> QuantizedWeight:
    weight_OI = torch.randn(24, inputs, generator=torch.Generator().manual_seed(0))
    return round_to_nearest(weight_OI, scheme, torch.bfloat16, search=False)


@pytest.mark.parametrize("scheme", PACKED, ids=lambda scheme: scheme.name)
def test_a_packed_matrix_stands_for_the_very_same_numbers(scheme: Scheme) -> None:
    weight = rounded(scheme)
    assert why_not_packed(weight, HOPPER) is None
    assert torch.equal(packed(weight).dequantized(torch.float32), weight.dequantize(torch.float32))


def test_what_does_not_fit_has_a_reason() -> None:
    def reason(scheme: Scheme, capability: tuple[int, int] = HOPPER) -> str | None:
        return why_not_packed(rounded(scheme), capability)

    assert reason(Scheme("float", 8, "channel"), AMPERE) == "this GPU has no 8-bit floats"
    assert reason(Scheme("int", 8, "group", 32)) == "8 bits in groups"
    assert "groups of 16 inputs" in str(reason(Scheme("int", 4, "group", 16)))
    four = rounded(Scheme("int", 4, "group", 32))
    four.group_of_input_I = torch.arange(416).flip(0) // 32
    assert "g_idx" in str(why_not_packed(four, HOPPER))
    tiny = rounded(Scheme("int", 4, "group", 32))
    tiny.scales_OG = torch.full_like(tiny.scales_OG, 1e-20)
    halves = QuantizedWeight(tiny.stored, tiny.scales_OG, None, tiny.scheme, dtype=torch.float16)
    assert why_not_packed(tiny, HOPPER) is None
    assert why_not_packed(halves, HOPPER) == "scales that float16 does not hold"


def loaded(folder: Path, kind: str = "none", capability: tuple[int, int] = HOPPER) -> tuple[DecoderWeights, str]:
    config = load_config(folder)
    packer = WeightPacker.for_model(config, QuantizationType(kind), capability)
    assert packer is not None
    weights = load_weights(folder, config, dtype=None, device="cpu", keep_quantized=True, convert=packer)
    return weights, packer.text


def matrices(weights: DecoderWeights) -> list[PackedWeight | torch.Tensor]:
    return [getattr(layer, name) for layer in weights.layers for name in MATRICES]


def check_equal(weights: DecoderWeights, expected: DecoderWeights, *, num_packed: int) -> None:
    pairs = list(zip(matrices(weights), matrices(expected), strict=True))
    assert sum(isinstance(ours, PackedWeight) for ours, _ in pairs) == num_packed
    for ours, theirs in pairs:
        dense = ours.dequantized(torch.bfloat16) if isinstance(ours, PackedWeight) else ours
        whole = theirs.dequantize() if isinstance(theirs, QuantizedWeight) else theirs
        assert torch.equal(dense, whole)
    assert torch.equal(weights.embed_VE, expected.embed_VE) and torch.equal(weights.norm_E, expected.norm_E)
    assert torch.equal(weights.lm_head_VE, expected.lm_head_VE)


@pytest.mark.parametrize("kind", ["w8a8", "w8", "w4", "fp8"])
def test_a_model_is_rounded_as_it_is_loaded_a_layer_at_a_time(tmp_path: Path, kind: str) -> None:
    folder = small_model(tmp_path / "model", "qwen2", hidden_size=256, tie_word_embeddings=False)
    config = load_config(folder)
    weights, text = loaded(folder, kind)
    whole = load_weights(folder, config, dtype=None, device="cpu")
    check_equal(weights, quantize_online(whole, QuantizationType(kind)), num_packed=8)
    packer = WeightPacker.for_model(config, QuantizationType(kind), HOPPER)
    assert packer is not None and text == f"{packer.scheme.name} weights as they are"
    assert weights.num_bytes == pytest.approx(packer.expected_bytes(config, 2), rel=0.01)
    assert weights.num_bytes < weight_bytes(config, 2)


@pytest.mark.parametrize("kind", ["w8", "w4", "fp8"])
def test_a_quantized_folders_matrices_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    source, folder = small_model(tmp_path / "model"), tmp_path / "quantized"
    ids = torch.randint(5, 8192, (2, 48), generator=torch.Generator().manual_seed(1))
    quantize_folder(source, folder, QuantizationConfig(type=QuantizationType(kind), group_size=32), sequences_BL=ids)
    weights, text = loaded(folder)
    check_equal(weights, load_weights(folder, load_config(folder), dtype=None, device="cpu"), num_packed=8)
    assert text.endswith(" weights as they are")


def test_what_a_folder_keeps_otherwise_is_dequantized_and_told(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    as_auto_gptq(tmp_path / "plain", source, version="gptq")
    as_auto_gptq(tmp_path / "permuted", source, version="gptq_v2", permuted=True)
    as_auto_awq(tmp_path / "awq", source)
    for name, num_packed in (("plain", 8), ("permuted", 0), ("awq", 8)):
        weights, text = loaded(tmp_path / name)
        expected = load_weights(tmp_path / name, load_config(tmp_path / name), dtype=None, device="cpu")
        if num_packed:
            assert text.endswith("weights as they are")
        else:
            # q, k and v, and gate and up, have maps of their own here
            assert "8 of 8 matrices dequantized" in text and "g_idx" in text and "grouped differently" in text
            check_equal(weights, expected, num_packed=0)


def test_progress_counts_all_bytes_once_when_layers_are_converted(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_random_model(folder, "llama", dtype="bfloat16", num_hidden_layers=2)
    seen: list[tuple[int, int]] = []
    config = load_config(folder)
    load_weights(folder, config, dtype=None, device="cpu", convert=torch.clone, on_progress=lambda *at: seen.append(at))
    done, totals = [at[0] for at in seen], {at[1] for at in seen}
    assert done == sorted(set(done)) and totals == {done[-1]} == {weight_bytes(config, 2)}


def test_a_type_that_cannot_be_made_at_load_is_refused(tmp_path: Path) -> None:
    config = load_config(small_model(tmp_path / "model"))
    assert WeightPacker.for_model(config, QuantizationType.NONE, HOPPER) is None
    with pytest.raises(ConfigurationError, match="gptq cannot be made at load: expected w8a8, w8, w4, fp8"):
        WeightPacker.for_model(config, QuantizationType.GPTQ, HOPPER)
    with pytest.raises(ConfigurationError, match="'fp8': this GPU has no 8-bit floats; expected int8 or int4"):
        WeightPacker.for_model(config, QuantizationType.FP8, AMPERE)
