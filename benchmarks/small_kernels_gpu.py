"""The engine's small kernels and its sampling on a GPU, at the shape of Mistral-7B: microseconds, and bytes a second.

Each figure is the time of one launch in a CUDA graph of many, as a step runs them. Launches take turns on buffers that
together exceed the second-level cache, so inputs come from memory; within a step they often do not, and take less.
Prints two tables, and one JSON line at the end.

    python benchmarks/small_kernels_gpu.py
    python benchmarks/small_kernels_gpu.py --rows 1,32 --vocab-size 151936
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.kernels.gpu.activation import silu_mul
from autobot_llm.engine.kernels.gpu.embedding import embed
from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.rotary import rotate_and_store
from autobot_llm.engine.kernels.gpu.sampling import DeviceSampler, SamplingTensors

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, FEED_FORWARD = 4096, 32, 8, 128, 14_336
QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE
NUM_POSITIONS = 32_768
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")

ROTATED_BYTES = 200e6  # several times the second-level cache
MAX_BUFFERS = 64
MIN_LAUNCHES = 48
NUM_REPLAYS = 15

# Launches, and the bytes one of them has to move
Case = tuple[list[Callable[[], object]], int]


def microseconds(launches: list[Callable[[], object]]) -> float:
    """Of one launch: the median over replays of a graph that holds them all, some times over."""
    launches = launches * -(-MIN_LAUNCHES // len(launches))
    for launch in launches[:2]:
        launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(NUM_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def buffers(num_bytes: int, *shape: int, dtype: torch.dtype = DTYPE) -> list[torch.Tensor]:
    """Random tensors to take turns on, where a launch moves `num_bytes` in all."""
    count = max(2, min(MAX_BUFFERS, int(ROTATED_BYTES / num_bytes) + 1))
    return [torch.randn(shape, dtype=torch.float32, device=DEVICE).to(dtype) for _ in range(count)]


def norm_case(num_rows: int) -> Case:
    num_bytes = 2 * num_rows * HIDDEN * 2
    weight_E, out = (
        torch.randn(HIDDEN, device=DEVICE).to(DTYPE),
        torch.empty(num_rows, HIDDEN, device=DEVICE, dtype=DTYPE),
    )
    inputs = buffers(num_bytes, num_rows, HIDDEN)
    return [partial(rms_norm, x, weight_E, 1e-5, out) for x in inputs], num_bytes


def silu_case(num_rows: int) -> Case:
    num_bytes = 3 * num_rows * FEED_FORWARD * 2
    out = torch.empty(num_rows, FEED_FORWARD, device=DEVICE, dtype=DTYPE)
    inputs = buffers(num_bytes, num_rows, 2 * FEED_FORWARD)
    return [partial(silu_mul, x, out) for x in inputs], num_bytes


def embed_case(num_rows: int) -> Case:
    num_bytes = 2 * num_rows * HIDDEN * 2
    embed_VE = torch.randn(32_000, HIDDEN, device=DEVICE).to(DTYPE)
    out = torch.empty(num_rows, HIDDEN, device=DEVICE, dtype=DTYPE)
    last_R = torch.randint(32_000, (num_rows,), device=DEVICE, dtype=torch.int32)
    rows_T = torch.arange(num_rows, device=DEVICE, dtype=torch.int32)
    rows_T[::2] = -1
    ids = [torch.randint(32_000, (num_rows,), device=DEVICE, dtype=torch.int32) for _ in range(8)]
    return [partial(embed, i, rows_T, last_R, embed_VE, out) for i in ids], num_bytes


def rotary_case(num_rows: int) -> Case:
    rotated, kept = (NUM_HEADS + NUM_KV_HEADS) * HEAD_SIZE, NUM_KV_HEADS * HEAD_SIZE
    num_bytes = num_rows * (QKV + rotated + 2 * kept) * 2
    num_blocks = num_rows // BLOCK_SIZE + 1
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    keys, values = (torch.zeros(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
    positions_T = torch.arange(num_rows, device=DEVICE, dtype=torch.int32)
    angles = torch.rand(NUM_POSITIONS, HEAD_SIZE // 2, device=DEVICE) * 6.28
    cos_sin_PD = torch.cat((angles.cos(), angles.sin()), dim=1)

    def launch(qkv: torch.Tensor) -> None:
        rotate_and_store(
            qkv,
            positions_T,
            positions_T,  # as slots: in order
            cos_sin_PD,
            keys,
            values,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_SIZE,
        )

    return [partial(launch, x) for x in buffers(num_bytes, num_rows, QKV)], num_bytes


KERNELS: dict[str, Callable[[int], Case]] = {
    "rms_norm": norm_case,
    "rotate_and_store": rotary_case,
    "silu_mul": silu_case,
    "embed": embed_case,
}

# The last two have to search the whole row; sampled text seldom does.
SAMPLING: dict[str, dict[str, float] | None] = {
    "greedy": None,
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 40": {"top_k": 40},
    "top_p 0.999, temperature 3": {"top_p": 0.999, "temperature": 3.0},
    "top_k 1000, top_p 0.9": {"top_k": 1000, "top_p": 0.9, "temperature": 3.0},
}


def sampling_case(params: dict[str, float] | None, num_rows: int, vocab_size: int) -> Case:
    num_bytes = num_rows * vocab_size * 4
    sampler = DeviceSampler(vocab_size, num_rows, DEVICE)
    rows = [3 * x for x in buffers(num_bytes, num_rows, vocab_size, dtype=torch.float32)]
    if params is None:
        return [partial(sampler.sample, x) for x in rows], num_bytes

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), params.get(name, default), dtype=dtype, device=DEVICE)

    tensors = SamplingTensors(
        temperature_R=column("temperature", 1.0, torch.float32),
        top_k_R=column("top_k", 0, torch.int32),
        top_p_R=column("top_p", 1.0, torch.float32),
        min_p_R=column("min_p", 0.0, torch.float32),
        keys_R=torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=DEVICE),
        is_drawn_R=column("is_drawn", 1, torch.int32),
    )
    any_restricted = bool({"top_k", "top_p"} & set(params))
    sample = partial(sampler.sample, sampling=tensors, any_drawn=True, any_restricted=any_restricted)
    return [partial(sample, x) for x in rows], num_bytes


def measure(name: str, num_rows: int, case: Case) -> dict[str, Any]:
    launches, num_bytes = case
    time = microseconds(launches)
    row = {"name": name, "rows": num_rows, "us": round(time, 2), "gigabytes_per_s": round(num_bytes / time / 1e3, 1)}
    print(f"{name:28} {num_rows:>6} {row['us']:>10.2f} {row['gigabytes_per_s']:>10.1f}", flush=True)
    torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,32,128,512,2048", help="rows of the small kernels")
    parser.add_argument("--rows", default="1,32,128", help="rows to sample")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("these are timings of CUDA kernels, and torch finds no CUDA device")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
    print(f"\n{'kernel':28} {'tokens':>6} {'us':>10} {'GB/s':>10}")
    tokens = [int(count) for count in args.tokens.split(",")]
    kernels = [measure(name, count, case(count)) for name, case in KERNELS.items() for count in tokens]
    print(f"\n{f'sampling of {args.vocab_size:,}':28} {'rows':>6} {'us':>10} {'GB/s':>10}")
    sampling = [
        measure(name, count, sampling_case(params, count, args.vocab_size))
        for name, params in SAMPLING.items()
        for count in (int(rows) for rows in args.rows.split(","))
    ]
    print(
        json.dumps(
            {
                "benchmark": "small_kernels_gpu",
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "vocab_size": args.vocab_size,
                "kernels": kernels,
                "sampling": sampling,
            }
        )
    )


if __name__ == "__main__":
    main()
