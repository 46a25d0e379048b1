"""The decoder's products of few rows with quantized weights on a GPU: every candidate tile, checked and timed.

As linear_gpu.py does for bfloat16 weights: chains of launches in CUDA graphs, each with another layer's weights, then
whole steps (32 layers and the head, products only). Prints the table for engine/kernels/gpu/tiles.py.

    python benchmarks/quantized_linear_gpu.py --out quantized.json
    python benchmarks/quantized_linear_gpu.py --formats int4 --rows 1,32
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from linear_gpu import CHAIN_SECONDS, DTYPE, EPS, MIN_CHAIN_BYTES, SHAPES, Shape, graph_seconds, reference, tile_source

from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.quantized import multiply_quantized
from autobot_llm.engine.kernels.gpu.tiles import Kind, RowsTile
from autobot_llm.engine.quantization.packed import PackedWeight

FORMATS = ("int8", "fp8", "int4")
ROWS = (1, 32, 128)
GROUP = 128
READ_BANDWIDTH = 4e12  # about what is needed to choose a chain's length
LAYER_SHAPES = SHAPES[:-1]  # the head stays bfloat16


def candidates(fmt: str, num_rows: int) -> list[RowsTile]:
    """What is worth a try: few bytes are in flight in each program, so many programs or many stages are wanted."""
    options: dict[str, Any] = {"fold_norm": False, "prefetch_bytes": 512, "evict_first": True}
    if num_rows <= 8:  # the older matrix instructions, whatever the warps
        tiles = [RowsTile(64, 128, 4, stages, num_splits=n, **options) for stages in (4, 6) for n in (1, 2, 4, 8)]
        tiles += [RowsTile(32, 128, 2, 5, num_splits=n, **options) for n in (1, 2, 4)]
        tiles += [RowsTile(16, 128, 1, 5, num_splits=n, **options) for n in (1, 2)]
        tiles += [RowsTile(128, 128, 8, 4, num_splits=n, **options) for n in (2, 4, 8)]
        tiles += [RowsTile(64, 128, 4, 5, num_splits=n, prefetch_bytes=512, evict_first=True) for n in (2, 4)]
        tiles += [RowsTile(64, 128, 4, 5, num_splits=n, fold_norm=False, evict_first=True) for n in (2, 4)]
    elif num_rows <= 32:
        tiles = [RowsTile(64, 128, 2, 4, num_splits=n, **options) for n in (1, 2, 4, 8)]
        tiles += [RowsTile(32, 128, 2, 4, num_splits=n, **options) for n in (1, 2, 4)]
        tiles += [RowsTile(64, 128, 4, 4, num_splits=n, **options) for n in (1, 2, 4)]
        tiles += [RowsTile(128, 128, 4, 3, num_splits=n, **options) for n in (2, 4)]
        tiles += [RowsTile(128, 128, 8, 4, num_splits=n, **options) for n in (2, 4)]
    else:
        tiles = [RowsTile(128, 128, 8, 2, num_splits=n, **options) for n in (1, 2, 4)]
        tiles += [RowsTile(64, 128, 4, 2, num_splits=n, **options) for n in (1, 2, 4)]
        tiles += [RowsTile(128, 128, 8, 3, num_splits=n, **options) for n in (1, 2, 4)] if fmt != "int4" else []
    if fmt != "int4" and num_rows <= 32:
        tiles += [RowsTile(64, 256, 4, 3, num_splits=n, **options) for n in (1, 2, 4)]
    return tiles


def random_weight(fmt: str, shape: Shape, device: torch.device) -> PackedWeight:
    """Numbers of the format whose products are of about 1."""
    num_outputs, num_inputs = shape.weight_shape
    if fmt == "int4":
        values = torch.randint(-128, 128, (num_outputs, num_inputs // 2), dtype=torch.int8, device=device)
        scales = torch.full((num_inputs // GROUP, num_outputs), num_inputs**-0.5 / 4.6, dtype=DTYPE, device=device)
        return PackedWeight(values, scales, num_inputs, GROUP)
    values = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8, device=device)
    scales = torch.full((num_outputs,), num_inputs**-0.5 / 73, device=device)
    return PackedWeight(values if fmt == "int8" else values.float().to(torch.float8_e4m3fn), scales, num_inputs)


@dataclass(frozen=True, slots=True)
class Timing:
    shape: Shape
    tile: RowsTile
    seconds: float
    fault: str = ""


def run(tile: RowsTile, shape: Shape, x: torch.Tensor, norm: torch.Tensor, weight: PackedWeight, out: torch.Tensor,
        residual: torch.Tensor) -> None:  # fmt: skip
    has_norm = shape.kind is not Kind.PLAIN
    if has_norm and not tile.fold_norm:
        x = rms_norm(x, norm, EPS)
    multiply_quantized(
        tile,
        x,
        weight,
        out,
        norm=norm if has_norm and tile.fold_norm else None,
        eps=EPS,
        residual=residual if shape.adds else None,
        gated=shape.kind is Kind.GATED,
    )


def measure(fmt: str, shape: Shape, num_rows: int, tiles: list[RowsTile]) -> list[Timing]:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    num_copies = max(4, math.ceil(MIN_CHAIN_BYTES / (shape.num_bytes / (4 if fmt == "int4" else 2))))
    weights = [random_weight(fmt, shape, device) for _ in range(num_copies)]
    x = torch.randn(num_rows, shape.num_inputs, device=device, dtype=DTYPE)
    norm = 1 + 0.3 * torch.randn(shape.num_inputs, device=device, dtype=DTYPE)
    out = torch.full((num_rows, shape.num_outputs), math.nan, device=device, dtype=DTYPE)
    residual = torch.randn_like(out)
    expected = reference(shape, x, norm, weights[0].dequantized(torch.float32), residual)
    length = max(num_copies, math.ceil(CHAIN_SECONDS * READ_BANDWIDTH / weights[0].num_bytes))
    chain = [weights[i % num_copies] for i in range(length)]
    timings = []
    for tile in tiles:

        def launches(tile: RowsTile = tile) -> None:
            for weight in chain:
                run(tile, shape, x, norm, weight, out, residual)

        seconds, fault = math.inf, ""
        try:
            out.fill_(math.nan)
            run(tile, shape, x, norm, weights[0], out, residual)
            error = float((out.float() - expected).norm() / expected.norm())
            if error < 1e-2:  # NaN is not
                seconds = graph_seconds(launches, repeats=7) / length
            else:
                fault = f"wrong: relative error {error:.2e}"
        except Exception as exc:  # a tile too large for the device is a row of the report
            fault = f"{type(exc).__name__}: {str(exc)[:150]}"
        timings.append(Timing(shape, tile, seconds, fault))
    return timings


def compile_ahead(jobs: list[tuple[str, Shape, int, RowsTile]]) -> float:
    """Fill Triton's cache on disk; returns the seconds that took."""
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as pool:
        for _ in pool.map(_compile, jobs, chunksize=4):
            pass
    return time.perf_counter() - started


def _compile(job: tuple[str, Shape, int, RowsTile]) -> None:
    fmt, shape, num_rows, tile = job
    device = torch.device("cuda", 0)
    x = torch.zeros(num_rows, shape.num_inputs, device=device, dtype=DTYPE)
    out = torch.zeros(num_rows, shape.num_outputs, device=device, dtype=DTYPE)
    try:
        run(tile, shape, x, x[0], random_weight(fmt, shape, device), out, out)
    except Exception:
        return  # it fails again where it is measured, and is reported there


def step_seconds(fmt: str, num_rows: int, winners: dict[Shape, RowsTile]) -> float:
    """The quantized products of one decode step, each by its best tile."""
    device = torch.device("cuda", 0)
    weights = {s: [random_weight(fmt, s, device) for _ in range(s.per_step)] for s in LAYER_SHAPES}
    norms = torch.ones(4096, device=device, dtype=DTYPE)
    outs = {s: torch.zeros(num_rows, s.num_outputs, device=device, dtype=DTYPE) for s in LAYER_SHAPES}
    qkv, o, gate_up, down = LAYER_SHAPES
    hidden = torch.randn_like(outs[o])

    def launches() -> None:
        for layer in range(qkv.per_step):
            run(winners[qkv], qkv, hidden, norms, weights[qkv][layer], outs[qkv], hidden)
            attended = outs[qkv][:, : o.num_inputs]
            run(winners[o], o, attended, norms, weights[o][layer], outs[o], hidden)
            run(winners[gate_up], gate_up, outs[o], norms, weights[gate_up][layer], outs[gate_up], hidden)
            run(winners[down], down, outs[gate_up], norms, weights[down][layer], outs[down], hidden)

    launches()
    return graph_seconds(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="row counts up to 128")
    parser.add_argument("--out", type=Path, help="where to write every candidate's figures, as JSON")
    args = parser.parse_args()
    formats, rows = args.formats.split(","), [int(n) for n in args.rows.split(",")]
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))} is none of {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark measures one")
    jobs = [(f, s, n, tile) for f in formats for n in rows for s in LAYER_SHAPES for tile in candidates(f, n)]
    print(f"{len(jobs)} candidates compiled in {compile_ahead(jobs):.0f} s", flush=True)
    all_timings, steps = [], {}
    for fmt in formats:
        for num_rows in rows:
            winners: dict[Shape, RowsTile] = {}
            for shape in LAYER_SHAPES:
                timings = sorted(measure(fmt, shape, num_rows, candidates(fmt, num_rows)), key=lambda t: t.seconds)
                all_timings += [(fmt, num_rows, timing) for timing in timings]
                best, faults = timings[0], [t for t in timings if t.fault]
                if math.isinf(best.seconds):
                    raise SystemExit(f"{fmt}, {num_rows} rows, {shape.name}: no candidate ran: {best.fault}")
                winners[shape] = best.tile
                rate = shape.num_bytes / (4 if fmt == "int4" else 2) / best.seconds
                print(
                    f"{fmt:5} {num_rows:4} {shape.name:8} {best.seconds * 1e6:7.2f} us {rate / 1e9:6.0f} GB/s  "
                    f"second {timings[1].seconds * 1e6:7.2f}  {tile_source(best.tile)}"
                    + (f"  ({len(faults)} faults: {faults[0].fault})" if faults else ""),
                    flush=True,
                )
            steps[f"{fmt} {num_rows}"] = round(step_seconds(fmt, num_rows, winners) * 1e3, 4)
            print(f"step, {fmt}, {num_rows} rows: {steps[f'{fmt} {num_rows}']} ms", flush=True)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "steps_ms": steps}
    if args.out is not None:
        rows_out = [
            {"format": f, "rows": n, "shape": t.shape.name, "tile": tile_source(t.tile), "fault": t.fault,
             "us": None if t.fault else round(t.seconds * 1e6, 3)}
            for f, n, t in all_timings
        ]  # fmt: skip
        args.out.write_text(json.dumps({**result, "candidates": rows_out}, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
