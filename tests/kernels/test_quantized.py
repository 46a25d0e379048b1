"""Products of quantized weights with few rows: what the numbers that the weights stand for give, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from autobot_llm.engine.kernels.gpu.linear import (
    linear_reference,
    norm_linear_gated_reference,
    norm_linear_reference,
)
from autobot_llm.engine.kernels.gpu.quantized import multiply_quantized
from autobot_llm.engine.kernels.gpu.tiles import RowsTile
from autobot_llm.engine.quantization.packed import PackedWeight, pack_4_bits

EPS = 1e-5
ON_GPU = torch.cuda.is_available()
FORMATS = ["int8", "fp8", "int4", "int4 with zeros"]
# outputs, inputs: whole tiles, and none; pairs of groups, and half of one
SHAPES = [(6144, 4096), (4096, 14336), (1000, 1032), (70, 384)] if ON_GPU else [(72, 512), (9, 328)]
ROWS = [1, 2, 8, 16, 31, 64, 128] if ON_GPU else [1, 5, 33]
TILES = [
    RowsTile(64, 128, 4, 4, prefetch_bytes=256),
    RowsTile(64, 64, 4, 3, num_splits=3, evict_first=True),
    RowsTile(32, 128, 2, 3, num_splits=2, prefetch_bytes=512),
]


def random_weight(
    kind: str, num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device, *, group: int = 128
) -> PackedWeight:
    """Numbers of the format whose products have outputs of about 1. Made on the device: a processor takes seconds."""
    generator = torch.Generator(device).manual_seed(num_outputs * 1009 + num_inputs)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    scale = num_inputs**-0.5
    if not kind.startswith("int4"):
        values = random(num_outputs, num_inputs) * 254 - 127
        stored = values.round().to(torch.int8) if kind == "int8" else (values * 3).to(torch.float8_e4m3fn)
        scales = (0.5 + random(num_outputs)) * scale / (73 if kind == "int8" else 220)
        return PackedWeight(stored, scales, num_inputs)
    num_groups = math.ceil(num_inputs / group)
    values = (random(num_outputs, num_inputs) * 16).to(torch.uint8)
    scales = ((0.5 + random(num_outputs, num_groups)) * scale / 4.6).to(dtype)
    zeros = (random(num_outputs, num_groups) * 16).to(torch.uint8) if "zeros" in kind else None
    packed = pack_4_bits(values, scales, zeros, group=group)
    expected = values.double() - (8 if zeros is None else zeros.double().repeat_interleave(group, 1)[:, :num_inputs])
    expected *= scales.double().repeat_interleave(group, 1)[:, :num_inputs]
    torch.testing.assert_close(packed.dequantized(torch.float32).double(), expected, rtol=1e-6, atol=0)
    return packed


def check(tile: RowsTile, weight: PackedWeight, rows: int, dtype: torch.dtype, *, what: str, bias: bool) -> None:
    device, num_inputs, gated = weight.device, weight.num_inputs, what == "gated"
    num_outputs = weight.num_outputs // (2 if gated else 1)
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    x = random(rows, num_inputs + 24)[:, 8 : num_inputs + 8]
    norm, residual = 1 + random(num_inputs, scale=0.3), random(rows, num_outputs + 8)[:, :num_outputs]
    bias_O = random(weight.num_outputs) if bias else None
    around = torch.full((rows, num_outputs + 16), torch.nan, dtype=dtype, device=device)
    out = around[:, 8 : num_outputs + 8]
    multiply_quantized(
        tile,
        x,
        weight,
        out,
        norm=norm if what in ("norm", "gated") else None,
        eps=EPS,
        bias=bias_O,
        residual=residual if what == "add" else None,
        gated=gated,
    )
    numbers = weight.dequantized(torch.float64)
    if gated:
        expected = norm_linear_gated_reference(x, norm, EPS, numbers, bias_O)
    elif what == "norm":
        expected = norm_linear_reference(x, norm, EPS, numbers, bias_O)
    else:
        expected = linear_reference(x, numbers, bias_O) + (residual.double() if what == "add" else 0.0)
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-3
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < bound, f"{what}: relative error {error:.2e}"
    assert around[:, :8].isnan().all() and around[:, num_outputs + 8 :].isnan().all()


@pytest.mark.parametrize("what", ["plain", "add", "norm", "gated"])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_is_that_of_the_numbers_the_weights_stand_for(
    kind: str, num_outputs: int, num_inputs: int, what: str, device: torch.device, dtype: torch.dtype
) -> None:
    weight = random_weight(kind, num_outputs * (2 if what == "gated" else 1), num_inputs, dtype, device)
    for i, rows in enumerate(ROWS):
        check(TILES[i % len(TILES)], weight, rows, dtype, what=what, bias=i % 2 == 1)


@pytest.mark.parametrize("group", [32, 64])
def test_groups_may_be_smaller(group: int, device: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight("int4", 96, 320, dtype, device, group=group)
    for tile, what in itertools.product(TILES[:2], ["plain", "norm"]):
        check(tile, weight, 3, dtype, what=what, bias=False)


def test_no_rows_give_no_rows(device: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight("int8", 24, 40, dtype, device)
    x, out = torch.empty(0, 40, dtype=dtype, device=device), torch.empty(0, 24, dtype=dtype, device=device)
    assert multiply_quantized(TILES[0], x, weight, out).shape == (0, 24)


def test_a_weight_says_how_many_bytes_it_takes(device: torch.device, dtype: torch.dtype) -> None:
    assert random_weight("int8", 64, 512, dtype, device).num_bytes == 64 * 512 + 64 * 4
    assert random_weight("int4", 64, 512, dtype, device).num_bytes == 64 * 512 // 2 + 64 * 4 * 2
    assert random_weight("int4 with zeros", 64, 512, dtype, device).num_bytes == 64 * 512 // 2 + 2 * 64 * 4 * 2
