"""Products of few rows in CUDA C++: what the numbers that the weights stand for give, in float64.

On a GPU as they are; here the same source, compiled for the processor: instructions.h has what it asks of a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from autobot_llm.engine.kernels.gpu import nvrtc, streamed
from autobot_llm.engine.kernels.gpu.linear import linear_reference, norm_linear_gated_reference
from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.scaled_rows import scale_rows_reference
from autobot_llm.engine.kernels.gpu.stream_tiles import TABLES, Format, StreamTile, choose_stream_tile
from autobot_llm.engine.kernels.gpu.streamed import (
    INT4_MAGIC,
    MULTIPROCESSOR_BYTES,
    SYSTEM_BYTES,
    fitting,
    multiply_streamed,
    prepare,
    rows_for,
    shared_bytes,
    why_not_streamed,
)
from autobot_llm.engine.kernels.gpu.tiles import Kind
from autobot_llm.engine.quantization.packed import PackedWeight
from tests.kernels.test_quantized import random_weight

Multiply: TypeAlias = Callable[..., torch.Tensor]

EPS = 1e-5
DTYPE = torch.bfloat16
# outputs, inputs: whole stages; more tiles than programs; a part of a stage; less than one
SHAPES = [(6144, 4096), (14336, 1024), (4096, 14336), (96, 1792), (32, 256)]
ROWS = [(1,), (2, 5, 8)]  # those that the kernel makes equal room for, together
KINDS = ["bf16", "int8", "fp8", "int4", "int4 with zeros"]


def all_tiles(fmt: Format) -> set[StreamTile]:
    return {tile for _, shapes in TABLES[fmt] for of_kind in shapes.values() for tile in of_kind.values()}


def fmt_of(kind: str) -> Format:
    return {"bf16": Format.BF16, "int8": Format.INT8, "fp8": Format.FLOAT8}.get(kind, Format.INT4)


def weight_of(
    kind: str, num_outputs: int, num_inputs: int, *, group: int = 128, device: str = "cuda"
) -> torch.Tensor | PackedWeight:
    if kind != "bf16":
        return random_weight(kind, num_outputs, num_inputs, DTYPE, torch.device(device), group=group)
    generator = torch.Generator(device).manual_seed(num_outputs)
    return (torch.randn(num_outputs, num_inputs, generator=generator, device=device) * num_inputs**-0.5).to(DTYPE)


def numbers_of(weight: torch.Tensor | PackedWeight) -> torch.Tensor:
    return weight.double() if isinstance(weight, torch.Tensor) else weight.dequantized(torch.float64)


def check(
    tile: StreamTile, weight: torch.Tensor | PackedWeight, rows: int, what: str, multiply: Multiply = multiply_streamed
) -> None:
    numbers = numbers_of(weight)
    num_outputs, num_inputs = numbers.shape[0] // (2 if what == "gated" else 1), numbers.shape[1]
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DTYPE).to(numbers.device)

    x = random(rows, num_inputs + 24)[:, 8 : num_inputs + 8]
    bias = random(numbers.shape[0]) if rows % 2 else None
    around = torch.full((rows, num_outputs + 16), torch.nan, dtype=DTYPE, device=numbers.device)
    out = around[:, 8 : num_outputs + 8]
    residual = random(rows, num_outputs) if what == "add" else None
    if residual is not None:
        out.copy_(residual)
    norm = random(num_inputs) if what == "gated" else None
    residual_out = None if residual is None else out
    multiply(tile, x, weight, out, norm=norm, eps=EPS, bias=bias, residual=residual_out, gated=what == "gated")
    normed = x if norm is None else x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * norm
    expected = linear_reference(normed, numbers, bias)
    if what == "gated":
        gate, up = expected.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    elif residual is not None:
        expected += residual.double()
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < 4e-3, f"{what}, {rows} rows: relative error {error:.2e}"
    assert around[:, :8].isnan().all() and around[:, num_outputs + 8 :].isnan().all()


# --- on the processor ---------------------------------------------------------------------------------------------


class Box(ctypes.Structure):
    """`Matrix` of instructions.h."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("num_rows", "row_bytes", "stride", "box_rows", "box_bytes")),
        ("unused", ctypes.c_uint64 * 10),
    )


def box_of(of_groups: torch.Tensor, groups: int) -> Box:
    """Numbers of 16 bits of so many groups and 16 outputs."""
    num_groups, num_outputs = of_groups.shape
    return Box(of_groups.data_ptr(), num_groups, 2 * num_outputs, 2 * num_outputs, groups, 32)


def compile_for_processor(constants: dict[str, int], folder: Path, name: str = "streamed_rows.cu") -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / "streamed.so"
    source = f'-DSOURCE="{Path(nvrtc.__file__).with_name(name)}"'
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w", source]
    options += [f"-D{name}={number}" for name, number in constants.items()]
    header = str(Path(__file__).with_name("instructions.h"))
    subprocess.run([compiler, *options, "-x", "c++", header, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("kind", "num_outputs", "num_inputs", "rows", "what", "tile", "group"),
    [
        ("bf16", 96, 832, 5, "add", StreamTile(8, 1024, 3, 2), 128),  # the last stage is a part of one
        ("int8", 96, 1664, 1, "plain", StreamTile(4, 1024, 2, 1, x_stays=True), 128),  # the ring goes round
        ("int8", 64, 1280, 8, "gated", StreamTile(4, 512, 2, 1), 128),  # two tiles of columns of x
        ("fp8", 64, 1280, 1, "gated", StreamTile(4, 512, 6, 1, x_stays=True), 128),  # fewer stages than the ring has
        ("int4", 64, 2304, 2, "plain", StreamTile(4, 1024, 2, 2), 128),
        ("int8", 128, 512, 6, "plain", StreamTile(4, 512, 2, 4), 128),  # more rows of W than a warp has threads
        ("int4", 64, 1024, 5, "gated", StreamTile(4, 512, 2, 4), 128),  # two blocks of each half
        ("int4", 64, 1536, 1, "gated", StreamTile(4, 512, 2, 2, x_stays=True), 128),
        ("int4", 64, 5120, 8, "plain", StreamTile(4, 512, 2, 2, x_stays=True), 128),  # x stays, and was scaled before
        ("fp8", 64, 1792, 3, "gated", StreamTile(4, 512, 2, 2, x_stays=True), 128),  # every program scales all rows
        ("int8", 64, 1536, 1, "add", StreamTile(8, 1024, 2, 2, x_stays=True), 128),  # more warps than groups
        ("int4", 128, 4096, 5, "plain", StreamTile(4, 512, 2, 4), 128),
        ("int4 with zeros", 96, 1280, 3, "add", StreamTile(4, 512, 2, 1), 64),
        ("int4 with zeros", 64, 2304, 7, "gated", StreamTile(4, 1024, 2, 2), 128),
    ],
)
def test_the_same_source_computes_the_same_on_a_processor(
    kind: str,
    num_outputs: int,
    num_inputs: int,
    rows: int,
    what: str,
    tile: StreamTile,
    group: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streamed, "scale_rows", scale_rows_reference)  # where there is a GPU, Triton wants to have it

    def multiply(
        tile: StreamTile,
        x: torch.Tensor,
        weight: torch.Tensor | PackedWeight,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gated: bool = False,
    ) -> torch.Tensor:
        tile = fitting(tile, weight, rows, gated=gated)
        of_x = rows_for(tile, weight, x, norm, eps)
        prepared = prepare(tile, of_x, weight, out, bias=bias, residual=residual, gated=gated)
        library = compile_for_processor(prepared.constants, tmp_path)
        size = ctypes.c_uint64(prepared.shared_bytes)
        assert prepared.num_tiles > 1, "one program is to compute several"
        maps = [Box(), Box()]
        if isinstance(weight, PackedWeight) and weight.group:
            groups = 2 * tile.segment // weight.group
            maps = [
                box_of(one, groups)
                for one in (weight.scales, weight.scales if weight.offsets is None else weight.offsets)
            ]
        programs = prepared.num_tiles // 2
        is_inside = library.run(*map(ctypes.byref, maps), ctypes.byref(prepared.arguments), INT4_MAGIC, programs, size)
        assert is_inside, "a copy that is not aligned, or leaves its memory"
        return out

    num_rows = num_outputs * (2 if what == "gated" else 1)
    check(tile, weight_of(kind, num_rows, num_inputs, group=group, device="cpu"), rows, what, multiply)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_number_that_is_none_is_seen_in_every_output(kind: str, tmp_path: Path) -> None:
    """Which programs scale themselves."""
    tile, weight = StreamTile(4, 512, 2, 2, resident=1, x_stays=True), weight_of(kind, 64, 512, device="cpu")
    x, out = torch.ones(1, 512, dtype=DTYPE), torch.empty(1, 64, dtype=DTYPE)
    prepared = prepare(tile, rows_for(tile, weight, x), weight, out)
    library, size = compile_for_processor(prepared.constants, tmp_path), ctypes.c_uint64(prepared.shared_bytes)
    for value in (1.0, torch.inf, torch.nan):
        x[0, 200] = value
        maps = map(ctypes.byref, (Box(), Box()))
        assert library.run(*maps, ctypes.byref(prepared.arguments), INT4_MAGIC, 2, size)
        assert bool(out.isfinite().all()) if value == 1.0 else not bool(out.isfinite().any())


def test_a_norm_that_no_whole_load_reads_is_left_to_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "scale_rows", scale_rows_reference)
    tile, weight = StreamTile(4, 512, 2, 2, resident=1, x_stays=True), weight_of("int8", 64, 512, device="cpu")
    x, norm = torch.ones(1, 512, dtype=DTYPE), torch.ones(513, dtype=DTYPE)
    assert rows_for(tile, weight, x, norm[:512], EPS).scales is None
    scaled = rows_for(tile, weight, x, norm[1:], EPS)
    assert scaled.scales is not None and scaled.norm is None
    prepared = prepare(tile, scaled, weight, torch.empty(1, 64, dtype=DTYPE))
    assert not prepared.constants["SCALES_X"] and not prepared.constants["NORM"]


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["plain", "add", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_numbers_the_weights_stand_for(kind: str, what: str) -> None:
    tiles = sorted(all_tiles(fmt_of(kind)), key=repr)
    for i, (num_outputs, num_inputs) in enumerate(SHAPES):
        weight = weight_of(kind, num_outputs * (2 if what == "gated" else 1), num_inputs)
        for j, several_rows in enumerate(ROWS):  # a tile for each of them: all of a kind share one compilation
            tile = tiles[(len(ROWS) * i + j) % len(tiles)]
            for rows in several_rows:
                check(tile, weight, rows, what)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_of_the_table_works_for_every_number_of_rows(kind: str) -> None:
    weight = weight_of(kind, 4096, 2048)
    for tile, rows in itertools.product(all_tiles(fmt_of(kind)), itertools.chain(*ROWS)):
        check(tile, weight, rows, "plain")


@pytest.mark.gpu
def test_groups_may_be_smaller() -> None:
    for kind in ("int4", "int4 with zeros"):
        check(StreamTile(4, 1024, 3, 1), weight_of(kind, 96, 1280, group=64), 3, "plain")


@pytest.mark.gpu
def test_every_8_bit_number_is_multiplied_as_itself() -> None:
    numbers = torch.arange(-127, 128, device="cuda").repeat(17)[:4096]
    for values in (numbers.to(torch.int8), torch.arange(256, dtype=torch.uint8, device="cuda").repeat(16)):
        stored = values if values.dtype == torch.int8 else values.view(torch.float8_e4m3fn)
        stored = torch.where(stored.float().isnan(), torch.zeros_like(stored.float()), stored.float()).to(stored.dtype)
        rows = stored.repeat(32, 1).contiguous()
        weight = PackedWeight(rows, torch.ones(32, device="cuda"), 4096)
        x = torch.zeros(8, 4096, dtype=DTYPE, device="cuda")
        for first in range(0, 4096, 8):  # one number of W at a time
            x.zero_()
            x[torch.arange(8), first + torch.arange(8)] = 1
            out = torch.empty(8, 32, dtype=DTYPE, device="cuda")
            multiply_streamed(StreamTile(8, 1024, 5, 1), x, weight, out)
            assert torch.equal(out, stored[first : first + 8].to(DTYPE)[:, None].expand(8, 32))
            if first == 256 and values.dtype == torch.int8:
                break


def check_chain(start: torch.Tensor, *products: Callable[[torch.Tensor], object]) -> None:
    """Products that change their argument give, 40 times in a row in a graph, what they give one after the other."""
    hidden = torch.empty_like(start)

    def chain(*, wait: bool) -> None:
        hidden.copy_(start)
        for _ in range(40):
            for one in products:
                one(hidden)
                if wait:
                    torch.cuda.synchronize()

    chain(wait=True)
    expected = hidden.clone()
    assert bool(expected.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(wait=False)
    for _ in range(20):
        graph.replay()
        assert torch.equal(hidden, expected)


@pytest.mark.gpu
def test_a_chain_of_products_in_a_graph_gives_what_one_after_the_other_does() -> None:
    """Kernels begin before the ones whose output they read have ended."""
    torch.manual_seed(0)
    up = weight_of("int8", 2 * 2048, 1024)
    down = weight_of("int8", 1024, 2048)
    norm = torch.ones(1024, dtype=DTYPE, device="cuda")
    tile = StreamTile(4, 1024, 5, 1, x_stays=True)
    wide = StreamTile(8, 1024, 2, 2)
    start = torch.randn(1, 1024, device="cuda").to(DTYPE)
    inner = torch.empty(1, 2048, dtype=DTYPE, device="cuda")
    check_chain(
        start,
        lambda hidden: multiply_streamed(wide, rms_norm(hidden, norm, EPS), up, inner, gated=True),
        lambda hidden: multiply_streamed(tile, inner, down, hidden, residual=hidden),
    )
    first = norm_linear_gated_reference(start, norm, EPS, numbers_of(up))
    multiply_streamed(wide, rms_norm(start, norm, EPS), up, inner, gated=True)
    assert float((inner.double() - first).norm() / first.norm()) < 8e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_other_kernels_are_taken() -> None:
    x, weight = torch.zeros(1, 256, dtype=DTYPE), torch.zeros(32, 256, dtype=DTYPE)
    assert why_not_streamed(x, weight, DTYPE) == "no Hopper GPU"
    assert why_not_streamed(torch.zeros(9, 256, dtype=DTYPE), weight, DTYPE) == "9 rows, not 1 to 8"


@pytest.mark.parametrize("fmt", list(Format))
def test_a_tile_fits_a_multiprocessor_as_often_as_it_says(fmt: Format) -> None:
    for most_rows, shapes in TABLES[fmt]:
        for tile in {tile for of_kind in shapes.values() for tile in of_kind.values()}:
            bare = replace(tile, x_stays=False)  # which x does where there is no room for it
            size = shared_bytes(bare, fmt, 128, 4096, most_rows, offsets=False)
            assert (size + SYSTEM_BYTES) * tile.resident <= MULTIPROCESSOR_BYTES, f"{tile}: {size} bytes"
            assert tile.segment % (64 * tile.num_warps) == 0
            assert fmt is not Format.INT4 or tile.segment // tile.num_warps % 128 == 0


def test_few_rows_are_left_to_other_kernels_where_those_are_as_fast() -> None:
    assert choose_stream_tile(Kind.PLAIN, 1, 4096, 4096, Format.BF16) is None
    assert choose_stream_tile(Kind.PLAIN, 2, 4096, 4096, Format.BF16) is not None
    assert choose_stream_tile(Kind.PLAIN, 9, 4096, 4096, Format.BF16) is None
    assert choose_stream_tile(Kind.PLAIN, 1, 4096, 4096, Format.INT8) is not None
    assert choose_stream_tile(Kind.PLAIN, 9, 4096, 4096, Format.INT8) is None
