"""What CUDA graphs save, what the host costs per step, and how long the device idles between steps."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.request import RequestStats
from gpu.bench import Bench, greedy_request, random_prompts
from gpu.latency import ENGINE_SETTINGS, Case, measure
from gpu.report import Clock, Report

BATCHES = (1, 32)
PROMPT_TOKENS = 512
NUM_STEPS = 128
NUM_PROFILED_STEPS = 24
# Steps before a measurement begins, after the prompts: the pipeline has filled.
NUM_STEPS_TO_SETTLE = 4


@dataclass(frozen=True, slots=True)
class StepCost:
    """Per decoding step, in µs. `host_us` is the time that the host did not spend waiting for the device, hidden behind
    the device's work or not; `device_idle_us` is the time no kernel ran, and `gap_us` the longest such interval of
    each step, both under the profiler, which slows kernels down a little. None: this device keeps no such record."""

    step_us: float
    host_us: float | None
    host_us_per_token: float | None
    device_idle_us: float | None
    gap_us: float | None


def graphs(bench: Bench, clock: Clock, report: Report) -> None:
    engine = bench.engine(bench.random_model, **ENGINE_SETTINGS)
    num_steps = 16 if bench.quick else NUM_STEPS
    prompt_tokens = 32 if bench.quick else PROMPT_TOKENS
    steps = report.table(
        f"A decoding step ({prompt_tokens}-token prompts, {num_steps} steps)",
        *("batch", "step µs", "host µs", "host µs/token", "device idle µs", "longest gap µs"),
    )
    for batch in BATCHES:
        cost = step_cost(bench, engine, batch, prompt_tokens, num_steps)
        report.figures[str(batch)] = asdict(cost)
        steps.add(batch, cost.step_us, cost.host_us, cost.host_us_per_token, cost.device_idle_us, cost.gap_us)
    if not bench.is_cuda:
        steps.notes.append("host and device figures need a device that works beside the host")
        return
    table = report.table("CUDA graphs, batch 1 (ms between tokens)", "graphs", "inter-token", "saved")
    case = Case(1, prompt_tokens, num_new_tokens=16 if bench.quick else 64, repeats=3)
    folder = bench.random_model
    on = measure(bench, engine, folder, case, clock, until=0.5).inter_token_ms
    engine = bench.engine(folder, **ENGINE_SETTINGS, cuda_graphs="off")
    off = measure(bench, engine, folder, case, clock).inter_token_ms
    saved = 1 - on / off
    report.figures |= {"on_ms": on, "off_ms": off, "saved_by_graphs": saved}
    table.add("on", on, f"{saved:.0%}")
    table.add("off", off, None)


def step_cost(bench: Bench, engine: Engine, batch: int, prompt_tokens: int, num_steps: int) -> StepCost:
    """Time a stretch of steps in which every sequence of a batch decodes, and profile another stretch."""
    rng = random.Random(batch)
    prompts = random_prompts(engine.config, batch, prompt_tokens, rng)
    num_tokens = num_steps + (NUM_PROFILED_STEPS if bench.is_cuda else 0) + 4 * NUM_STEPS_TO_SETTLE
    for i, prompt in enumerate(prompts):
        engine.add(i, greedy_request(prompt, num_tokens), RequestStats())
    try:
        _decode_until_settled(engine, batch)
        start, waited = time.perf_counter(), _seconds_waited(engine)
        for _ in range(num_steps):
            engine.step()
        seconds = time.perf_counter() - start
        waited_after = _seconds_waited(engine)
        idle_us, gap_us = _profiled(engine) if bench.is_cuda else (None, None)
    finally:
        for i in range(batch):
            engine.abort(i)
        while engine.has_work:
            engine.step()
    host_us = None
    if waited is not None and waited_after is not None:
        host_us = (seconds - (waited_after - waited)) / num_steps * 1e6
    per_token = host_us / batch if host_us is not None else None
    return StepCost(seconds / num_steps * 1e6, host_us, per_token, idle_us, gap_us)


def _decode_until_settled(engine: Engine, batch: int) -> None:
    decoding: set[int] = set()
    while len(decoding) < batch:
        decoding.update(output.request_id for output in engine.step())
    for _ in range(NUM_STEPS_TO_SETTLE):
        engine.step()


def _seconds_waited(engine: Engine) -> float | None:
    """What the executor has waited for its device so far; None for one that computes on the host itself."""
    return getattr(engine.executor, "device_wait_seconds", None)


def _profiled(engine: Engine) -> tuple[float | None, float | None]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    return idle_per_step(device_intervals(profiler), NUM_PROFILED_STEPS)


def device_intervals(profiler: Any) -> list[tuple[float, float]]:
    """(start, end) in µs of every kernel and copy that the profiler saw."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]


def idle_per_step(intervals: list[tuple[float, float]], num_steps: int) -> tuple[float | None, float | None]:
    """Time per step in which nothing ran, and the mean of the longest idle intervals, one for each step's end.

    Kernels may overlap: a dependent one is resident before its predecessor ends.
    """
    if not intervals or num_steps < 2:
        return None, None
    gaps = []
    ordered = sorted(intervals)
    busy_until = ordered[0][1]
    for start, end in ordered[1:]:
        if start > busy_until:
            gaps.append(start - busy_until)
        busy_until = max(busy_until, end)
    longest = sorted(gaps, reverse=True)[: num_steps - 1]
    return sum(gaps) / num_steps, sum(longest) / (num_steps - 1)
