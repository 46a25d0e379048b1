"""Rounding, GPTQ, SmoothQuant and AWQ on single matrices and layers: what each of them promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_folders import sequences, small_model

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.linear import TORCH_LINEAR
from autobot_llm.engine.quantization.gptq import gptq
from autobot_llm.engine.quantization.layerwise import MATRICES, DenseLayer, InputStatistics, LayerMath
from autobot_llm.engine.quantization.packing import (
    from_nibbles,
    nibbles,
    pack_awq,
    pack_columns,
    pack_rows,
    unpack_awq,
    unpack_columns,
    unpack_rows,
)
from autobot_llm.engine.quantization.products import product_of, twin, with_quantized
from autobot_llm.engine.quantization.rounding import NUMBERS_AT_A_TIME, round_activations, round_to_nearest
from autobot_llm.engine.quantization.scaling import scale_for_activations, smooth
from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.engine.quantization.source import StoredModel
from autobot_llm.engine.quantization.weight import QuantizedWeight

INT8 = Scheme("int", 8, "channel", activations="int8")
INT8_WEIGHTS = Scheme("int", 8, "channel")
INT4 = Scheme("int", 4, "group", 32)
INT4_ASYMMETRIC = Scheme("int", 4, "group", 32, symmetric=False)
FP8 = Scheme("float", 8, "channel", activations="fp8")
FP8_TENSOR = Scheme("float", 8, "tensor", activations="fp8")
SCHEMES = (INT8, INT8_WEIGHTS, INT4, INT4_ASYMMETRIC, FP8, FP8_TENSOR)


def matrix(num_outputs: int = 64, num_inputs: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)) * 0.1


def inputs(num_tokens: int = 256, num_inputs: int = 128, seed: int = 1) -> torch.Tensor:
    """Correlated, and some inputs far larger than others, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator) * 0.3 + torch.eye(num_inputs)
    sizes = torch.exp(torch.randn(num_inputs, generator=generator))
    return torch.randn(num_tokens, num_inputs, generator=generator) @ mixing * sizes


def product_error(weight: torch.Tensor, quantized: QuantizedWeight, x: torch.Tensor) -> float:
    return float((x @ (quantized.dequantize(torch.float32) - weight).t()).norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_columns", [8, 40, 64])
def test_packed_words_come_back(bits: int, num_columns: int) -> None:
    values = torch.randint(0, 2**bits, (16, num_columns), dtype=torch.int32)
    assert torch.equal(unpack_rows(pack_rows(values, bits), bits, num_columns), values)
    assert torch.equal(unpack_columns(pack_columns(values, bits), bits, 16), values)
    if bits == 4:
        assert torch.equal(unpack_awq(pack_awq(values)), values)
        assert torch.equal(from_nibbles(nibbles(values)).int(), values)


def test_words_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    assert torch.equal(pack_rows(values.int() + 8, 4), pack_to_int32(values, 4))
    assert torch.equal(pack_columns(values.int() + 8, 4), pack_to_int32(values, 4, packed_dim=0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_rounding_errs_by_half_a_step_at_most(scheme: Scheme) -> None:
    weight = matrix()
    quantized = round_to_nearest(weight, scheme, torch.float32, search=False)
    error = (quantized.dequantize() - weight).abs()
    if scheme.kind == "int":
        half_step = quantized._of_inputs(quantized.scales_OG) / 2
        steps = 1.01 if scheme.symmetric else 2.01  # the zero point is rounded, too
        assert (error <= half_step * steps + 1e-7).all()
    else:
        assert (error <= weight.abs() * 2**-4 + quantized.scales_OG * 2**-9).all()  # 3 bits of mantissa
    assert quantized.shape == weight.shape
    assert quantized.num_bytes < 0.6 * weight.numel() * weight.element_size()


def test_rows_of_zeros_stay_zeros() -> None:
    for scheme in SCHEMES:
        for dtype in (torch.float16, torch.bfloat16):
            assert not round_to_nearest(torch.zeros(16, 64), scheme, dtype).dequantize().any()


@pytest.mark.parametrize("scheme", [INT4_ASYMMETRIC, FP8], ids=lambda scheme: scheme.name)
def test_a_matrix_that_is_rounded_in_parts_is_rounded_as_its_rows_are(scheme: Scheme) -> None:
    weight = matrix(NUMBERS_AT_A_TIME // 4096 + 10, 4096)
    whole = round_to_nearest(weight, scheme, torch.float32, search=False)
    for start in (0, len(weight) - 20):  # the second part has ten rows
        rows = round_to_nearest(weight[start : start + 20], scheme, torch.float32, search=False)
        assert torch.equal(whole.rows(start, start + 20).dequantize(), rows.dequantize())


@pytest.mark.parametrize("scheme", [INT4, INT4_ASYMMETRIC, FP8])
def test_searched_scales_err_less_than_the_full_range(scheme: Scheme) -> None:
    weight = matrix()
    weight[:, 3] *= 6  # outliers, which clipping can give up
    full = round_to_nearest(weight, scheme, torch.float32, search=False).dequantize()
    searched = round_to_nearest(weight, scheme, torch.float32).dequantize()
    assert (searched - weight).norm() < 0.99 * (full - weight).norm()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [INT4, INT4_ASYMMETRIC, INT8])
def test_gptq_errs_much_less_than_rounding_on_what_it_saw(scheme: Scheme, act_order: bool) -> None:
    weight, x = matrix(), inputs()
    rounded = round_to_nearest(weight, scheme, torch.float32)
    better = gptq(weight, x.t() @ x, scheme, torch.float32, act_order=act_order)
    assert product_error(weight, better, x) < 0.75 * product_error(weight, rounded, x)
    unseen = inputs(seed=1)[:64] + 0.01
    assert product_error(weight, better, unseen) < product_error(weight, rounded, unseen)


def test_gptq_of_inputs_that_never_vary_is_rounding() -> None:
    weight, x = matrix(), inputs()
    x[:, ::2] = 0
    quantized = gptq(weight, x.t() @ x, INT4, torch.float32, act_order=True)
    assert torch.isfinite(quantized.dequantize()).all()


def watched_layer(folder: Path) -> tuple[DenseLayer, dict[str, InputStatistics], LayerMath, torch.Tensor]:
    config = load_config(folder)
    source = StoredModel(folder, config)
    layer = source.layer(0)
    ids = sequences(4, 40)
    hidden = torch.nn.functional.embedding(ids, source.rest()["model.embed_tokens.weight"])
    math = LayerMath(config, ids.shape[1])
    seen = {name: InputStatistics(layer.matrices[name].shape[1]) for name in MATRICES}
    math.forward(layer, 0, hidden, seen)
    return layer, seen, math, hidden


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_moving_range_does_not_change_the_function(tmp_path: Path, family: str, method: str) -> None:
    folder = small_model(tmp_path / "model", family, dtype="float32")
    layer, seen, math, hidden = watched_layer(folder)
    before = math.forward(layer, 0, hidden)
    norms = layer.post_norm_E.clone()
    if method == "smooth":
        smooth(layer, seen, 0.5, torch.bfloat16)
    else:
        scale_for_activations(layer, seen, INT4_ASYMMETRIC, load_config(folder), torch.bfloat16)
    assert not torch.equal(layer.post_norm_E, norms)
    torch.testing.assert_close(math.forward(layer, 0, hidden), before, rtol=1e-4, atol=1e-4)


def test_smoothing_makes_both_sides_easier_to_round(tmp_path: Path) -> None:
    layer, seen, _, _ = watched_layer(small_model(tmp_path / "model", dtype="float32"))
    x, weight = seen["down"].sample_TI.clone(), layer.matrices["down"].clone()
    x[:, 5] *= 50
    seen["down"]._sample = [x]
    seen["down"].largest_I = x.abs().amax(0)
    expected = x @ weight.t()

    def error(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> float:
        rounded, scale = round_activations(x_TI, "int8")
        quantized = round_to_nearest(weight_OI, INT8, torch.float32, search=False).dequantize()
        return float(((rounded.float() * scale) @ quantized.t() - expected).norm())

    before = error(x, weight)
    smooth(layer, seen, 0.5, torch.float32)
    assert error(seen["down"].sample_TI, layer.matrices["down"]) < 0.7 * before


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_layerwise_forward_is_the_decoders(tmp_path: Path, family: str) -> None:
    from test_folders import engine_logits

    window = {"sliding_window": 24} if family == "mistral" else {}
    folder = small_model(tmp_path / "model", family, dtype="float32", **window)
    config = load_config(folder)
    source = StoredModel(folder, config)
    rest = source.rest()
    ids = sequences(1, 40)
    math = LayerMath(config, 40)
    hidden = torch.nn.functional.embedding(ids, rest["model.embed_tokens.weight"])
    for index in range(config.num_layers):
        hidden = math.forward(source.layer(index), index, hidden)
    head_VE = rest["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = math._norm(hidden, rest["model.norm.weight"])[0] @ head_VE.t()
    torch.testing.assert_close(logits, engine_logits(folder, ids, keep_quantized=False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 70])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_product_equals_its_twin(scheme: Scheme, num_rows: int) -> None:
    weight = round_to_nearest(matrix(), scheme, torch.float32)
    x = inputs(num_rows)
    expected = twin(weight)(x)
    # int8 by int8 is exact; the products of weights alone take their inputs in bfloat16
    tolerance = 1e-5 if scheme.activations else 1e-2
    assert (product_of(weight)(x) - expected).norm() < tolerance * expected.norm()


def test_the_quantized_route_adds_biases_and_residuals() -> None:
    route = with_quantized(TORCH_LINEAR)
    weight, x, bias, residual = matrix(), inputs(3), torch.randn(64), torch.randn(3, 64)
    quantized = round_to_nearest(weight, INT8_WEIGHTS, torch.float32)
    expected = x @ quantized.dequantize().t() + bias
    packed = route.pack(quantized)
    torch.testing.assert_close(route.apply(x, packed, bias), expected, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(route.add(residual, x, packed, bias), expected + residual, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(route.apply(x, route.pack(weight), bias), x @ weight.t() + bias)


def test_an_operator_that_knows_no_quantized_weights_gets_the_matrix() -> None:
    quantized = round_to_nearest(matrix(), INT4_ASYMMETRIC, torch.float32)
    dense = quantized.dequantize()
    x = inputs(3)
    with torch.inference_mode():
        assert torch.equal(torch.nn.functional.linear(x, quantized), torch.nn.functional.linear(x, dense))
    assert torch.equal(quantized.to(torch.bfloat16), dense.to(torch.bfloat16))
    assert quantized.dtype == torch.float32


def test_rows_below_each_other_are_one_matrix() -> None:
    for scheme in (INT8, INT4_ASYMMETRIC, FP8):
        parts = [round_to_nearest(matrix(seed=seed), scheme, torch.float32) for seed in range(3)]
        joined = QuantizedWeight.below_each_other(parts)
        assert joined is not None
        assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
        assert torch.equal(joined.rows(64, 128).dequantize(), parts[1].dequantize())
