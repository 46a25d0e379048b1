"""Products of 17 to 128 rows in CUDA C++: what the numbers that the weights stand for give, in float64.

On a GPU as they are; here the same source, compiled for the processor: instructions.h has what it asks of a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pytest
import torch

from autobot_llm.engine.kernels.gpu.arrange import arrange
from autobot_llm.engine.kernels.gpu.block_tiles import (
    BlockTile,
    choose_block_tile,
    filled,
    shared_bytes,
)
from autobot_llm.engine.kernels.gpu.linear import (
    feed_forward_add,
    linear_add,
    linear_reference,
    norm_linear_gated,
)
from autobot_llm.engine.kernels.gpu.stream_tiles import Format
from autobot_llm.engine.kernels.gpu.streamed_blocks import (
    MAGIC,
    X_COPY_BYTES,
    block_tile_for,
    multiply_blocks,
    prepare,
    rounds,
)
from autobot_llm.engine.quantization.packed import PackedWeight
from autobot_llm.engine.quantization.rounding import round_activations
from tests.kernels.test_streamed import MULTIPROCESSOR_BYTES, Box, check_chain, compile_for_processor, weight_of

Multiply: TypeAlias = Callable[..., torch.Tensor]

EPS = 1e-5
DTYPE = torch.bfloat16
GPU = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["int8", "fp8", "int4", "int4 with zeros", "int8, rounded", "fp8, rounded"]
FORMATS = {"int8": Format.INT8, "fp8": Format.FLOAT8, "int4": Format.INT4, "int4 with zeros": Format.INT4}
# whole tiles for every multiprocessor, and a few
SHAPES = [(6144, 4096), (14336, 4096), (4096, 14336), (256, 512)]


def check(
    kind: str, shape: tuple[int, int], rows: int, what: str, multiply: Multiply, *, group: int = 128, device: str = GPU
) -> None:
    stored, rounded = kind.removesuffix(", rounded"), kind.endswith(", rounded")
    gated, num_inputs = what.startswith("gated"), shape[1]
    weight = weight_of(stored, shape[0] * (2 if gated else 1), num_inputs, group=group, device=device)
    assert isinstance(weight, PackedWeight)
    generator = torch.Generator().manual_seed(rows)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(DTYPE).to(device)

    x = random(rows, num_inputs + 24)[:, 8 : num_inputs + 8]
    norm = 1 + 0.3 * random(num_inputs) if gated or what == "norm" else None
    bias = random(weight.num_outputs) if rows % 2 else None
    around = torch.full((rows, shape[0] + 16), torch.nan, dtype=DTYPE, device=device)
    out = around[:, 8 : shape[0] + 8]
    residual = random(rows, shape[0]) if what == "add" else None
    if residual is not None:
        out.copy_(residual)
    multiply(
        x, weight, out, norm=norm, eps=EPS, bias=bias, residual=None if residual is None else out, gated=gated,
        rounded=rounded,
    )  # fmt: skip
    wide = x.float()
    if norm is not None:
        wide = normed_rows(x, norm)
    if rounded:
        values, scales = round_activations(wide, cast(Literal["int8", "fp8"], stored))
        wide = values.float() * scales
    elif norm is not None and "4" not in kind:
        wide = wide.to(DTYPE).float()
    expected = linear_reference(wide, weight.dequantized(torch.float32), bias)
    if gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    elif residual is not None:
        expected += residual.double()
    error = float((out.double() - expected).norm() / expected.norm())
    bound = 5e-3 if kind == "fp8, rounded" else 4e-3  # a sum of float8 products on the units has fewer bits
    assert error < bound, f"{kind}, {what}, {rows} rows of {shape}: relative error {error:.2e}"
    assert around[:, :8].isnan().all() and around[:, shape[0] + 8 :].isnan().all()


# --- x in the kernel's order --------------------------------------------------------------------------------------


def arranged_reference(x: torch.Tensor) -> torch.Tensor:
    """Numbers of x where `arrange` says they are."""
    # [rows, 64 inputs, thread, its words of W, two even and two odd bytes of each]
    words = x.unflatten(1, (-1, 4, 4, 2, 2))
    return words.permute(0, 1, 3, 5, 2, 4).reshape(x.shape)


@pytest.mark.parametrize("normed", [False, True])
def test_every_number_is_where_the_matrix_units_look_for_it(normed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(19, 1088 + 24, generator=generator).to(DTYPE).to(GPU)[:, 8:1096]
    norm = torch.rand(1088, generator=generator).to(DTYPE).to(GPU) if normed else None
    numbers = x if norm is None else normed_rows(x, norm).to(DTYPE)
    found, wanted = arrange(x, norm, EPS).float(), arranged_reference(numbers).float()
    torch.testing.assert_close(found, wanted, rtol=2**-7 if normed else 0, atol=0)  # the interpreter cuts bits off


def normed_rows(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * norm.float()


# --- on the processor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "rows", "what", "tile", "group"),
    [
        ("int8, rounded", (256, 512), 20, "add", BlockTile(2, 4, 128, 2), 128),  # four programs share the inputs
        ("fp8, rounded", (256, 384), 33, "gated", BlockTile(2, 1, 128, 2), 128),  # one program, stages used again
        ("int8, rounded", (64, 256), 65, "gated", BlockTile(1, 1, 128, 3), 128),  # more stages than a tile has
        ("int8", (128, 256), 19, "norm", BlockTile(1, 2, 128, 3), 128),
        ("fp8", (128, 256), 32, "gated", BlockTile(1, 1, 64, 6), 128),  # more stages than a tile has
        ("int4", (256, 1024), 17, "gated", BlockTile(4, 1, 64, 3), 128),
        ("int4 with zeros", (256, 1024), 65, "add", BlockTile(2, 2, 64, 3), 64),
        ("int4 with zeros", (128, 1024), 32, "norm", BlockTile(2, 4, 128, 2), 128),
        ("int4 with zeros", (128, 512), 70, "gated", BlockTile(2, 1, 128, 2, rows=64), 128),  # two tiles of x
        ("int4", (256, 1024), 127, "add", BlockTile(2, 2, 128, 2, rows=64), 128),
        ("int4 with zeros", (128, 1536), 40, "add", BlockTile(2, 2, 128, 4, turns=2), 128),  # stages in turns
        ("int4", (128, 512), 9, "gated", BlockTile(1, 1, 128, 3), 128),
        ("int8", (128, 512), 16, "add", BlockTile(2, 1, 128, 4, turns=2), 128),
        ("int4", (128, 512), 128, "gated", BlockTile(2, 1, 128, 2), 128),  # a warpgroup copies
        ("int4", (256, 512), 33, "gated, arranged", BlockTile(2, 1, 128, 3), 128),
        ("int8, rounded", (192, 256), 20, "arranged", BlockTile(1, 1, 128, 3), 128),
    ],
)
def test_the_same_source_computes_the_same_on_a_processor(
    kind: str, shape: tuple[int, int], rows: int, what: str, tile: BlockTile, group: int, tmp_path: Path
) -> None:
    def multiply(
        x: torch.Tensor,
        weight: PackedWeight,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None,
        eps: float,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        gated: bool,
        rounded: bool,
    ) -> None:
        wide, x_scales = x.float() if norm is None else normed_rows(x, norm), None
        if rounded:
            numbers, x_scales = round_activations(wide, cast(Literal["int8", "fp8"], kind.removesuffix(", rounded")))
        else:
            numbers = arranged_reference(wide.to(DTYPE))
        prepared = prepare(
            tile, x_scales, weight, out, bias=bias, residual=residual, gated=gated, arranges=what.endswith("arranged")
        )
        library = compile_for_processor(prepared.constants, tmp_path, "streamed_blocks.cu")
        values, row_bytes = weight.values, numbers.shape[1] * numbers.element_size()
        w = Box(values.data_ptr(), *values.shape, values.stride(0), tile.weight_rows // 2, tile.segment)
        x_box = Box(numbers.data_ptr(), rows, row_bytes, row_bytes, tile.tile_rows(rows), X_COPY_BYTES)
        size = ctypes.c_uint64(prepared.shared_bytes)
        given = (ctypes.byref(w), ctypes.byref(x_box), ctypes.byref(prepared.arguments))
        is_inside = library.run(*given, MAGIC, prepared.num_tiles * tile.parts, size)
        assert is_inside, "a copy that is not aligned, or leaves its memory"
        if what.endswith("arranged"):  # so that they are compared in the order of the weight's rows
            words = out.unflatten(1, (-1, 4, 2, 4, 2))
            out.copy_(words.permute(0, 1, 4, 2, 5, 3).reshape(out.shape))

    check(kind, shape, rows, what, cast(Multiply, multiply), group=group, device="cpu")


# --- on a GPU -----------------------------------------------------------------------------------------------------


def multiply_as_chosen(
    x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, *, rounded: bool, **named: Any
) -> None:
    if rounded:
        weight = replace(weight, activations="int8" if weight.values.dtype == torch.int8 else "fp8")
        assert rounds(weight, x.shape[0])
    tile = block_tile_for(x, weight, out)
    assert tile is not None
    multiply_blocks(tile, x, weight, out, **named)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["plain", "norm", "add", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_numbers_the_weights_stand_for(kind: str, what: str) -> None:
    for shape in SHAPES:
        for rows in (17, 32, 64, 127) if kind.endswith("rounded") else (9, 16, 17, 32, 64, 127):
            check(kind, shape, rows, what, cast(Multiply, multiply_as_chosen))
    if "4" in kind:
        check(kind, (256, 1280), 40, what, cast(Multiply, multiply_as_chosen), group=64)


@pytest.mark.gpu
def test_a_chain_of_products_in_a_graph_gives_what_one_after_the_other_does() -> None:
    """Kernels begin before the ones whose output they read have ended."""
    torch.manual_seed(0)
    up, down = weight_of("int8", 2 * 2048, 1024), weight_of("int8", 1024, 2048)
    assert isinstance(up, PackedWeight) and isinstance(down, PackedWeight)
    norm = torch.ones(1024, dtype=DTYPE, device="cuda")
    start = torch.randn(40, 1024, device="cuda").to(DTYPE)
    inner = torch.empty(40, 2048, dtype=DTYPE, device="cuda")
    check_chain(
        start,
        lambda hidden: multiply_as_chosen(hidden, up, inner, rounded=True, norm=norm, eps=EPS, gated=True),
        lambda hidden: multiply_as_chosen(inner, down, hidden, rounded=True, residual=hidden),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("int4", "int4 with zeros"), ("int8", "int4"), ("int8, rounded", "int8, rounded")])
def test_what_lies_between_two_products_lies_as_the_second_wants_it(kinds: tuple[str, str]) -> None:
    """Bit for bit what they give one after the other, with x as an operator gets it."""
    torch.manual_seed(0)
    weights = []
    for kind, shape in zip(kinds, ((2 * 2048, 1024), (1024, 2048)), strict=True):
        weight = cast(PackedWeight, weight_of(kind.removesuffix(", rounded"), *shape))
        weights.append(replace(weight, activations="int8") if kind.endswith(", rounded") else weight)
    norm, bias = torch.rand(1024, device="cuda").to(DTYPE), torch.randn(1024, device="cuda").to(DTYPE)
    for rows in (1, 9, 16, 32, 100, 128, 130):
        x = torch.randn(rows, 1024, device="cuda").to(DTYPE)
        inner = norm_linear_gated(x, norm, EPS, weights[0])
        expected = linear_add(inner, weights[1], bias, x)
        found = feed_forward_add(x, norm, EPS, weights[0], None, weights[1], bias, out=torch.empty_like(x))
        assert torch.equal(found, expected), f"{kinds}, {rows} rows"


# --- tiles --------------------------------------------------------------------------------------------------------


def test_few_rows_stay_whole_whatever_the_scheme_allows() -> None:
    weight = replace(cast(PackedWeight, weight_of("int8", 64, 128, device="cpu")), activations="int8")
    assert not rounds(weight, 16) and rounds(weight, 17)
    assert not rounds(replace(weight, activations=None), 17)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_fits_a_multiprocessor(kind: str, rows: int) -> None:
    stored, rounded = kind.removesuffix(", rounded"), kind.endswith(", rounded")
    fmt, offsets = FORMATS[stored], "zeros" in kind
    for outputs, inputs in SHAPES:
        row_bytes, group = (inputs // 2, 128) if fmt is Format.INT4 else (inputs, 0)
        tile = choose_block_tile(rows, outputs, row_bytes, fmt, rounded=rounded, offsets=offsets, group=group)
        assert tile is not None and tile.num_stages >= 2
        used = shared_bytes(tile, rows, fmt, rounded=rounded, offsets=offsets)
        assert (used + 1024) * tile.resident <= MULTIPROCESSOR_BYTES
        assert filled(tile, rows, fmt, rounded=rounded, offsets=offsets) == tile


def test_other_products_are_left_to_other_kernels() -> None:
    assert choose_block_tile(8, 4096, 4096, Format.INT8) is None
    assert choose_block_tile(129, 4096, 4096, Format.INT8) is None
    assert choose_block_tile(32, 4096 + 64, 4096, Format.INT8) is None
    assert choose_block_tile(32, 4096, 4096 + 64, Format.INT8) is None
