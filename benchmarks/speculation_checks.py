"""What must hold of speculation on a CPU, over many prompts: the same tokens, and no loss to an adversary."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from speculation_ledger import Ledger, prices, timed
from speculation_setup import CATEGORIES, METHODS, Setup

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import Executor
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams

MIXED_BATCH = 8


def identity(setup: Setup, number: int, max_tokens: int) -> dict[str, Any]:
    """Answers of `number` prompts, as many of each category, that differ in a token from those without speculation:
    alone and in batches of all categories, greedy and sampled by seed."""
    each = -(-number // len(CATEGORIES))
    by_category = [setup.prompts(category)[:each] for category in CATEGORIES]
    prompts = [ids for of_all in zip(*by_category, strict=True) for ids in of_all][:number]
    result: dict[str, Any] = {}
    expected: dict[str, list[tuple[int, ...]]] = {}
    for method in METHODS:
        differing: Counter[str] = Counter()
        for mode in ("greedy", "sampled"):
            asked = [
                (ids, setup.params(max_tokens, is_sampled=mode == "sampled", seed=seed))
                for seed, ids in enumerate(prompts)
            ]
            for size in (1, MIXED_BATCH):
                setup.engine.speculator = setup.speculator(method)
                name = f"{mode}, {'alone' if size == 1 else f'{size} at once'}"
                starts = range(0, len(asked), size)
                rounds = [asked[i : i + size] for i in starts]
                answers = [
                    tokens
                    for batch in track(
                        rounds, description=f"{method}: {name}", transient=True, console=Console(stderr=True)
                    )
                    for tokens in setup.answers(batch)
                ]
                if method == "off" and size == 1:
                    expected[mode] = answers
                differing[name] = sum(ours != theirs for ours, theirs in zip(answers, expected[mode], strict=True))
        speculator = setup.engine.speculator
        accepted = 0 if speculator is None else speculator.num_accepted
        result[method] = {**differing, "accepted in the last run": accepted}
        print(f"  {method:7} answers that differ of {len(prompts)}: {dict(differing)}", flush=True)
    return result


class Scripted:
    """Executor that computes what it is given, and then says what a script wants: the token at each position."""

    name = "scripted"
    reason = "an adversary's script"

    def __init__(self, executor: Executor, script: list[int]) -> None:
        self._executor = executor
        self._script = torch.tensor(script)

    def execute(self, batch: StepBatch) -> torch.Tensor:
        logits_RV = self._executor.execute(batch)
        positions_R = torch.from_numpy(batch.positions_T[batch.logit_rows_R]).long()
        logits_RV[torch.arange(len(logits_RV)), self._script[positions_R + 1]] = 1e4
        return logits_RV

    def discard(self, block_ids: list[int]) -> None:
        self._executor.discard(block_ids)

    def close(self) -> None:
        self._executor.close()


def scripts(source: list[int], seed: int) -> dict[str, list[int]]:
    """Answers to `source` that are hard on speculation. What is not copied is drawn from a few tokens, so that there is
    always a guess, and it is nearly always wrong."""
    rng = random.Random(seed)
    few = rng.sample(sorted(set(source)), 12)
    noise = [rng.choice(few) for _ in range(400)]
    copied = source[20:120]
    return {
        "copies 100 tokens, then collapses": copied + noise[:150],
        "copies 15 tokens, invents 35, and again": [
            token for i in range(5) for token in (*source[20 + 20 * i : 35 + 20 * i], *noise[35 * i : 35 * i + 35])
        ],
        "only seems to repeat itself": noise[:250],
    }


def adversarial(setup: Setup, num_rounds: int) -> dict[str, Any]:
    """Speed of auto against off on such answers, by what the decoding steps took."""
    engine, executor = setup.engine, setup.engine.executor
    auto = timed(setup.speculator("auto"))
    sources = [ids for ids in setup.prompts("copy") if len(ids) >= 150]
    result: dict[str, Any] = {}
    for size in (1, 8):
        sums: dict[tuple[str, str], list[float]] = {}
        ledgers: dict[tuple[str, str], Ledger] = defaultdict(Ledger)
        for number in track(
            range(num_rounds + 1), description=f"batch {size}", transient=True, console=Console(stderr=True)
        ):
            source = sources[number % len(sources)]
            for name, answer in scripts(source, number).items():
                engine.executor = Scripted(executor, source + answer + [0] * 8)
                order = ["off", "auto"]
                random.Random(number).shuffle(order)
                for method in order:
                    engine.speculator = None if method == "off" else auto
                    ledger = ledgers[name, method] if number else Ledger()
                    seconds = _decode(setup, source, size, len(answer), ledger)
                    if number:  # the first round is for learning costs
                        total = sums.setdefault((name, method), [0.0, 0.0])
                        total[0] += seconds[0]
                        total[1] += seconds[1]
        for name in scripts(sources[0], 0):
            off, ours = sums[name, "off"], sums[name, "auto"]
            by_clock, by_processor = off[0] / ours[0], off[1] / ours[1]
            means = prices([ledgers[other, "off"] for other in scripts(sources[0], 0)])
            own = ledgers[name, "off"].seconds(means) / ledgers[name, "auto"].seconds(means)
            print(
                f"  batch {size}, {name:42} {by_clock:5.3f} by the clock, {by_processor:5.3f} by the processor, "
                f"{own:5.3f} with plain steps at their mean"
            )
            result[f"batch {size}, {name}"] = {
                "speed": round(by_clock, 3),
                "by_processor": round(by_processor, 3),
                "plain_steps_at_their_mean": round(own, 3),
            }
    engine.executor = executor
    return result


def _decode(setup: Setup, source: list[int], size: int, num_tokens: int, ledger: Ledger) -> tuple[float, float]:
    """Seconds of the clock and of the processor for the steps after the prompts."""
    engine = setup.engine
    for i in range(size):
        engine.add(i, EngineRequest(source, (SamplingParams(max_tokens=num_tokens, temperature=0.0),)), RequestStats())
    seconds = processor_seconds = 0.0
    while engine.has_work:
        is_prompt = any(
            choice.sequence.num_computed_tokens < choice.sequence.num_prompt_tokens
            for choice in engine._choices.values()
        )
        start, processor_start = time.perf_counter(), time.process_time()
        ledger.step(engine)
        if not is_prompt:
            seconds += time.perf_counter() - start
            processor_seconds += time.process_time() - processor_start
    return seconds, processor_seconds
