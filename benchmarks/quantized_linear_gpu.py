"""The decoder's products with quantized weights on a GPU: every candidate, checked and timed, from one row to prompts.

As linear_gpu.py does for bfloat16 weights: chains of launches in CUDA graphs, each with another layer's weights, then
whole steps (32 layers, products only) beside cuBLAS's in bfloat16. `a8` means activations in 8 bits, too. Prints the
winners as they are written in engine/kernels/gpu/stream_tiles.py, quantized_tiles.py (RowsTile) and many_tiles.py;
block_tiles.py has a rule made of them.

    python benchmarks/quantized_linear_gpu.py --out quantized.json
    python benchmarks/quantized_linear_gpu.py --formats int4,fp8a8 --rows 1,32
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from linear_gpu import CHAIN_SECONDS, DTYPE, EPS, MIN_CHAIN_BYTES, SHAPES, Shape, graph_seconds, reference, tile_source
from quantized_candidates import GROUP, Candidate, candidates

from autobot_llm.engine.kernels.gpu.block_tiles import BlockTile
from autobot_llm.engine.kernels.gpu.linear import product
from autobot_llm.engine.kernels.gpu.many_tiles import Library
from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.quantized import multiply_quantized
from autobot_llm.engine.kernels.gpu.quantized_many import multiply_by
from autobot_llm.engine.kernels.gpu.stream_tiles import StreamTile
from autobot_llm.engine.kernels.gpu.streamed import multiply_streamed
from autobot_llm.engine.kernels.gpu.streamed_blocks import multiply_blocks
from autobot_llm.engine.kernels.gpu.tiles import Kind, RowsTile
from autobot_llm.engine.quantization.packed import PackedWeight
from autobot_llm.engine.quantization.rounding import round_activations

FORMATS = ("int8", "fp8", "int4", "int8a8", "fp8a8")
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048)
READ_BANDWIDTH = 4e12  # about what is needed to choose a chain's length
LAYER_SHAPES = SHAPES[:-1]  # the head stays bfloat16
REPEATS = 5


def source(candidate: Candidate) -> str:
    if isinstance(candidate, RowsTile):
        return tile_source(candidate)
    if isinstance(candidate, Library | StreamTile | BlockTile):
        return str(candidate)
    parts = [str(getattr(candidate, field.name)) for field in fields(candidate)[:5]]
    parts += [
        f"{f.name}={getattr(candidate, f.name)}"
        for f in fields(candidate)[5:]
        if getattr(candidate, f.name) != f.default
    ]
    return f"ManyTile({', '.join(parts)})"


def random_weight(fmt: str, shape: Shape, device: torch.device) -> PackedWeight:
    """Numbers of the format whose products are of about 1."""
    num_outputs, num_inputs = shape.weight_shape
    if fmt == "int4":
        values = torch.randint(-128, 128, (num_outputs, num_inputs // 2), dtype=torch.int8, device=device)
        scales = torch.full((num_inputs // GROUP, num_outputs), num_inputs**-0.5 / 4.6, dtype=DTYPE, device=device)
        scales *= torch.rand_like(scales) + 0.5
        return PackedWeight(values, scales, num_inputs, GROUP)
    values = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8, device=device)
    scales = torch.full((num_outputs,), num_inputs**-0.5 / 73, device=device) * (
        torch.rand(num_outputs).to(device) + 0.5
    )
    stored: Literal["int8", "fp8"] = "int8" if fmt.startswith("int8") else "fp8"
    values = values if stored == "int8" else values.to(torch.float8_e4m3fn)
    return PackedWeight(values, scales, num_inputs, activations=stored if fmt.endswith("a8") else None)


@lru_cache(maxsize=1)
def weights_of(fmt: str) -> dict[Shape, list[PackedWeight]]:
    """All layers of a step."""
    device = torch.device("cuda", 0)
    return {shape: [random_weight(fmt, shape, device) for _ in range(shape.per_step)] for shape in LAYER_SHAPES}


@dataclass(frozen=True, slots=True)
class Timing:
    shape: Shape
    candidate: Candidate
    seconds: float
    fault: str = ""


def run(fmt: str, way: Candidate, shape: Shape, x: torch.Tensor, norm: torch.Tensor, weight: PackedWeight,
        out: torch.Tensor, residual: torch.Tensor) -> None:  # fmt: skip
    has_norm, gated = shape.kind is not Kind.PLAIN, shape.kind is Kind.GATED
    added = residual if shape.adds else None
    if isinstance(way, StreamTile):
        multiply_streamed(way, x, weight, out, norm=norm if has_norm else None, eps=EPS, residual=added, gated=gated)
        return
    if isinstance(way, BlockTile):
        multiply_blocks(way, x, weight, out, norm=norm if has_norm else None, eps=EPS, residual=added, gated=gated)
        return
    if not isinstance(way, RowsTile):
        multiply_by(
            way, x, weight, out, norm=norm if has_norm else None, eps=EPS, residual=added, gated=gated,
            rounded=fmt.endswith("a8"),
        )  # fmt: skip
        return
    x = rms_norm(x, norm, EPS) if has_norm else x
    multiply_quantized(way, x, weight, out, eps=EPS, residual=added, gated=gated)


def expected_of(
    fmt: str, shape: Shape, x: torch.Tensor, norm: torch.Tensor, weight: PackedWeight, residual: torch.Tensor
) -> torch.Tensor:
    """What the weight's numbers give in float32, the rows rounded first where they are."""
    numbers = weight.dequantized(torch.float32)
    if not fmt.endswith("a8"):
        return reference(shape, x, norm, numbers, residual)
    wide = x.float()
    if shape.kind is not Kind.PLAIN:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm.float()
    values, scales = round_activations(wide, cast(Literal["int8", "fp8"], fmt[:-2]))
    y = (values.float() * scales) @ numbers.t()
    if shape.kind is Kind.GATED:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return y + residual.float() if shape.adds else y


def measure(fmt: str, shape: Shape, num_rows: int) -> list[Timing]:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    weights = weights_of(fmt)[shape]
    x = torch.randn(num_rows, shape.num_inputs, device=device, dtype=DTYPE)
    norm = 1 + 0.3 * torch.randn(shape.num_inputs, device=device, dtype=DTYPE)
    out = torch.full((num_rows, shape.num_outputs), math.nan, device=device, dtype=DTYPE)
    residual = torch.randn_like(out)
    expected = expected_of(fmt, shape, x, norm, weights[0], residual)
    length = math.ceil(MIN_CHAIN_BYTES / weights[0].num_bytes)
    if num_rows <= 64:
        length = max(length, math.ceil(CHAIN_SECONDS * READ_BANDWIDTH / weights[0].num_bytes))
    chain = [weights[i % len(weights)] for i in range(length)]
    timings = []
    for way in candidates(fmt, num_rows, shape):

        def launches(way: Candidate = way) -> None:
            for weight in chain:
                run(fmt, way, shape, x, norm, weight, out, residual)

        seconds, fault = math.inf, ""
        try:
            out.fill_(math.nan)
            run(fmt, way, shape, x, norm, weights[0], out, residual)
            error = float((out.float() - expected).norm() / expected.norm())
            if error < 1e-2:  # NaN is not
                seconds = graph_seconds(launches, repeats=REPEATS) / length
            else:
                fault = f"wrong: relative error {error:.2e}"
        except Exception as exc:  # a tile too large for the device is a row of the report
            fault = f"{type(exc).__name__}: {str(exc)[:150]}"
        timings.append(Timing(shape, way, seconds, fault))
    return sorted(timings, key=lambda t: t.seconds)


Job: TypeAlias = tuple[str, Shape, int, Candidate]


def compile_ahead(jobs: list[Job]) -> float:
    """Fill Triton's cache on disk; returns the seconds that took."""
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as pool:
        for _ in pool.map(_compile, jobs, chunksize=4):
            pass
    return time.perf_counter() - started


def _compile(job: Job) -> None:
    fmt, shape, num_rows, way = job
    device = torch.device("cuda", 0)
    x = torch.zeros(num_rows, shape.num_inputs, device=device, dtype=DTYPE)
    out = torch.zeros(num_rows, shape.num_outputs, device=device, dtype=DTYPE)
    try:
        run(fmt, way, shape, x, x[0], _first_weight(fmt, shape), out, out)
    except Exception:
        return  # it fails again where it is measured, and is reported there


@lru_cache(maxsize=4)
def _first_weight(fmt: str, shape: Shape) -> PackedWeight:
    return random_weight(fmt, shape, torch.device("cuda", 0))


def jobs_of(formats: list[str], rows: list[int]) -> list[Job]:
    """One of each kernel: what leads to the same code is not compiled twice."""
    jobs: dict[tuple[Any, ...], Job] = {}
    for fmt in formats:
        for num_rows in rows:
            for shape in LAYER_SHAPES:
                for way in candidates(fmt, num_rows, shape):
                    padded = num_rows if isinstance(way, RowsTile) else 0
                    if not isinstance(way, Library | StreamTile | BlockTile):  # NVRTC is quick, and keeps nothing
                        jobs.setdefault((fmt, shape.kind, padded, way), (fmt, shape, num_rows, way))
    return list(jobs.values())


def step_seconds(fmt: str, num_rows: int, winners: dict[Shape, Candidate] | None) -> float:
    """The products of one step, each in its best way; of bfloat16 weights by cuBLAS without winners."""
    device = torch.device("cuda", 0)
    norms = torch.ones(4096, device=device, dtype=DTYPE)
    outs = {s: torch.zeros(num_rows, s.num_outputs, device=device, dtype=DTYPE) for s in LAYER_SHAPES}
    qkv, o, gate_up, down = LAYER_SHAPES
    hidden = torch.randn_like(outs[o])
    weights: Any = weights_of(fmt) if winners else dense_weights()

    def one(shape: Shape, x: torch.Tensor, layer: int) -> None:
        if winners:
            run(fmt, winners[shape], shape, x, norms, weights[shape][layer], outs[shape], hidden)
            return
        norm = norms if shape.kind is not Kind.PLAIN else None
        product(
            None, x, weights[shape][layer], outs[shape], norm=norm, eps=EPS,
            residual=hidden if shape.adds else None, gated=shape.kind is Kind.GATED,
        )  # fmt: skip

    def launches() -> None:
        for layer in range(qkv.per_step):
            one(qkv, hidden, layer)
            one(o, outs[qkv][:, : o.num_inputs], layer)
            one(gate_up, outs[o], layer)
            one(down, outs[gate_up], layer)

    launches()
    return graph_seconds(launches, repeats=REPEATS)


@lru_cache
def dense_weights() -> dict[Shape, list[torch.Tensor]]:
    return {
        shape: [
            torch.empty(shape.weight_shape, device="cuda", dtype=DTYPE).normal_(0, 0.02) for _ in range(shape.per_step)
        ]
        for shape in LAYER_SHAPES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="row counts")
    parser.add_argument("--out", type=Path, help="where to write every candidate's figures, as JSON")
    args = parser.parse_args()
    formats, rows = args.formats.split(","), [int(n) for n in args.rows.split(",")]
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))} is none of {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark measures one")
    jobs = jobs_of(formats, rows)
    print(f"{len(jobs)} kernels compiled in {compile_ahead(jobs):.0f} s", flush=True)
    steps = {"bf16 by cuBLAS": {n: round(step_seconds("bf16", n, None) * 1e3, 3) for n in rows}}
    dense_weights.cache_clear()
    all_timings = []
    for fmt in formats:
        for num_rows in rows:
            if not candidates(fmt, num_rows, Kind.PLAIN):
                continue
            winners: dict[Shape, Candidate] = {}
            for shape in LAYER_SHAPES:
                timings = measure(fmt, shape, num_rows)
                all_timings += [(fmt, num_rows, timing) for timing in timings]
                print(line(fmt, num_rows, timings), flush=True)
                if not math.isinf(timings[0].seconds):
                    winners[shape] = timings[0].candidate
            print(one_for_all([t for f, n, t in all_timings if (f, n) == (fmt, num_rows)]), flush=True)
            if len(winners) == len(LAYER_SHAPES):
                steps.setdefault(fmt, {})[num_rows] = round(step_seconds(fmt, num_rows, winners) * 1e3, 3)
    print("\nproducts of a step, ms: " + "  ".join(f"{n:>7}" for n in rows))
    for fmt, of_rows in steps.items():
        print(f"{fmt:24}" + "  ".join(f"{of_rows.get(n, math.nan):7.2f}" for n in rows))
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "steps_ms": steps}
    if args.out is not None:
        rows_out = [
            {"format": f, "rows": n, "shape": t.shape.name, "way": source(t.candidate), "fault": t.fault,
             "us": None if t.fault else round(t.seconds * 1e6, 3)}
            for f, n, t in all_timings
        ]  # fmt: skip
        args.out.write_text(json.dumps({**result, "candidates": rows_out}, indent=1))
    print(json.dumps(result))


def one_for_all(timings: list[Timing]) -> str:
    """The kernel of many rows that is best over all products without a gate, and what that costs beside the best of
    each: the table has one for all."""
    shapes = [shape for shape in LAYER_SHAPES if shape.kind is not Kind.GATED]
    seconds: dict[Candidate, float] = {}
    for t in timings:
        if t.shape in shapes and not isinstance(t.candidate, RowsTile | StreamTile):
            seconds[t.candidate] = seconds.get(t.candidate, 0.0) + t.seconds
    if not seconds:
        return "    no kernel of many rows"
    best = min(seconds, key=lambda candidate: seconds[candidate])
    apart = sum(min(t.seconds for t in timings if t.shape == shape) for shape in shapes)
    return f"    without a gate, one for all: {source(best)}, {seconds[best] / apart - 1:.1%} over the best of each"


def line(fmt: str, num_rows: int, timings: list[Timing]) -> str:
    """The best of a product, what it comes to, the second best, and what failed."""
    best, faults = timings[0], [t for t in timings if t.fault]
    shape = best.shape
    flops = 2 * num_rows * math.prod(shape.weight_shape)
    text = f"{fmt:6} {num_rows:4} {shape.name:8}"
    if not math.isinf(best.seconds):
        rate = shape.num_bytes / (4 if fmt == "int4" else 2) / best.seconds
        text += f" {best.seconds * 1e6:8.2f} us {rate / 1e9:5.0f} GB/s {flops / best.seconds / 1e12:4.0f} TFLOP/s"
        text += f"  {source(best.candidate)}"
        if len(timings) > 1 and not timings[1].fault:
            text += f"  second {timings[1].seconds * 1e6:.2f} {source(timings[1].candidate)}"
    return text + "".join(f"\n    fault of {source(t.candidate)}: {t.fault}" for t in faults)


if __name__ == "__main__":
    main()
