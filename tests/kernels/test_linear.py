from __future__ import annotations

import itertools
import math

import pytest
import torch

from autobot_llm.engine.kernels.gpu import row_launch
from autobot_llm.engine.kernels.gpu.linear import (
    feed_forward_add,
    linear,
    linear_add,
    linear_add_reference,
    linear_reference,
    multiply,
    norm_linear,
    norm_linear_gated,
    norm_linear_gated_reference,
    norm_linear_reference,
)
from autobot_llm.engine.kernels.gpu.tiles import HOPPER, MAX_ROWS, Kind, MatvecTile, RowsTile, Tile, choose_tile

EPS = 1e-5
ON_GPU = torch.cuda.is_available()
# Each tile of the table with the kinds it serves there: what fits the shared memory of one need not fit another's.
KINDS_OF_TILES: dict[Tile, set[Kind]] = {}
for (_kind, _), _shapes in HOPPER.items():
    for _tile in filter(None, _shapes.values()):
        KINDS_OF_TILES.setdefault(_tile, set()).add(_kind)
NUM_ROWS = [1, 2, 3, 8, 16, 31, 64, 128, 150] if ON_GPU else [1, 2, 5, 16, 33, 150]
# outputs, inputs: whole tiles, and none; the last is no multiple of the width of a load
SHAPES = (
    [(6144, 4096), (4096, 14336), (1000, 1032), (8192, 384), (1, 4096), (70, 60)] if ON_GPU else [(72, 264), (9, 60)]
)


class Case:
    """Random operands of one product, and an output full of NaN whose rows lie apart."""

    def __init__(
        self,
        num_rows: int,
        num_outputs: int,
        num_inputs: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        halves: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(num_rows * 1_000_003 + num_outputs * 1_009 + num_inputs)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        self.x = random(num_rows, num_inputs + 24)[:, 8 : num_inputs + 8]
        self.weight = random(halves * num_outputs, num_inputs, scale=num_inputs**-0.5)
        self.norm = 1 + random(num_inputs, scale=0.3)
        self.bias = random(halves * num_outputs)
        self.residual = random(num_rows, num_outputs + 8)[:, :num_outputs]
        self.around = torch.full((num_rows, num_outputs + 16), torch.nan, dtype=dtype, device=device)
        self.out = self.around[:, 8 : num_outputs + 8]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of operands and result; NaN is never close.

    What is rounded are terms whose root mean square sum is about 1 in a `Case` (0.6 after the gate). A single output
    can be far smaller, because its terms cancel: the rounding does not shrink with it.
    """
    bound = 8e-3 if actual.dtype == torch.bfloat16 else 1e-3
    error = (actual.double() - expected).norm() / max(float(expected.norm()), 0.5 * math.sqrt(expected.numel()))
    assert error < bound, f"relative error {error:.2e}"
    worst = ((actual.double() - expected).abs() / (expected.abs() + expected.square().mean().sqrt())).max()
    assert worst < 8 * bound, f"one entry is off by {worst:.2e}"


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_every_operator_equals_its_twin(
    num_rows: int, num_outputs: int, num_inputs: int, with_bias: bool, device: torch.device, dtype: torch.dtype
) -> None:
    case = Case(num_rows, num_outputs, num_inputs, device, dtype)
    bias = case.bias if with_bias else None
    assert linear(case.x, case.weight, bias, out=case.out) is case.out
    assert_close(case.out, linear_reference(case.x, case.weight, bias))
    case.out.fill_(torch.nan)
    assert linear_add(case.x, case.weight, bias, case.residual, out=case.out) is case.out
    assert_close(case.out, linear_add_reference(case.x, case.weight, bias, case.residual))
    case.out.fill_(torch.nan)
    assert norm_linear(case.x, case.norm, EPS, case.weight, bias, out=case.out) is case.out
    assert_close(case.out, norm_linear_reference(case.x, case.norm, EPS, case.weight, bias))
    assert case.around[:, :8].isnan().all() and case.around[:, num_outputs + 8 :].isnan().all()

    gated = Case(num_rows, num_outputs, num_inputs, device, dtype, halves=2)
    bias = gated.bias if with_bias else None
    assert norm_linear_gated(gated.x, gated.norm, EPS, gated.weight, bias, out=gated.out) is gated.out
    assert_close(gated.out, norm_linear_gated_reference(gated.x, gated.norm, EPS, gated.weight, bias))
    assert gated.around[:, :8].isnan().all() and gated.around[:, num_outputs + 8 :].isnan().all()


@pytest.mark.parametrize("num_rows", [1, 7, 150])
def test_the_residual_may_be_overwritten(num_rows: int, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(num_rows, 72, 264, device, dtype)
    expected = linear_add_reference(case.x, case.weight, case.bias, case.residual)
    assert linear_add(case.x, case.weight, case.bias, case.residual, out=case.residual) is case.residual
    assert_close(case.residual, expected)


@pytest.mark.parametrize("num_rows", [1, 7, 150])
def test_logits_may_be_float32(num_rows: int, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(num_rows, 72, 264, device, dtype)
    logits = norm_linear(case.x, case.norm, EPS, case.weight, out_dtype=torch.float32)
    assert logits.dtype == torch.float32 and logits.shape == (num_rows, 72)
    assert_close(logits.to(dtype), norm_linear_reference(case.x, case.norm, EPS, case.weight))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_float32_weights_take_the_route_of_torch(num_rows: int, device: torch.device) -> None:
    case = Case(num_rows, 24, 40, device, torch.float32)
    assert_close(linear(case.x, case.weight), linear_reference(case.x, case.weight))
    gated = norm_linear_gated(case.x, case.norm, EPS, case.weight)
    assert_close(gated, norm_linear_gated_reference(case.x, case.norm, EPS, case.weight))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_feed_forward_is_its_two_products(in_place: bool, device: torch.device, dtype: torch.dtype) -> None:
    up, down = Case(5, 40, 24, device, dtype, halves=2), Case(5, 24, 40, device, dtype)
    inner = norm_linear_gated(up.x, up.norm, EPS, up.weight, up.bias)
    expected = linear_add(inner, down.weight, down.bias, up.x)
    out = up.x if in_place else down.out
    assert feed_forward_add(up.x, up.norm, EPS, up.weight, up.bias, down.weight, down.bias, out=out) is out
    assert torch.equal(out, expected)


def test_no_rows_give_no_rows(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(0, 24, 40, device, dtype)
    assert linear(case.x, case.weight).shape == (0, 24)
    assert norm_linear_gated(case.x, case.norm, EPS, case.weight).shape == (0, 12)


def _run(tile: Tile, case: Case, *, norm: bool, gated: bool, add: bool, bias: bool) -> None:
    """One product by one kernel, beside its twin."""
    multiply(
        tile,
        case.x,
        case.weight,
        case.out,
        norm=case.norm if norm else None,
        eps=EPS,
        bias=case.bias if bias else None,
        residual=case.residual if add else None,
        gated=gated,
    )
    twin_bias = case.bias if bias else None
    if gated:
        assert norm
        expected = norm_linear_gated_reference(case.x, case.norm, EPS, case.weight, twin_bias)
    elif norm:
        expected = norm_linear_reference(case.x, case.norm, EPS, case.weight, twin_bias)
    else:
        expected = linear_reference(case.x, case.weight, twin_bias)
    assert_close(case.out, expected + case.residual.double() if add else expected)


# More than the table need ever hold, so that a freshly measured one meets nothing new; for every kind
EXTREME_TILES: list[Tile] = [
    MatvecTile(1, 256, 1),
    MatvecTile(16, 512, 8, prefetch_bytes=64, evict_first=True),
    RowsTile(16, 64, 2, 3, num_splits=3),
    RowsTile(16, 64, 2, 4, num_splits=2, prefetch_tile=True, prefetch_bytes=128),
    RowsTile(64, 128, 4, 3, num_splits=64, prefetch_tile=True),
    RowsTile(128, 64, 8, 3, evict_first=True),
]


@pytest.mark.parametrize(
    ("tile", "kinds"),
    [*sorted(KINDS_OF_TILES.items(), key=repr), *((tile, set(Kind)) for tile in EXTREME_TILES)],
    ids=str,
)
def test_every_tile_computes_its_kinds(tile: Tile, kinds: set[Kind], device: torch.device, dtype: torch.dtype) -> None:
    num_rows = [1] if isinstance(tile, MatvecTile) else [2, 19]
    for whole, kind, rows in itertools.product([True, False], sorted(kinds, key=str), num_rows):
        norm, gated = kind is not Kind.PLAIN, kind is Kind.GATED
        # two whole programs and three whole tiles; or a part of a program and of a tile
        outputs = tile.block_o * 2 if whole else tile.block_o + 3
        inputs = tile.block_i * 3 if whole else tile.block_i * 2 + 40
        case = Case(rows, outputs, inputs, device, dtype, halves=2 if gated else 1)
        _run(tile, case, norm=norm, gated=gated, add=not gated, bias=rows != 2)


def test_splits_leave_no_trace_for_the_next_product(device: torch.device, dtype: torch.dtype) -> None:
    """The counters are back at zero, and the sums of a wider product are not taken for those of a narrower one."""
    tile = RowsTile(16, 64, 2, 3, num_splits=4)
    for outputs, inputs in [(80, 512), (16, 256), (80, 512)]:
        _run(tile, Case(5, outputs, inputs, device, dtype), norm=True, gated=False, add=True, bias=False)
        _, arrivals = row_launch.workspace(device if device.type == "cpu" else torch.device("cuda", 0))
        assert not arrivals.any()


def test_splits_give_the_same_bits_every_time(device: torch.device, dtype: torch.dtype) -> None:
    tile = RowsTile(16, 64, 2, 3, num_splits=8)
    case = Case(5, 4096 if ON_GPU else 32, 1024, device, dtype)
    outs = [multiply(tile, case.x, case.weight, torch.empty_like(case.out), norm=case.norm, eps=EPS) for _ in range(5)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("tile", [tile for tile in EXTREME_TILES if isinstance(tile, RowsTile)], ids=str)
def test_a_row_does_not_depend_on_the_others(tile: RowsTile, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(6, 40, 264, device, dtype)
    before = multiply(tile, case.x, case.weight, case.out, norm=case.norm, eps=EPS).clone()
    case.x[:3] = torch.nan
    case.x[4:] *= 100
    after = multiply(tile, case.x, case.weight, case.out, norm=case.norm, eps=EPS)
    assert torch.equal(before[3], after[3])


def test_float16_rows_whose_scaled_entries_pass_its_largest_number_stay_finite(device: torch.device) -> None:
    case = Case(4, 40, 264, device, torch.float16)
    case.x.mul_(8_000)
    case.norm.fill_(20)
    assert_close(
        norm_linear(case.x, case.norm, EPS, case.weight), norm_linear_reference(case.x, case.norm, EPS, case.weight)
    )


def test_the_split_sums_of_any_product_fit_into_their_memory() -> None:
    for tile in [tile for tile in [*KINDS_OF_TILES, *EXTREME_TILES] if isinstance(tile, RowsTile)]:
        for outputs, rows, halves in itertools.product([1, 4096, 150_000], [8, 128], [1, 2]):
            num_tiles = -(-outputs // tile.block_o)
            num_sums = num_tiles * (halves * tile.block_o + 1) * rows
            num_splits, shortest = row_launch.split_inputs(tile.num_splits, tile.block_i, num_tiles, 4096, num_sums)
            assert num_splits == 1 or num_splits * num_sums <= row_launch._MAX_PARTIAL_SUMS
            assert 0 < shortest <= 4096


def test_nothing_outside_the_weight_is_fetched_ahead() -> None:
    weight = torch.empty(4, 64, dtype=torch.float16)
    assert row_launch.prefetchable(weight, 4096, 40) == 80
    assert row_launch.prefetchable(weight, 4096, -24) == 0
    assert row_launch.prefetchable(weight.view(-1)[1:], 4096, 40) == 0


def test_a_shape_takes_the_tile_of_the_nearest_measured_one() -> None:
    for (kind, rows), shapes in HOPPER.items():
        for (outputs, inputs), tile in shapes.items():
            assert choose_tile(kind, rows, outputs, inputs, (9, 0)) == tile
            assert choose_tile(kind, rows, outputs + 8, inputs - 8, (9, 0)) == tile


def test_torch_multiplies_many_rows_and_on_devices_that_nobody_measured() -> None:
    assert choose_tile(Kind.PLAIN, MAX_ROWS + 1, 4096, 4096, (9, 0)) is None
    assert choose_tile(Kind.PLAIN, 8, 4096, 4096, (8, 0)) is None
    assert isinstance(choose_tile(Kind.PLAIN, 1, 4096, 4096, (8, 0)), MatvecTile)


def test_a_table_has_matrix_vector_tiles_for_one_row_only() -> None:
    for (_, rows), shapes in HOPPER.items():
        assert rows & (rows - 1) == 0 and 0 < rows <= MAX_ROWS
        for tile in shapes.values():
            assert rows == 1 or not isinstance(tile, MatvecTile)


def test_a_weight_of_another_width_is_refused(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(3, 24, 40, device, dtype)
    with pytest.raises(AssertionError):
        multiply(RowsTile(16, 64, 2, 3), case.x[:, :32], case.weight, case.out)
