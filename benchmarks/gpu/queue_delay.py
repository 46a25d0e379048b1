"""How long requests wait at 80 % of what the engine can do, for each workload profile, and how busy the device is.

Capacity is measured first: the rate at which requests finish while others wait for a seat. Then requests arrive at 80 %
of it with exponential gaps, through the service and its thread as a server's do. A request's delay is the time from its
submission to the step that first computes some of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.service import EngineService
from gpu.bench import Bench, greedy_request
from gpu.report import Clock, Report, percentiles

PROFILES = ("interactive", "batch", "mixed")
LOAD = 0.8
SECONDS = 15.0
PROMPT_TOKENS = (64, 512)
NEW_TOKENS = (16, 256)
# Requests to measure the capacity with, per seat: the first fill the seats, the last leave some empty.
ROUNDS = 4
SECONDS_BETWEEN_SAMPLES = 0.002
SAMPLES_PER_READING = 50  # of the device's own counter, which is renewed a few times a second only


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of prompt and answer."""

    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Served:
    """Times in seconds from the submission; `finished` is on the clock of time.monotonic()."""

    queued: float
    first_token: float
    inter_token: float
    finished: float
    num_preemptions: int


def queue_delay(bench: Bench, clock: Clock, report: Report) -> None:
    bench.release()
    shape = Shape((8, 32), (4, 16)) if bench.quick else Shape(PROMPT_TOKENS, NEW_TOKENS)
    seconds = 2.0 if bench.quick else SECONDS
    table = report.table(
        f"Queue delay at {LOAD:.0%} of capacity (ms), Poisson arrivals for {seconds:.0f} s, "
        f"{_span(shape.prompt_tokens)} prompt tokens, {_span(shape.new_tokens)} new ones",
        *("profile", "seats", "step tokens", "capacity req/s", "requests", "queued p50", "p95"),
        *("first token p50", "p95", "inter-token p50", "p95", "busy", "GPU"),
    )
    for profile in PROFILES:
        figures = asyncio.run(_serve(bench, profile, shape, seconds))
        bench.free_device_memory()
        report.figures[profile] = figures
        times = (figures[name][p] for name in ("queued_ms", "first_token_ms", "inter_token_ms") for p in ("p50", "p95"))
        busy, gpu = figures["busy_share"], figures["gpu_utilization"]
        table.add(
            profile,
            figures["max_num_seqs"],
            figures["max_num_batched_tokens"],
            figures["capacity_requests_s"],
            figures["num_requests"],
            *times,
            f"{busy:.0%}",
            f"{gpu:.0%}" if gpu is not None else None,
        )
    table.notes.append("busy: share of the time with a step under way; GPU: the driver's own utilization counter")


def _span(limits: tuple[int, int]) -> str:
    return f"{limits[0]} to {limits[1]}"


async def _serve(bench: Bench, profile: str, shape: Shape, seconds: float) -> dict[str, Any]:
    settings: dict[str, object] = {"workload": profile}
    if bench.quick:
        settings["max_num_seqs"] = 4
    options = bench.options(bench.random_model, **settings)
    service = EngineService(partial(load_engine, options), max_queued_requests=100_000)
    await service.start()
    try:
        engine = service.engine
        assert engine is not None, "a started service has an engine"
        rng = random.Random(profile)
        ask = partial(_ask, service, engine, rng, shape)
        capacity = await _capacity(ask, engine.scheduler.max_num_seqs)
        with _sampled_utilization(engine, bench) as utilization:
            pending = await _arrivals(ask, LOAD * capacity, seconds, rng)
        served = await asyncio.gather(*pending)
        return {
            "max_num_seqs": engine.scheduler.max_num_seqs,
            "max_num_batched_tokens": engine.scheduler.max_num_batched_tokens,
            "capacity_requests_s": capacity,
            "num_requests": len(served),
            "num_preemptions": sum(one.num_preemptions for one in served),
            **{
                f"{name}_ms": dict(
                    zip(("p50", "p95"), percentiles([1e3 * getattr(one, name) for one in served]), strict=True)
                )
                for name in ("queued", "first_token", "inter_token")
            },
            "busy_share": utilization.busy_share,
            "gpu_utilization": utilization.gpu_share,
        }
    finally:
        await service.close()


async def _ask(service: EngineService, engine: Engine, rng: random.Random, shape: Shape) -> Served:
    prompt = rng.choices(range(engine.config.vocab_size), k=rng.randint(*shape.prompt_tokens))
    num_tokens = rng.randint(*shape.new_tokens)
    start = time.monotonic()
    first = None
    with service.submit(greedy_request(prompt, num_tokens)) as handle:
        while handle.is_open:
            await handle.next_outputs()
            first = first or time.monotonic()
    finished = time.monotonic()
    scheduled = handle.stats.first_scheduled_time
    assert first is not None and scheduled is not None, "a complete answer was scheduled and had a first token"
    return Served(
        queued=scheduled - start,
        first_token=first - start,
        inter_token=(finished - first) / max(1, num_tokens - 1),
        finished=finished,
        num_preemptions=handle.stats.num_preemptions,
    )


async def _capacity(ask: partial[Any], num_seats: int) -> float:
    """Requests per second while every seat is taken."""
    await asyncio.gather(*(ask() for _ in range(num_seats)))  # warm up
    served = await asyncio.gather(*(ask() for _ in range(ROUNDS * num_seats)))
    return saturated_rate([one.finished for one in served], num_seats)


def saturated_rate(finish_times: list[float], num_seats: int) -> float:
    """Requests per second between the first round of finished requests, and the last, in which seats stay empty."""
    ordered = sorted(finish_times)
    first, last = num_seats, len(ordered) - num_seats
    if last <= first:
        raise ValueError(f"{len(ordered)} requests for {num_seats} seats: expected at least {2 * num_seats + 1}")
    return (last - first) / (ordered[last] - ordered[first])


async def _arrivals(ask: partial[Any], rate: float, seconds: float, rng: random.Random) -> list[asyncio.Task[Served]]:
    """Start requests at random times; returns when the time is over, with all of them, finished or not."""
    tasks = []
    start = time.monotonic()
    due = rng.expovariate(rate)
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        tasks.append(asyncio.create_task(ask()))
        due += rng.expovariate(rate)
    await asyncio.sleep(max(0.0, start + seconds - time.monotonic()))
    return tasks


@dataclass(slots=True)
class Utilization:
    """Shares from 0 to 1, complete after the block that measured them."""

    busy_share: float = 0.0
    gpu_share: float | None = None


@contextlib.contextmanager
def _sampled_utilization(engine: Engine, bench: Bench) -> Iterator[Utilization]:
    """Watch from a thread whether the engine has work, and what the driver's counter says."""
    result, stop = Utilization(), threading.Event()
    read_gpu = _gpu_counter() if bench.is_cuda else None
    busy: list[bool] = []
    gpu: list[float] = []

    def watch() -> None:
        while not stop.wait(SECONDS_BETWEEN_SAMPLES):
            if read_gpu is not None and len(busy) % SAMPLES_PER_READING == 0:
                gpu.append(read_gpu())
            busy.append(engine.has_work)

    thread = threading.Thread(target=watch, name="utilization")
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
        result.busy_share = sum(busy) / max(1, len(busy))
        result.gpu_share = sum(gpu) / len(gpu) if gpu else None


def _gpu_counter() -> Any:
    """A function that reads the driver's utilization of our device, 0 to 1; None without its library."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # type: ignore[import-not-found]  # where it is, it has no types

    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
