"""The decoder's products of few rows on a GPU: every candidate tile, checked, timed, beside torch.

Times chains of launches in CUDA graphs, each launch with another layer's weights, as a step runs them; then whole
steps (32 layers and the head, products only). Prints the table for engine/kernels/gpu/tiles.py, ready to paste.

    python benchmarks/linear_gpu.py --out linear.json
    python benchmarks/linear_gpu.py --quick --rows 1,16      # two shapes
    python benchmarks/linear_gpu.py --steps-only             # the table as it is
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from linear_candidates import candidates

from autobot_llm.engine.kernels.gpu.linear import (
    linear_add,
    multiply,
    norm_linear,
    norm_linear_gated,
    product,
)
from autobot_llm.engine.kernels.gpu.tiles import HOPPER, Kind, MatvecTile, Tile

READ_BANDWIDTH = 4.63e12  # bytes a second, measured on an H200
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
NUM_LAYERS = 32
EPS = 1e-5
DTYPE = torch.bfloat16
CHAIN_SECONDS = 4e-4  # of one graph, so that its own launch does not count
MIN_CHAIN_BYTES = 250e6  # several times the second-level cache


@dataclass(frozen=True, slots=True)
class Shape:
    """One product of a decode step; the outputs of a gated one are those of one half of its weight."""

    name: str
    kind: Kind
    num_outputs: int
    num_inputs: int
    per_step: int
    adds: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.num_outputs * (2 if self.kind is Kind.GATED else 1), self.num_inputs)

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.weight_shape)


SHAPES = (
    Shape("qkv", Kind.NORM, 6144, 4096, NUM_LAYERS),
    Shape("o", Kind.PLAIN, 4096, 4096, NUM_LAYERS, adds=True),
    Shape("gate_up", Kind.GATED, 14336, 4096, NUM_LAYERS),
    Shape("down", Kind.PLAIN, 4096, 14336, NUM_LAYERS, adds=True),
    Shape("head", Kind.NORM, 32000, 4096, 1),
)


# --- operands ---------------------------------------------------------------------------------------------------------


class Operands:
    """Weights of every layer, and rows to multiply them with."""

    def __init__(self, shapes: tuple[Shape, ...]) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.manual_seed(0)
        self.weights = {shape: [self._weight(shape) for _ in range(_num_copies(shape))] for shape in shapes}
        self.norms = {inputs: 1 + 0.3 * self._random(inputs) for inputs in {shape.num_inputs for shape in shapes}}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=DTYPE)

    def _weight(self, shape: Shape) -> torch.Tensor:
        return self._random(*shape.weight_shape).mul_(shape.num_inputs**-0.5)

    def x(self, shape: Shape, num_rows: int) -> torch.Tensor:
        return self._random(num_rows, shape.num_inputs)

    def out(self, shape: Shape, num_rows: int) -> torch.Tensor:
        return torch.full((num_rows, shape.num_outputs), math.nan, device=self.device, dtype=DTYPE)


def _num_copies(shape: Shape) -> int:
    return shape.per_step if shape.per_step > 1 else math.ceil(3 * MIN_CHAIN_BYTES / shape.num_bytes)


def reference(
    shape: Shape, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """The product in float32, whose rounding is far below that of the operands."""
    wide = x.float()
    if shape.kind is not Kind.PLAIN:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm.float()
    y = wide @ weight.float().t()
    if shape.kind is Kind.GATED:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return y + residual.float() if shape.adds else y


# --- timing -----------------------------------------------------------------------------------------------------------


def graph_seconds(launches: Callable[[], None], repeats: int = 15) -> float:
    """Median seconds of one replay of a graph of these launches, which have run once before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launches()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(milliseconds) / 1e3


@dataclass(frozen=True, slots=True)
class Timing:
    """One way to compute one product: `tile` None is torch with the small kernels around it."""

    shape: Shape
    num_rows: int
    tile: Tile | None
    seconds: float
    relative_error: float
    fault: str = ""

    def as_json(self) -> dict[str, Any]:
        tile = None if self.tile is None else {"class": type(self.tile).__name__, **asdict(self.tile)}
        return {
            "shape": self.shape.name,
            "rows": self.num_rows,
            "tile": tile,
            "us": round(self.seconds * 1e6, 3) if not self.fault else None,
            "gb_per_s": round(self.shape.num_bytes / self.seconds / 1e9, 1) if not self.fault else None,
            "relative_error": self.relative_error if not self.fault else None,
            "fault": self.fault,
        }


def measure(operands: Operands, shape: Shape, num_rows: int, tiles: list[Tile]) -> list[Timing]:
    """Every tile, and torch, on the same rows; what is wrong or cannot run is reported, not timed."""
    x, out = operands.x(shape, num_rows), operands.out(shape, num_rows)
    residual, norm = operands.out(shape, num_rows).normal_(), operands.norms[shape.num_inputs]
    weights = operands.weights[shape]
    expected = reference(shape, x, norm, weights[0], residual)
    least = max(CHAIN_SECONDS * READ_BANDWIDTH, MIN_CHAIN_BYTES)
    num_launches = max(math.ceil(least / shape.num_bytes), len(weights) if shape.per_step == 1 else 4)
    chain = [weights[index % len(weights)] for index in range(num_launches)]
    timings = []
    for tile in [None, *tiles]:

        def run(weight: torch.Tensor, tile: Tile | None = tile) -> None:
            product(
                tile,
                x,
                weight,
                out,
                norm=None if shape.kind is Kind.PLAIN else norm,
                eps=EPS,
                residual=residual if shape.adds else None,
                gated=shape.kind is Kind.GATED,
            )

        def launches(run: Callable[[torch.Tensor], None] = run) -> None:
            for weight in chain:
                run(weight)

        seconds, error, fault = math.inf, math.nan, ""
        try:
            out.fill_(math.nan)
            run(weights[0])
            error = float((out.float() - expected).norm() / expected.norm())
            if error < 1e-2:  # NaN is not
                seconds = graph_seconds(launches)
            else:
                fault = f"wrong: relative error {error:.2e}"
        except Exception as exc:  # a tile too large for the device is a row of the report
            fault = f"{type(exc).__name__}: {str(exc)[:150]}"
        timings.append(Timing(shape, num_rows, tile, seconds / num_launches, error, fault))
    return timings


def torch_product_seconds(operands: Operands, shape: Shape, num_rows: int) -> float:
    """torch.mm alone, without what surrounds it."""
    x, weights = operands.x(shape, num_rows), operands.weights[shape][:8]
    out = torch.empty((num_rows, shape.weight_shape[0]), device=x.device, dtype=DTYPE)
    repeats = max(1, math.ceil(CHAIN_SECONDS * READ_BANDWIDTH / shape.num_bytes / len(weights)))

    def launches() -> None:
        for weight in weights * repeats:
            torch.mm(x, weight.t(), out=out)

    launches()
    return graph_seconds(launches) / (len(weights) * repeats)


def step_seconds(operands: Operands, num_rows: int, *, by_torch: bool) -> float:
    """All the products of one decode step, by the operators with the table in use, or by torch.mm alone."""
    qkv, o, gate_up, down, head = SHAPES
    weights, norm = operands.weights, operands.norms[qkv.num_inputs]
    x, logits = operands.x(qkv, num_rows), torch.empty((num_rows, head.num_outputs), device=operands.device)
    hidden, act, qkv_out = operands.out(o, num_rows), operands.out(gate_up, num_rows), operands.out(qkv, num_rows)
    gate_up_out = torch.empty((num_rows, gate_up.weight_shape[0]), device=operands.device, dtype=DTYPE)
    logits_half = logits.to(DTYPE)

    def ours() -> None:
        hidden.copy_(x)
        for layer in range(NUM_LAYERS):
            norm_linear(hidden, norm, EPS, weights[qkv][layer], out=qkv_out)
            linear_add(qkv_out[:, : o.num_inputs], weights[o][layer], None, hidden, out=hidden)
            norm_linear_gated(hidden, norm, EPS, weights[gate_up][layer], out=act)
            linear_add(act, weights[down][layer], None, hidden, out=hidden)
        norm_linear(hidden, norm, EPS, weights[head][0], out=logits)

    def torchs() -> None:
        for layer in range(NUM_LAYERS):
            torch.mm(x, weights[qkv][layer].t(), out=qkv_out)
            torch.mm(x, weights[o][layer].t(), out=hidden)
            torch.mm(x, weights[gate_up][layer].t(), out=gate_up_out)
            torch.mm(gate_up_out[:, : down.num_inputs], weights[down][layer].t(), out=hidden)
        torch.mm(x, weights[head][0].t(), out=logits_half)

    launches = torchs if by_torch else ours
    launches()
    seconds = graph_seconds(launches)
    assert by_torch or not logits.isnan().any()
    return seconds


# --- compiling ahead, in processes, so that the device does not wait --------------------------------------------------


def compile_ahead(shapes: tuple[Shape, ...], rows: tuple[int, ...], tiles: dict[tuple[Kind, int], list[Tile]]) -> float:
    """Fill Triton's cache on disk with every kernel of the sweep; returns the seconds that took."""
    started = time.perf_counter()
    jobs = [(shape, n, tile) for shape in shapes for n in rows for tile in tiles[shape.kind, n]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as pool:
        for _ in pool.map(_compile, jobs, chunksize=4):
            pass
    return time.perf_counter() - started


def _compile(job: tuple[Shape, int, Tile]) -> None:
    shape, num_rows, tile = job
    operands = Operands(())
    x, out, weight = operands.x(shape, num_rows), operands.out(shape, num_rows), operands._weight(shape)
    fold = shape.kind is not Kind.PLAIN and tile.fold_norm
    try:
        multiply(
            tile,
            x,
            weight,
            out,
            norm=torch.ones_like(x[0]) if fold else None,
            eps=EPS,
            residual=out if shape.adds else None,
            gated=shape.kind is Kind.GATED,
        )
    except Exception:
        return  # it fails again where it is measured, and is reported there


# --- report -----------------------------------------------------------------------------------------------------------


def best(timings: list[Timing]) -> Timing:
    return min(timings, key=lambda timing: timing.seconds)


def report_line(timings: list[Timing], torch_seconds: float) -> str:
    winner, by_torch = best(timings), timings[0]
    shape = winner.shape
    rate = shape.num_bytes / winner.seconds
    faults = sum(bool(timing.fault) for timing in timings)
    return (
        f"{shape.name:8} {winner.num_rows:4}  {winner.seconds * 1e6:7.2f} us  {rate / 1e9:6.0f} GB/s "
        f"{rate / READ_BANDWIDTH:5.1%}  torch {by_torch.seconds * 1e6:7.2f}  mm {torch_seconds * 1e6:7.2f}  "
        f"{winner.tile if winner.tile is not None else 'torch'}{f'  ({faults} faults)' if faults else ''}"
    )


def table_source(winners: dict[tuple[Shape, int], Timing]) -> str:
    """The measured table as Python, for tiles.py."""
    keys = sorted({(shape.kind, rows) for shape, rows in winners}, key=lambda key: (key[0].value, key[1]))
    lines = ["HOPPER: Table = {"]
    for kind, rows in keys:
        lines.append(f"    (Kind.{kind.name}, {rows}): {{")
        for (shape, shape_rows), winner in winners.items():
            if (shape.kind, shape_rows) == (kind, rows):
                lines.append(f"        ({shape.num_outputs}, {shape.num_inputs}): {tile_source(winner.tile)},")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def tile_source(tile: Tile | None) -> str:
    if tile is None:
        return "None"
    positional = ("block_o", "block_i", "num_warps", *(() if isinstance(tile, MatvecTile) else ("num_stages",)))
    parts = [str(getattr(tile, name)) for name in positional]
    for field in fields(tile):
        value = getattr(tile, field.name)
        if field.name not in positional and value != field.default:
            parts.append(f"{field.name}={value}")
    return f"{type(tile).__name__}({', '.join(parts)})"


def sweep(operands: Operands, shapes: tuple[Shape, ...], rows: tuple[int, ...]) -> tuple[list[Timing], str]:
    """Times and prints everything; returns the timings and the table's source."""
    tiles = {(kind, n): candidates(kind, n) for kind in Kind for n in rows}
    print(f"compiled in {compile_ahead(shapes, rows, tiles):.0f} s", flush=True)
    timings, winners = [], {}
    torch_sums, our_sums = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    for num_rows in rows:
        for shape in shapes:
            measured = measure(operands, shape, num_rows, tiles[shape.kind, num_rows])
            by_mm = torch_product_seconds(operands, shape, num_rows)
            print(report_line(measured, by_mm), flush=True)
            timings += measured
            winners[shape, num_rows] = best(measured)
            torch_sums[num_rows] += by_mm * shape.per_step
            our_sums[num_rows] += best(measured).seconds * shape.per_step
    for num_rows in rows:
        print(f"sum, {num_rows} rows: {our_sums[num_rows] * 1e3:.3f} ms; torch.mm {torch_sums[num_rows] * 1e3:.3f} ms")
    for fault in {f"{t.shape.name} {t.num_rows} {t.tile}: {t.fault}" for t in timings if t.fault}:
        print("fault:", fault)
    return timings, table_source(winners)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="row counts, powers of two up to 128")
    parser.add_argument("--quick", action="store_true", help="two shapes only, and no whole steps")
    parser.add_argument("--steps-only", action="store_true", help="whole steps with the table in use, no sweep")
    parser.add_argument("--out", type=Path, help="where to write every candidate's figures, as JSON")
    args = parser.parse_args()
    rows = tuple(int(n) for n in args.rows.split(","))
    if unknown := set(rows) - set(ROWS):
        parser.error(f"--rows {args.rows}: {sorted(unknown)} is none of {', '.join(map(str, ROWS))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark measures one")
    shapes = (SHAPES[0], SHAPES[2]) if args.quick else SHAPES
    operands = Operands(shapes)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    source = ""
    if not args.steps_only:
        timings, source = sweep(operands, shapes, rows)
        result["candidates"] = [timing.as_json() for timing in timings]
    if not args.quick:
        result["steps_ms"] = {}
        for num_rows in rows:
            ours, by_mm = (step_seconds(operands, num_rows, by_torch=by_torch) * 1e3 for by_torch in (False, True))
            result["steps_ms"][num_rows] = {"table": round(ours, 4), "torch_mm": round(by_mm, 4)}
            print(f"step, {num_rows} rows, {len(HOPPER)} table entries: {ours:.3f} ms; torch.mm {by_mm:.3f} ms")
    if args.out is not None:
        args.out.write_text(json.dumps({**result, "table": source}, indent=1))
    print(source)
    print(json.dumps({key: value for key, value in result.items() if key != "candidates"}))


if __name__ == "__main__":
    main()
