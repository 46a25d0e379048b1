"""Quantized weights: memory, first token and time between tokens by scheme; and an 8k context in a small card's memory.

Definitions as in latency.py. "Used" is what the device's driver says is taken, as nvidia-smi shows it, with the CUDA
context, kernels, graphs and cache; `small` looks every few milliseconds and keeps the highest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from autobot_llm.engine.description import DescribedExecutor
from autobot_llm.engine.models.config import load_config
from gpu.bench import Bench, generate, random_prompts
from gpu.latency import Case, measure
from gpu.report import Clock, Report

CASES = (
    Case(1, 512, repeats=3),
    Case(1, 2048, num_new_tokens=32),
    Case(8, 512, repeats=2, bounded=False),
    Case(32, 512, repeats=2, bounded=False),
    Case(128, 512, repeats=2, bounded=False),
)
QUICK_CASES = (Case(1, 64, 8, 1), Case(4, 64, 8, 1, bounded=False))
# inter-token ms at batch 1, 8, 32, 128, and first-token ms of 2,048 tokens, on an H200
BARS: Mapping[str, str] = {
    "int8": "2.1 / 2.7 / 3.7 / 6.2",
    "fp8": "2.1 / 2.7 / 3.7 / 6.2, first token of 2,048 tokens 29",
    "int4": "1.5 / 1.9 / 3.2 / 7.0",
}

FIGURES = ("first_token_ms", "inter_token_ms", "inter_token_ms_low", "inter_token_ms_high", "num_repeats")

SMALL_BYTES = 6e9
SMALL_SETTINGS: Mapping[str, object] = {
    "kv_cache_dtype": "int8",
    "max_model_len": 8192,
    "kv_cache_memory": 521 * 2**20,  # one sequence of 8,192 tokens takes 520 MiB
    "max_num_seqs": 1,
    "max_num_batched_tokens": 128,
}


def quantized(bench: Bench, clock: Clock, report: Report) -> None:
    folder = bench.random_model
    sizes = report.table(f"Quantized weights, {folder.name}", "weights", "GB", "start s", "used GB", "what they are")
    sizes.notes.append("GB: all of the model, with embedding and head, which stay as they are")
    times = report.table(
        "Quantized weights: speed (ms)",
        "weights, batch x prompt",
        "first token",
        "inter-token",
        "(low-high)",
        "repeats",
    )
    times.notes += [f"bars on an H200, {scheme}, batch 1 / 8 / 32 / 128: {bar}" for scheme, bar in BARS.items()]
    cases = QUICK_CASES if bench.quick else CASES
    if bench.read_bandwidth is not None:  # measured before an engine takes the memory
        report.figures["read_bandwidth"] = bench.read_bandwidth
    for i, scheme in enumerate(bench.quantizations):
        bench.release()
        start = time.perf_counter()
        engine = bench.engine(
            folder, quantization=scheme, prefix_caching=False, max_num_seqs=max(case.batch for case in cases)
        )
        seconds, used = time.perf_counter() - start, used_bytes(bench)
        figures: dict[str, object] = {"start_seconds": seconds, "used_bytes": used}
        report.figures[scheme] = figures
        weights, weight_bytes = engine.executor.reason, None
        if isinstance(engine.executor, DescribedExecutor):
            description = engine.executor.description
            weights, weight_bytes = description.weights or "not quantized", description.weight_bytes
            figures |= {"weights": weights, "weight_bytes": weight_bytes}
            sizes.notes.append(f"{scheme}: graphs {description.graphs}")
        sizes.add(scheme, weight_bytes / 1e9 if weight_bytes else None, seconds, used / 1e9 if used else None, weights)
        bound = engine.scheduler.max_waiting_time_ms
        for j, case in enumerate(cases):
            engine.scheduler.max_waiting_time_ms = bound if case.bounded else None
            until = (i + (j + 1) / len(cases)) / len(bench.quantizations)
            result = measure(bench, engine, folder, case, clock, until=until)
            figures[case.key] = {name: getattr(result, name) for name in FIGURES}
            times.add(
                f"{scheme}, {case.batch} x {case.prompt_tokens:,}",
                result.first_token_ms,
                result.inter_token_ms,
                f"{result.inter_token_ms_low:.2f}-{result.inter_token_ms_high:.2f}",
                result.num_repeats,
            )
    bench.release()


def small(bench: Bench, clock: Clock, report: Report) -> None:
    """An 8k context in 6 GB, everything counted: best run first, in a process that has used the device for nothing."""
    folder = bench.random_model
    bench.release()
    config = load_config(folder)
    settings = dict(SMALL_SETTINGS) | {"max_model_len": min(8192, config.max_position_embeddings)}
    if not bench.is_cuda:
        settings["kv_cache_dtype"] = "auto"
    scheme = "none" if config.quantization is not None else "int4"
    with highest_used(bench) as highest:
        engine = bench.engine(folder, quantization=scheme, prefix_caching=False, **settings)
        after_start = used_bytes(bench)
        reserved, allocated = torch_bytes(bench)
        length = (256 if bench.quick else engine.scheduler.max_model_len) - 66
        prompts = random_prompts(engine.config, 1, length, random.Random(0))
        one = generate(engine, prompts, 1)
        many = generate(engine, prompts, 65)
    table = report.table(f"{length:,} tokens of prompt, int4 weights, int8 keys and values", "what", "figure")
    figures = {
        "used after the start, GB": after_start / 1e9 if after_start else None,
        "of it, held by torch, GB": reserved / 1e9,
        "of that, in use, GB": allocated / 1e9,
        "used at most, from load to answer, GB": highest[0] / 1e9 if highest[0] else None,
        "first token, ms": one.seconds * 1e3,
        "between tokens, ms": (many.seconds - one.seconds) / 64 * 1e3,
    }
    for name, figure in figures.items():
        table.add(name, figure)
    if highest[0]:
        table.add(f"within {SMALL_BYTES / 1e9:g} GB", highest[0] <= SMALL_BYTES)
    table.notes.append(", ".join(f"{name}={value}" for name, value in settings.items()))
    if isinstance(engine.executor, DescribedExecutor):
        table.notes.append(f"{engine.executor.description.weights}; {engine.executor.description.graphs}")
    report.figures |= figures
    bench.release()


def used_bytes(bench: Bench) -> int | None:
    """Of the device, by everybody; None for a CPU."""
    if not bench.is_cuda:
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def torch_bytes(bench: Bench) -> tuple[int, int]:
    """Of the device, by torch's allocator: held, and in use. The rest is the CUDA context, kernels and graphs."""
    return (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) if bench.is_cuda else (0, 0)


@contextmanager
def highest_used(bench: Bench) -> Iterator[list[int]]:
    """The highest `used_bytes` while the context lasts, as the list's one item; 0 for a CPU."""
    highest, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            highest[0] = max(highest[0], used_bytes(bench) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        is_over.set()
        watcher.join()
