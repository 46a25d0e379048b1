"""Continuous batching against static batches, in the same engine and in transformers, on answers of uneven length.

A static batch is as large as the engine's running batch, is formed in order of arrival, and waits for its longest
answer before the next one begins. In our engine a finished row leaves its static batch, so what is left of it gets
cheaper: a stricter opponent than one that pads to the end. Throughput counts the tokens that were asked for.
"""

from __future__ import annotations

import importlib.util
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpu.bench import Bench, generate, random_prompts
from gpu.report import Clock, Report

NUM_REQUESTS = 256
MAX_NEW_TOKENS = 512
PROMPT_TOKENS = (64, 192)
BATCH_SIZE = 64


def log_uniform(rng: random.Random, most: int) -> int:
    """1 to `most`, every doubling equally likely: many short answers, a few long ones."""
    return min(most, int(math.exp(rng.uniform(0.0, math.log(most + 1)))))


def uniform(rng: random.Random, most: int) -> int:
    return rng.randint(1, most)


LENGTHS: Mapping[str, Callable[[random.Random, int], int]] = {"log_uniform": log_uniform, "uniform": uniform}


def batching(bench: Bench, clock: Clock, report: Report) -> None:
    num_requests, most, size = (12, 48, 4) if bench.quick else (NUM_REQUESTS, MAX_NEW_TOKENS, BATCH_SIZE)
    engine = bench.engine(bench.random_model, max_num_seqs=size)
    rng = random.Random(0)
    prompts = [random_prompts(engine.config, 1, rng.randint(*PROMPT_TOKENS), rng)[0] for _ in range(num_requests)]
    lengths = {name: [draw(rng, most) for _ in prompts] for name, draw in LENGTHS.items()}
    table = report.table(
        f"Throughput, {num_requests} requests of 1 to {most} new tokens, batches of {size} (tokens/s)",
        *("lengths", "mean", "continuous", "static, same engine", "ratio", "static, transformers", "ratio"),
    )
    generate(engine, prompts[:size], 4, "warm-up")
    for name, wanted in lengths.items():
        # A salt of its own for each run: none may find the prompts that another has left in the cache.
        continuous = generate(engine, prompts, wanted, f"{name}, continuous")
        static = [
            generate(engine, prompts[i : i + size], wanted[i : i + size], f"{name}, static").seconds
            for i in range(0, num_requests, size)
        ]
        num_tokens = sum(wanted)
        report.figures[name] = {
            "num_requests": num_requests,
            "batch_size": size,
            "mean_new_tokens": num_tokens / num_requests,
            "continuous_tokens_s": num_tokens / continuous.seconds,
            "static_tokens_s": num_tokens / sum(static),
            "continuous_over_static": sum(static) / continuous.seconds,
            "num_preemptions": continuous.num_preemptions,
        }
    first = {name: wanted[:size] for name, wanted in lengths.items()}
    slow = _transformers_rates(bench, prompts[:size], first, clock, report)
    for name, figures in report.figures.items():
        continuous_rate, rate = figures["continuous_tokens_s"], slow.get(name)
        ratio = continuous_rate / rate if rate is not None else None
        figures |= {"transformers_static_tokens_s": rate, "continuous_over_transformers": ratio}
        table.add(
            name,
            figures["mean_new_tokens"],
            continuous_rate,
            figures["static_tokens_s"],
            figures["continuous_over_static"],
            rate,
            ratio,
        )
    table.notes.append(
        f"transformers: its rate over the first batch of {size} only; the engine caches prefixes, and finds none"
    )


def _transformers_rates(
    bench: Bench, prompts: list[list[int]], lengths: dict[str, list[int]], clock: Clock, report: Report
) -> dict[str, float]:
    """Tokens asked for per second, by distribution; what could not be measured is missing, and a note says why."""
    notes = report.tables[-1].notes
    if importlib.util.find_spec("transformers") is None:
        notes.append("transformers is not installed")
        return {}
    bench.release()  # its weights must fit beside nothing
    model = _load_transformers(bench)
    try:
        _generate_static(model, prompts, 2)
        rates: dict[str, float] = {}
        seconds_per_token = 0.0  # of the whole batch
        for name, wanted in lengths.items():
            if clock.elapsed + seconds_per_token * max(wanted) > clock.seconds:
                notes.append(f"transformers, {name}: left out, no time was left")
                break
            seconds = _generate_static(model, prompts, max(wanted))
            seconds_per_token = seconds / max(wanted)
            rates[name] = sum(wanted) / seconds
        return rates
    finally:
        del model
        bench.free_device_memory()


def _load_transformers(bench: Bench) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = "auto" if bench.is_cuda else torch.float32
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        bench.random_model, dtype=dtype, attn_implementation="sdpa"
    )
    model: Any = loaded
    model.to("cuda" if bench.is_cuda else "cpu")
    model.generation_config.eos_token_id = None  # as in our engine, nothing ends early
    return model


def _generate_static(model: Any, prompts: list[list[int]], num_new_tokens: int) -> float:
    """Seconds for one batch, padded on the left, until its longest answer is complete."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=num_new_tokens, do_sample=False, pad_token_id=0
        ).tolist()
    seconds = time.perf_counter() - start
    assert len(out[0]) == width + num_new_tokens
    return seconds
