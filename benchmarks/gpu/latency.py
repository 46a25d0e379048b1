"""First token, time between tokens, memory and bandwidth, by batch size and prompt length.

Definitions, the same as in the table of peers: with T(m) the wall time of generating m tokens for a whole batch, added
at once to an idle engine, the time to first token is T(1) and the time between tokens (T(n+1) - T(1)) / n. Prompts are
random tokens, all different; greedy; prefix caching off; end-of-sequence ignored.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autobot_llm.engine.engine import Engine
from gpu.bench import Bench, generate, random_prompts, weight_bytes_read_per_step
from gpu.published import BARS_DEVICE, OTHERS, SOURCE, VLLM_BF16
from gpu.report import Clock, Report, Table


@dataclass(frozen=True, slots=True)
class Case:
    """One row: `num_new_tokens` is n of the definition, `repeats` at most so many medians of.

    With `bounded`, prompts hold up sequences that decode already by no more than the workload's waiting time, as users
    have it by default; it costs throughput while a batch of prompts arrives at once. The other engines know no such
    bound, so larger batches are measured without it, too.
    """

    batch: int
    prompt_tokens: int
    num_new_tokens: int = 128
    repeats: int = 5
    bounded: bool = True

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}{'' if self.bounded else ' unbounded'}"


CASES = (
    Case(1, 512),
    Case(8, 512),
    Case(32, 512),
    Case(32, 512, bounded=False),
    Case(128, 512, repeats=3),
    Case(128, 512, repeats=3, bounded=False),
    Case(1, 2048),
    # many new tokens, because what the prompts' seconds vary by is divided by their number
    Case(1, 16384, repeats=3),
    Case(8, 16384, repeats=3),
    Case(8, 16384, repeats=3, bounded=False),
)
QUICK_CASES = (Case(1, 64, 8, 2), Case(4, 64, 8, 2), Case(4, 64, 8, 2, bounded=False), Case(1, 16384, 8, 2))
ENGINE_SETTINGS: Mapping[str, object] = {"prefix_caching": False, "max_num_seqs": max(case.batch for case in CASES)}


@dataclass(frozen=True, slots=True)
class Latency:
    """Times in ms; `step_gb` is what a step must read at the mean context, `bandwidth_share` that over the time it
    took, as a share of what the device can read; `memory_gb` counts the cache in use, not the cache reserved."""

    first_token_ms: float
    inter_token_ms: float
    inter_token_ms_low: float
    inter_token_ms_high: float
    num_repeats: int
    step_gb: float
    bandwidth_share: float | None
    memory_gb: float | None
    num_preemptions: int


def inter_token_seconds(first: float, whole: float, num_new_tokens: int) -> float:
    """(T(n+1) - T(1)) / n."""
    return (whole - first) / num_new_tokens


def step_bytes(weight_bytes: int, cache_bytes_per_token: float, case: Case) -> float:
    """Bytes that a decoding step must read: the weights once, and every sequence's cache at its mean length."""
    mean_context = case.prompt_tokens + case.num_new_tokens / 2
    return weight_bytes + case.batch * mean_context * cache_bytes_per_token


def latency(bench: Bench, clock: Clock, report: Report) -> None:
    folder = bench.random_model
    ceiling = bench.read_bandwidth
    engine = bench.engine(folder, **ENGINE_SETTINGS)
    has_peers = bench.device_name == BARS_DEVICE  # others' figures are that device's
    table = report.table(
        f"Latency, {folder.name}, greedy, prefix caching off (ms)",
        *("batch x prompt", "first token", *(("vLLM",) if has_peers else ()), "inter-token", "(low-high)"),
        *(*(("vLLM",) if has_peers else ()), "repeats", "GB/step", "bandwidth", "memory GB"),
    )
    if has_peers:
        table.notes.append(f"vLLM 0.26 bf16: {SOURCE}")
    if ceiling is not None:
        table.notes.append(f"bandwidth: share of the {ceiling / 1e12:.2f} TB/s that a kernel reads which only reads")
        report.figures["read_bandwidth"] = ceiling
    table.notes.append("no bound: prompts may hold up what decodes as long as they take, as in the other engines")
    cases = QUICK_CASES if bench.quick else CASES
    for i, case in enumerate(cases):
        context = case.prompt_tokens + case.num_new_tokens + 1
        if context > engine.scheduler.max_model_len:
            table.notes.append(
                f"{case.key}: {context:,} tokens, the model's context is {engine.scheduler.max_model_len:,}"
            )
            continue
        bound = engine.scheduler.max_waiting_time_ms
        engine.scheduler.max_waiting_time_ms = bound if case.bounded else None
        try:
            result = measure(bench, engine, folder, case, clock, until=(i + 1) / len(cases))
        finally:
            engine.scheduler.max_waiting_time_ms = bound
        report.figures[case.key] = asdict(result)
        _add_row(table, case, result, has_peers)
    if has_peers:
        _add_published(report)


def measure(bench: Bench, engine: Engine, folder: Path, case: Case, clock: Clock, *, until: float = 1.0) -> Latency:
    """One row, after an untimed warm-up of the same shape."""
    rng = random.Random(case.key)

    def once(num_tokens: int) -> tuple[float, int, int]:
        prompts = random_prompts(engine.config, case.batch, case.prompt_tokens, rng)
        result = generate(engine, prompts, num_tokens)
        return result.seconds, result.num_preemptions, result.peak_cache_bytes

    once(4)
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    pairs = clock.repeat(lambda: (once(1), once(case.num_new_tokens + 1)), case.repeats, until=until)
    first = statistics.median(short[0] for short, _ in pairs)
    whole = statistics.median(long[0] for _, long in pairs)
    between = inter_token_seconds(first, whole, case.num_new_tokens)
    each = [inter_token_seconds(short[0], long[0], case.num_new_tokens) for short, long in pairs]
    cache_bytes_per_token = engine.bytes_per_block / engine.scheduler.block_pool.block_size
    num_bytes = step_bytes(weight_bytes_read_per_step(folder), cache_bytes_per_token, case)
    ceiling = bench.read_bandwidth
    memory = bench.memory_needed(engine, max(long[2] for _, long in pairs))
    return Latency(
        first_token_ms=first * 1e3,
        inter_token_ms=between * 1e3,
        inter_token_ms_low=min(each) * 1e3,
        inter_token_ms_high=max(each) * 1e3,
        num_repeats=len(pairs),
        step_gb=num_bytes / 1e9,
        bandwidth_share=num_bytes / between / ceiling if ceiling else None,
        memory_gb=memory / 1e9 if memory is not None else None,
        num_preemptions=sum(short[1] + long[1] for short, long in pairs),
    )


def _add_row(table: Table, case: Case, result: Latency, has_peers: bool) -> None:
    vllm_first, vllm_between = VLLM_BF16.get((case.batch, case.prompt_tokens), (None, None))
    share = result.bandwidth_share
    table.add(
        f"{case.batch} x {case.prompt_tokens:,}{'' if case.bounded else ', no bound'}",
        result.first_token_ms,
        *((vllm_first,) if has_peers else ()),
        result.inter_token_ms,
        f"{result.inter_token_ms_low:.2f}-{result.inter_token_ms_high:.2f}",
        *((vllm_between,) if has_peers else ()),
        result.num_repeats,
        result.step_gb,
        f"{share:.0%}" if share is not None else None,
        result.memory_gb,
    )
    if result.num_preemptions:
        table.notes.append(f"{case.key}: {result.num_preemptions} preemptions; the cache was too small for this row")


def _add_published(report: Report) -> None:
    """Ours beside the others, in the columns that they have figures for."""
    table = report.table(
        f"Inter-token ms beside other engines (theirs: {SOURCE})",
        *("engine", "batch 1", "batch 8", "batch 32", "batch 128", "first token, batch 1", "start s"),
    )
    ours = [report.figures.get(f"{batch}x512", {}) for batch in (1, 8, 32, 128)]
    table.add("autobot_llm", *(one.get("inter_token_ms") for one in ours), ours[0].get("first_token_ms"), None)
    for name, figures in OTHERS.items():
        table.add(name, *figures)
    table.notes.append("our start: section start. gpt-fast: more than 60 s")
