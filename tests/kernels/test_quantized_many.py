"""Products of quantized weights with many rows: what the weights' numbers, and the rounded rows', give in float64."""

from __future__ import annotations

import pytest
import torch
from test_linear import Case
from test_quantized import EPS, FORMATS, random_weight

from autobot_llm.engine.kernels.gpu.linear import (
    linear_reference,
)
from autobot_llm.engine.kernels.gpu.many_tiles import HOPPER, NARROW, Library, ManyTile, Way, choose_way
from autobot_llm.engine.kernels.gpu.quantized_many import (
    dequantize,
    format_of,
    multiply_by,
    multiply_in_parts,
    multiply_many,
    round_rows,
)
from autobot_llm.engine.quantization.packed import PackedWeight
from autobot_llm.engine.quantization.rounding import round_activations

ON_GPU = torch.cuda.is_available()
ROUNDED = ["int8", "fp8"]
# outputs, inputs, rows: whole tiles, and none
CASES = [(6144, 4096, 256), (1000, 1032, 300), (70, 384, 65)] if ON_GPU else [(36, 328, 35)]
WHATS = ["plain", "add", "norm", "gated"] if ON_GPU else ["add", "gated"]
TILES = (
    [ManyTile(128, 128, 64, 8, 3), ManyTile(64, 64, 64, 4, 3, num_splits=4, prefetch_bytes=512)]
    if ON_GPU
    else [ManyTile(32, 32, 64, 4, 2, num_splits=2)]
)


def operands(
    kind: str, num_outputs: int, num_inputs: int, rows: int, dtype: torch.dtype, device: torch.device, *, gated: bool
) -> tuple[Case, PackedWeight]:
    """As test_linear's, whose weight is not used. Rows hold few bits, so that rounding them to 8 is exact: Triton's
    interpreter rounds to float8 wrongly, and a tie may go either way after a norm."""
    case = Case(rows, num_outputs, num_inputs, device, dtype, halves=2 if gated else 1)
    case.x = (case.x * 2).round().clamp(-7, 7) / 2
    case.x[:, 0] = 3.5
    return case, random_weight(kind, num_outputs * (2 if gated else 1), num_inputs, dtype, device)


def check(way: Way, kind: str, what: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *,
          rounded: bool, bias: bool) -> None:  # fmt: skip
    gated = what == "gated"
    case, weight = operands(kind, *shape, dtype, device, gated=gated)
    norm = case.norm if what in ("norm", "gated") and (ON_GPU or not rounded) else None
    bias_O = case.bias if bias else None
    returned = multiply_by(
        way, case.x, weight, case.out, norm=norm, eps=EPS, bias=bias_O,
        residual=case.residual if what == "add" else None, gated=gated, rounded=rounded,
    )  # fmt: skip
    assert returned is case.out
    x, numbers = case.x.double(), weight.dequantized(torch.float64)
    if rounded:  # a tie after a norm may go either way: how rows are rounded is another test's
        values, scales_T = round_rows(case.x, weight.values.dtype, norm, EPS)
        x = values.double() * scales_T[:, None].double()
    elif norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()
    expected = linear_reference(x, numbers, bias_O)
    if gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    elif what == "add":
        expected += case.residual.double()
    bound = 8e-3 if dtype == torch.bfloat16 else 2e-3
    error = float((case.out.double() - expected).norm() / expected.norm())
    assert error < bound, f"{way}, {what}: relative error {error:.2e}"
    columns = case.around.shape[1]
    assert case.around[:, :8].isnan().all() and case.around[:, columns - 8 :].isnan().all()


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_turned_into_numbers_on_their_way_multiply_as_those_numbers(
    kind: str, what: str, device: torch.device, dtype: torch.dtype
) -> None:
    for shape in CASES:
        for i, way in enumerate([*TILES, Library.PARTS]):
            check(way, kind, what, shape, dtype, device, rounded=False, bias=i % 2 == 1)


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("kind", ROUNDED)
def test_rows_rounded_to_eight_bits_multiply_as_what_they_were_rounded_to(
    kind: str, what: str, device: torch.device, dtype: torch.dtype
) -> None:
    for shape in CASES:
        for i, tile in enumerate(TILES):
            check(tile, kind, what, shape, dtype, device, rounded=True, bias=i % 2 == 1)
    if kind == "fp8" and (ON_GPU or what == "add"):  # the product of torch, which gives bfloat16
        check(Library.SCALED, kind, what, (48, 64, 5), torch.bfloat16, device, rounded=True, bias=what == "plain")


def test_rows_are_rounded_as_the_twin_does(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(9, 200, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)[:, 8:168]
    x[4] = 0
    values, scales = round_rows(x, torch.int8)
    expected, expected_scales = round_activations(x, "int8")
    assert scales.allclose(expected_scales[:, 0], rtol=1e-6)
    assert (values.int() - expected.int()).abs().max() <= 1  # a tie, of a quotient that is off by its last place
    assert (values != expected).float().mean() < 1e-2
    norm = torch.rand(160, device=device).to(dtype)
    values, scales = round_rows(x, torch.int8, norm, EPS)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * norm.float()
    assert (values.float() * scales[:, None] - wide).abs().max() <= 0.51 * scales.max()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_part_of_a_weight_in_numbers_is_that_part_of_its_twin(
    kind: str, device: torch.device, dtype: torch.dtype
) -> None:
    weight = random_weight(kind, 50, 328, dtype, device)
    part = torch.full((20, 328), torch.nan, dtype=dtype, device=device)
    assert dequantize(weight, 9, part).equal(weight.dequantized(dtype)[9:29])


def test_weights_larger_than_the_workspace_are_multiplied_in_parts(device: torch.device, dtype: torch.dtype) -> None:
    case, weight = operands("int4", 50, 328, 3, dtype, device, gated=False)
    space = torch.empty(20 * 328 * dtype.itemsize + 5, dtype=torch.uint8, device=device)
    multiply_in_parts(case.x, weight, case.out, case.bias, case.residual, space)
    expected = linear_reference(case.x, weight.dequantized(torch.float64), case.bias) + case.residual.double()
    assert (case.out.double() - expected).norm() / expected.norm() < 8e-3


@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4"])
def test_no_rows_give_no_rows_and_any_number_has_a_way(fmt: str, device: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight(fmt, 24, 256, dtype, device)
    assert format_of(weight) == fmt
    x, out = torch.empty(0, 256, dtype=dtype, device=device), torch.empty(0, 24, dtype=dtype, device=device)
    assert multiply_many(x, weight, out) is out
    for rounded in (False, True):
        for rows in (1, 33, 128, 129, 1024, 8192):
            if (fmt, rounded) in HOPPER:
                for num_inputs in (4096, 14336):
                    way = choose_way(fmt, rounded, rows, NARROW, num_inputs, False, (9, 0))
                    assert isinstance(way, ManyTile | Library)
                elsewhere = choose_way(fmt, rounded, rows, NARROW, 4096, True, (8, 0))
                assert isinstance(elsewhere, ManyTile) if rounded else elsewhere is Library.PARTS


def test_four_bits_are_not_multiplied_by_eight(device: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight("int4", 24, 256, dtype, device)
    x, out = torch.zeros(4, 256, dtype=dtype, device=device), torch.zeros(4, 24, dtype=dtype, device=device)
    with pytest.raises(AssertionError, match="8"):
        multiply_by(TILES[0], x, weight, out, rounded=True)
