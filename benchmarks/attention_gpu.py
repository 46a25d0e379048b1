"""Attention on a GPU at the shape of Mistral-7B: which tile and which library is best for decoding and for prompts.

Every candidate is checked against float32 on a poisoned output, then timed in a CUDA graph of several layers, each with
a cache of its own, so that keys come from memory and not from the second-level cache. Decoding is measured against the
bytes it must read, prompts against the arithmetic that causality leaves. Prints two tables, and one JSON line at the
end; kernels are compiled in parallel beforehand.

    python benchmarks/attention_gpu.py --out attention.json
    python benchmarks/attention_gpu.py --quick
    python benchmarks/attention_gpu.py --rounded     # caches of one byte a number, beside bfloat16
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autobot_llm.engine.attention.paged import (
    BLOCK_SIZE,
    PROGRAMS_PER_PROCESSOR,
    AttentionShape,
    PagedBatch,
    decode_sizes,
    fill_decode_arrays,
)
from autobot_llm.engine.attention.sdpa_paged import FreshKernel, SdpaPagedAttention, attend_fresh
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.kernels.gpu.decode_attention import DecodeTile, DecodeWorkspace, paged_decode
from autobot_llm.engine.kernels.gpu.prefill_attention import PrefillTile, fresh_prefill, paged_prefill, plan_tiles
from autobot_llm.engine.kv_cache.storage import numbers_and_scales, quantize_positions

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
GROUP_SIZE = NUM_HEADS // NUM_KV_HEADS
DTYPE = torch.bfloat16
ROUNDED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
READ_BANDWIDTH = 4.63e12  # bytes a second, measured on an H200
TOLERANCE = 1.5e-2

CACHED_BYTES = 400e6  # keys and values of all layers of a graph: several times the second-level cache
MAX_LAYERS = 48
NUM_REPLAYS = 15

DECODE_TILES = [
    *(DecodeTile(32, 4, stages) for stages in (3, 4, 5)),
    *(DecodeTile(64, 4, stages) for stages in (2, 3, 4)),
    DecodeTile(32, 1, 2),
    DecodeTile(16, 1, 3),
    DecodeTile(32, 2, 4),
    DecodeTile(64, 8, 3),
    DecodeTile(128, 4, 2),
    DecodeTile(128, 8, 2),
    DecodeTile(128, 8, 3),
]
ROUNDED_TILES = [
    *(DecodeTile(n, warps, stages) for n, warps in ((64, 4), (128, 4)) for stages in (2, 3, 4)),
    *(DecodeTile(n, warps, stages) for n, warps in ((64, 2), (32, 1)) for stages in (3, 4)),
    *(DecodeTile(128, 8, 3), DecodeTile(256, 8, 2), DecodeTile(32, 2, 4)),
]
LONG_TILES = [  # of one or two warps, which wait for no other
    *((DecodeTile(32, 1, stages), load) for stages, load in ((3, 8), (3, 10), (3, 12), (4, 8), (2, 8), (2, 12))),
    *((DecodeTile(64, 1, stages), load) for stages, load in ((2, 6), (2, 8), (3, 6))),
    *((DecodeTile(64, 2, stages), load) for stages, load in ((2, 4), (2, 6), (3, 4), (3, 6))),
    *((DecodeTile(128, 4, stages), load) for stages, load in ((2, 3), (3, 3))),
    *((DecodeTile(128, 2, stages), load) for stages, load in ((2, 3), (3, 3))),
    (DecodeTile(16, 1, 4), 8),
]
GIVEN_TILES: list[tuple[DecodeTile, int]] = []
VERIFY_TILES = [
    DecodeTile(32, 4, 3),
    DecodeTile(32, 4, 4),
    DecodeTile(64, 4, 2),
    DecodeTile(64, 4, 3),
    DecodeTile(64, 8, 3),
]
PREFILL_TILES = [
    PrefillTile(128, 64, 8, 3),
    PrefillTile(128, 64, 8, 4),
    PrefillTile(128, 128, 8, 2),
    PrefillTile(128, 128, 8, 3),
    PrefillTile(64, 64, 4, 2),
    PrefillTile(64, 64, 4, 3),
    PrefillTile(64, 128, 4, 2),
]
TORCH_KERNELS: tuple[FreshKernel, ...] = ("cudnn", "flash")


# T packed tokens, H query heads, K key/value heads, D head size
@dataclass(frozen=True)
class Case:
    """`batch` sequences of `context` positions, the last `queries` of which are new."""

    batch: int
    context: int
    queries: int
    cache: str = "bf16"  # or a key of ROUNDED
    in_a_row: bool = False  # a sequence's blocks lie one after the other, as of the first requests; else anywhere

    @property
    def is_decode(self) -> bool:
        return self.queries <= 16

    @property
    def is_fresh(self) -> bool:
        return self.queries == self.context

    @property
    def kv_bytes(self) -> int:
        head_bytes = HEAD_SIZE + 2 if self.cache in ROUNDED else HEAD_SIZE * DTYPE.itemsize
        return self.batch * self.context * 2 * NUM_KV_HEADS * head_bytes

    @property
    def flops(self) -> float:
        """Of the positions that are seen: a multiplication and an addition, for the scores and for the values."""
        seen = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) / 2
        return 4.0 * self.batch * seen * NUM_HEADS * HEAD_SIZE

    def __str__(self) -> str:
        cache = (f" {self.cache}" if self.cache in ROUNDED else "") + (" in a row" if self.in_a_row else "")
        if self.is_decode:
            return f"{self.batch} x {self.context}" + (f", {self.queries} new" if self.queries > 1 else "") + cache
        return f"{self.queries} fresh" if self.is_fresh else f"{self.queries} of {self.context}{cache}"


def case_of(text: str) -> Case:
    """From `8,16384,1,int8`, with `,row` behind it where blocks lie in a row."""
    batch, context, queries, cache, *row = text.split(",")
    return Case(int(batch), int(context), int(queries), cache, row == ["row"])


DECODE_CASES = [Case(1, 512, 1), Case(8, 640, 1), Case(32, 640, 1), Case(128, 640, 1), Case(1, 16384, 1)]
DECODE_CASES += [Case(8, 16384, 1), Case(1, 640, 8), Case(8, 640, 8), Case(1, 640, 16)]
PREFILL_CASES = [Case(1, 512, 512), Case(1, 2048, 2048), Case(1, 4096, 4096), Case(1, 4096, 512)]
ROUNDED_CASES = [
    Case(batch, context, queries, cache)
    for batch, context, queries in ((8, 16384, 1), (1, 16384, 1), (32, 576, 1), (1, 640, 8), (1, 4096, 512))
    for cache in ("bf16", *ROUNDED)
]
LONG_CASES = [
    Case(8, context, 1, cache, in_a_row)
    for cache in ("bf16", *ROUNDED)
    for context, in_a_row in ((16384, False), (16384, True), (16500, True))
]
QUICK_CASES = [Case(1, 512, 1), Case(128, 640, 1), Case(8, 16384, 1), Case(1, 512, 512), Case(1, 2048, 2048)]


@dataclass(frozen=True)
class Timing:
    case: Case
    candidate: str
    microseconds: float | None  # None: `fault` says why
    error: float | None = None
    fault: str = ""

    @property
    def rate(self) -> float:
        """Share of the read bandwidth when decoding, TFLOP/s in a prompt; 0 for a fault."""
        if self.microseconds is None:
            return 0.0
        seconds, case = self.microseconds / 1e6, self.case
        return case.kv_bytes / seconds / READ_BANDWIDTH if case.is_decode else case.flops / seconds / 1e12


class Step:
    """A case's tensors: one qkv for all layers, and a cache for each, its blocks shuffled."""

    def __init__(self, case: Case, num_layers: int) -> None:
        device = torch.device("cuda")
        blocks_each = math.ceil(case.context / BLOCK_SIZE)
        blocks = np.arange(case.batch * blocks_each, dtype=np.int32)
        if not case.in_a_row:
            np.random.default_rng(0).shuffle(blocks)
        num_tokens = case.batch * case.queries
        self.batch = StepBatch(
            ids_T=np.zeros(num_tokens, np.int64),
            positions_T=np.zeros(num_tokens, np.int32),
            slots_T=np.zeros(num_tokens, np.int64),
            query_starts=np.arange(0, num_tokens + 1, case.queries, dtype=np.int32),
            context_lens=np.full(case.batch, case.context, np.int32),
            block_tables_SB=blocks.reshape(case.batch, blocks_each),
            logit_rows_R=np.zeros(case.batch, np.int64),
            pending_rows_T=np.full(num_tokens, -1, np.int32),
        )
        qkv = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_SIZE, dtype=DTYPE, device=device)
        self.q, self.k, self.v = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
        self.out = torch.empty(num_tokens, NUM_HEADS, HEAD_SIZE, dtype=DTYPE, device=device)
        shape = (2, len(blocks), NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(num_layers):
            layer = torch.randn(shape, dtype=DTYPE, device=device)
            self._store_new(layer, case)
            keys, values = (rounded(part, ROUNDED[case.cache]) for part in layer) if case.cache in ROUNDED else layer
            self.caches.append((keys, values))

    def _store_new(self, layer: torch.Tensor, case: Case) -> None:
        """The step's own keys and values go into each layer's cache, as they would be there."""
        positions = np.arange(case.context - case.queries, case.context)
        blocks = torch.from_numpy(self.batch.block_tables_SB[:, positions // BLOCK_SIZE].ravel().astype(np.int64))
        offsets = torch.from_numpy(np.tile(positions % BLOCK_SIZE, case.batch))
        layer[0, blocks.to(layer.device), :, offsets.to(layer.device)] = self.k
        layer[1, blocks.to(layer.device), :, offsets.to(layer.device)] = self.v

    def expected(self) -> torch.Tensor:
        """The first layer's output in float32."""
        shape = AttentionShape(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, (0,))
        keys, values = self.caches[0]
        twin = SdpaPagedAttention(shape, [keys], [values], reason="the twin", math_dtype=torch.float32)
        out_THD = torch.empty_like(self.q, dtype=torch.float32)
        twin.attend(0, self.q.float(), self.k, self.v, out_THD, twin.prepare(self.batch))
        return out_THD


def rounded(cache_BKPD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A layer's keys or values as PagedStorage has them: a block's numbers, then its scales."""
    blocks, heads = cache_BKPD.shape[:2]
    numbers, scales = quantize_positions(cache_BKPD.flatten(0, 1), dtype)
    row = cache_BKPD[0, 0].numel() + cache_BKPD.shape[2] * scales.element_size()
    rows = torch.empty((blocks, heads, row), dtype=torch.int8, device=cache_BKPD.device)
    stored_numbers, stored_scales = numbers_and_scales(rows, cache_BKPD.shape[3])
    stored_numbers.copy_(numbers.view(torch.int8).view(cache_BKPD.shape))
    stored_scales.copy_(scales.view(stored_scales.shape))
    return rows.view(dtype)


Launch = Callable[[int], object]  # of a layer


def candidates(case: Case, step: Step) -> list[tuple[str, Launch]]:
    if case.is_decode:
        return [
            (f"{tile_name(tile)}, {load} a processor", decode_launch(case, step, tile, load))
            for tile, load in decode_tiles(case)
        ]
    launches = []
    for tile in PREFILL_TILES:
        launches.append((f"paged {tile_name(tile)}", prefill_launch(step, tile, from_cache=True)))
        if case.is_fresh:
            launches.append((f"fresh {tile_name(tile)}", prefill_launch(step, tile, from_cache=False)))
    if case.is_fresh:
        launches += [(f"torch {kernel}", torch_launch(case, step, kernel)) for kernel in TORCH_KERNELS]
    return launches


def decode_tiles(case: Case) -> list[tuple[DecodeTile, int]]:
    """Tiles, and how many programs of each a multiprocessor is given at a time."""
    if GIVEN_TILES:
        return GIVEN_TILES
    of_one = ROUNDED_TILES if case.cache in ROUNDED else DECODE_TILES
    tiles = VERIFY_TILES if case.queries > 1 else of_one
    tried = [(tile, PROGRAMS_PER_PROCESSOR) for tile in tiles]
    return tried + (LONG_TILES if case in LONG_CASES else [])


def tile_name(tile: DecodeTile | PrefillTile) -> str:
    size = f"{tile.block_m} x {tile.block_n}" if isinstance(tile, PrefillTile) else f"N {tile.block_n}"
    return f"{size}, {tile.num_warps} warps, {tile.num_stages} stages"


def decode_launch(case: Case, step: Step, tile: DecodeTile, load: int) -> Launch:
    num_processors = torch.cuda.get_device_properties(0).multi_processor_count
    num_items = case.batch + -(-load * num_processors // NUM_KV_HEADS)
    width = -(-step.batch.block_tables_SB.shape[1] // 16) * 16
    sizes = decode_sizes(case.batch, max_queries=case.queries, table_width=width, num_items=num_items)
    arrays = {name: np.zeros(size, np.int32) for name, size in sizes.items()}
    fill_decode_arrays(arrays, step.batch)
    batch = PagedBatch.over({name: torch.from_numpy(a).cuda() for name, a in arrays.items()}, case.queries)
    workspace = DecodeWorkspace.allocate(
        num_items,
        max_queries=case.queries,
        group_size=GROUP_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        device=step.q.device,
    )

    def launch(layer: int) -> None:
        keys, values = step.caches[layer]
        paged_decode(step.q, keys, values, batch, step.out, workspace, tile=tile)

    return launch


def prefill_launch(step: Step, tile: PrefillTile, *, from_cache: bool) -> Launch:
    batch = step.batch
    members = np.arange(batch.num_sequences, dtype=np.int32)
    tiles_W8 = plan_tiles(batch.query_starts, batch.context_lens, members, tile.block_m // GROUP_SIZE)
    tiles = torch.from_numpy(tiles_W8).cuda()
    tables_SB = torch.from_numpy(batch.block_tables_SB).cuda()

    def launch(layer: int) -> None:
        if from_cache:
            keys, values = step.caches[layer]
            paged_prefill(step.q, keys, values, tables_SB, tiles, step.out, tile=tile)
        else:
            fresh_prefill(step.q, step.k, step.v, tiles, step.out, tile=tile)

    return launch


def torch_launch(case: Case, step: Step, kernel: FreshKernel) -> Launch:
    return lambda layer: attend_fresh(step.q, step.k, step.v, step.out, ((0, case.queries),), kernel)


def measure(case: Case) -> list[Timing]:
    num_layers = max(4, min(MAX_LAYERS, math.ceil(CACHED_BYTES / case.kv_bytes)))
    step = Step(case, num_layers)
    expected = step.expected()
    return [timing(case, step, expected, name, launch, num_layers) for name, launch in candidates(case, step)]


def timing(case: Case, step: Step, expected: torch.Tensor, name: str, launch: Launch, num_layers: int) -> Timing:
    try:
        step.out.fill_(float("nan"))
        launch(0)
        difference = torch.linalg.vector_norm(step.out.float() - expected, dim=-1)
        error = float((difference / torch.linalg.vector_norm(expected, dim=-1)).max())
    except Exception as fault:  # a candidate that cannot run is a row of the table
        return Timing(case, name, None, fault=f"{type(fault).__name__}: {fault}".splitlines()[0][:100])
    if not error < TOLERANCE:
        return Timing(case, name, None, error, f"wrong: relative error {error:.1e}")
    return Timing(case, name, microseconds(launch, num_layers), error)


def microseconds(launch: Launch, num_layers: int) -> float:
    """Of one layer: the median over replays of a graph of them all."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(num_layers):
            launch(layer)
    graph.replay()
    times = []
    for _ in range(NUM_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / num_layers)
    return statistics.median(times)


def compile_ahead(cases: Sequence[Case]) -> float:
    """Fill Triton's cache on disk with every kernel, in processes of their own; returns the seconds it took."""
    started = time.perf_counter()
    jobs: dict[tuple[Case, DecodeTile | PrefillTile, bool], None] = {}
    for case in cases:
        if case.is_decode:
            jobs.update({(Case(1, 256, case.queries, case.cache), tile, True): None for tile, _ in decode_tiles(case)})
        else:
            for tile in PREFILL_TILES:
                jobs[Case(1, 256, 32, case.cache), tile, True] = None
                if case.is_fresh:
                    jobs[Case(1, 256, 256), tile, False] = None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as pool:
        list(pool.map(_compile, jobs))
    return time.perf_counter() - started


def _compile(job: tuple[Case, DecodeTile | PrefillTile, bool]) -> None:
    case, tile, from_cache = job
    step = Step(case, 1)
    try:
        if isinstance(tile, DecodeTile):
            decode_launch(case, step, tile, PROGRAMS_PER_PROCESSOR)(0)
        else:
            prefill_launch(step, tile, from_cache=from_cache)(0)
    except Exception:
        return  # it fails again where it is measured, and is reported there


def report(timings: Sequence[Timing], *, show_all: bool) -> None:
    """The best of each case, or all of them, best first."""
    for case in dict.fromkeys(timing.case for timing in timings):
        ranked = sorted((t for t in timings if t.case == case), key=lambda t: t.microseconds or math.inf)
        for row in ranked if show_all else ranked[:3]:
            figure = f"{row.rate:6.1%} of bandwidth" if case.is_decode else f"{row.rate:6.0f} TFLOP/s"
            times = f"{row.microseconds:9.2f} us {figure}" if row.microseconds is not None else f"  {row.fault}"
            print(f"{case!s:18} {row.candidate:44} {times}")


def as_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    return [
        {
            "case": str(t.case),
            "candidate": t.candidate,
            "microseconds": t.microseconds,
            "share_of_bandwidth" if t.case.is_decode else "tflops": round(t.rate, 4),
            "relative_error": t.error,
            "fault": t.fault or None,
        }
        for t in timings
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five cases")
    parser.add_argument("--rounded", action="store_true", help="keys and values of one byte, beside bfloat16")
    parser.add_argument("--all", action="store_true", help="print every candidate, not the best three")
    parser.add_argument("--out", type=Path, help="write every candidate's figures to this JSON file")
    parser.add_argument(
        "--long", action="store_true", help="8 sequences of 16,384 tokens, blocks anywhere and in a row"
    )
    parser.add_argument("--cases", help="only these: sequences,context,new tokens,cache[,row]; ...")
    parser.add_argument("--tiles", help="only these of decoding: positions,warps,stages,programs a processor; ...")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    every = LONG_CASES if arguments.long else ROUNDED_CASES if arguments.rounded else DECODE_CASES + PREFILL_CASES
    if arguments.cases:
        every = [case_of(text) for text in arguments.cases.split(";")]
    if arguments.tiles:
        for given in arguments.tiles.split(";"):
            *tile, load = map(int, given.split(","))
            GIVEN_TILES.append((DecodeTile(*tile), load))
    cases = QUICK_CASES if arguments.quick else every
    print(f"compiled in {compile_ahead(cases):.0f} s", flush=True)
    timings: list[Timing] = []
    for case in cases:
        timings += measure(case)
        torch.cuda.empty_cache()
    report(timings, show_all=arguments.all)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(as_json(timings), indent=1))
    best = {str(t.case): t for t in sorted(timings, key=lambda t: -(t.microseconds or math.inf))}
    summary = {case: {"candidate": t.candidate, "microseconds": t.microseconds} for case, t in best.items()}
    print(json.dumps({"benchmark": "attention_gpu", "device": torch.cuda.get_device_name(), "best": summary}))


if __name__ == "__main__":
    main()
