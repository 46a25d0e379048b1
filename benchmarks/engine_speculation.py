"""Speculation on a CPU beside none: the embedded model, the same prompts, in one run.

Each prompt is answered by every method in turn, so that a busy moment of the machine hits all of them; what is counted
is the time of the decoding steps, prompts excluded, in seconds of the clock and of the processor; and without the noise
of plain steps (speculation_ledger.py), which is what to look at for differences of a per cent. `auto` and the
others keep what they have learned from one prompt to the next, as a server does; `warm-up` prompts are not counted.
The prompts are those that the controller was not tuned with, unless `--half` says otherwise. Prints tables and one JSON
line at the end.

    python benchmarks/engine_speculation.py                    # the figures of docs/results/speculation_cpu.md
    python benchmarks/engine_speculation.py --prompts 4 --new-tokens 32 --methods auto
    python benchmarks/engine_speculation.py --half tuning      # the prompts that the controller was tuned with
    python benchmarks/engine_speculation.py --adversarial      # answers that are hard on speculation
    python benchmarks/engine_speculation.py --identity 200     # whether any token differs, with every method
    python benchmarks/engine_speculation.py --coupling         # acceptance of both schemes on sampled requests
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from speculation_checks import adversarial, identity
from speculation_ledger import Ledger, prices, timed
from speculation_setup import CATEGORIES, DRAFT, METHODS, MODEL, Setup

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_draft_model
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.speculative.speculator import Speculator


@dataclass
class Sums:
    """What one method did with the prompts of one category."""

    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)
    tried: list[int] = field(default_factory=lambda: [0] * 64)
    passed: list[int] = field(default_factory=lambda: [0] * 64)

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / max(1, self.num_steps)


def answer(engine: Engine, asked: list[list[int]], params: SamplingParams, sums: Sums) -> list[tuple[str, int]]:
    """Answer some prompts at once. Steps that hold tokens of prompts are not counted."""
    for i, ids in enumerate(asked):
        seeded = replace(params, seed=params.seed + i)
        engine.add(i, EngineRequest(ids, (seeded,)), RequestStats())
    texts = [["", 0] for _ in asked]
    while engine.has_work:
        is_prompt = any(
            choice.sequence.num_computed_tokens < choice.sequence.num_prompt_tokens
            for choice in engine._choices.values()
        )
        start, processor_start, before = time.perf_counter(), time.process_time(), engine.num_generated_tokens
        num_steps = engine.num_steps
        for output in sums.ledger.step(engine):
            texts[output.request_id][0] += output.text
            texts[output.request_id][1] = output.num_tokens
        if not is_prompt:
            sums.seconds += time.perf_counter() - start
            sums.processor_seconds += time.process_time() - processor_start
            sums.num_tokens += engine.num_generated_tokens - before
            sums.num_steps += engine.num_steps - num_steps
    return [(str(text), int(number)) for text, number in texts]


def figures_before(speculator: Speculator | None) -> dict[str, tuple[list[int], list[int]]]:
    if speculator is None:
        return {}
    return {name: (list(made.tried), list(made.passed)) for name, made in speculator.figures.items()}


def add_figures(speculator: Speculator | None, before: dict[str, tuple[list[int], list[int]]], sums: Sums) -> None:
    if speculator is None:
        return
    for name, made in speculator.figures.items():
        old_tried, old_passed = before.get(name, ([], []))
        for mine, new, old in ((sums.tried, made.tried, old_tried), (sums.passed, made.passed, old_passed)):
            for position, count in enumerate(new):
                mine[position] += count - (old[position] if position < len(old) else 0)


def run(setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    engine = setup.engine
    result: dict[str, Any] = {}
    differing = 0
    for batch in arguments.batch:
        for mode in ("greedy", "sampled"):
            every = {name: timed(setup.speculator(name)) for name in ("off", *arguments.methods)}
            found: dict[tuple[str, str], Sums] = defaultdict(Sums)
            asked = {category: setup.prompts(category, arguments.half)[: arguments.prompts] for category in CATEGORIES}
            number_of_each = min(map(len, asked.values()))
            rounds = [
                (category, asked[category][i : i + batch])
                for i in range(0, number_of_each, batch)
                for category in CATEGORIES
            ]
            warm_up = [("warm-up", texts) for _, texts in rounds[: len(CATEGORIES)]]
            title = f"{mode}, batch {batch}"
            for number, (category, texts) in enumerate(
                track(warm_up + rounds, description=title, transient=True, console=Console(stderr=True))
            ):
                params = setup.params(arguments.new_tokens, is_sampled=mode == "sampled", seed=number * 100)
                order = list(every)
                random.Random(number).shuffle(order)
                answers = {}
                for name in order:
                    engine.speculator = every[name]
                    before = figures_before(every[name])
                    answers[name] = answer(engine, texts, params, found[category, name])
                    add_figures(every[name], before, found[category, name])
                differing += sum(answers[name] != answers["off"] for name in order)
            result[title] = report(title, found, list(every))
    print(f"\nauto against off (plain steps at their mean), prompts: {arguments.half}, {number_of_each} a category")
    for title, cells in result.items():
        every = [cells[f"{category} auto"] for category in CATEGORIES]
        print(f"  {title:18}", *(f"{cell['speed']:5.2f} ({cell['plain_steps_at_their_mean']:5.3f})" for cell in every))
    assert differing == 0, f"{differing} answers differ"
    return result


def report(title: str, found: dict[tuple[str, str], Sums], names: list[str]) -> dict[str, Any]:
    print(
        f"\n{title}: speed against off by the clock (by the processor; plain steps at their mean); tokens per step; "
        "right by position"
    )
    means = prices([found[category, "off"].ledger for category in CATEGORIES])
    cells: dict[str, Any] = {}
    for category in CATEGORIES:
        off = found[category, "off"]
        print(f"  {category:6} off   {off.num_tokens / off.seconds:7.0f} tokens/s, {off.num_tokens} tokens")
        for name in names[1:]:
            sums = found[category, name]
            speed = (sums.num_tokens / sums.seconds) / (off.num_tokens / off.seconds)
            by_processor = (sums.num_tokens / sums.processor_seconds) / (off.num_tokens / off.processor_seconds)
            own = off.ledger.seconds(means) / sums.ledger.seconds(means)
            positions = [
                round(passed / tried, 2) for passed, tried in zip(sums.passed, sums.tried, strict=True) if tried
            ]
            print(
                f"         {name:5} {speed:5.2f} ({by_processor:4.2f}; {own:5.3f})  {sums.tokens_per_step:4.2f}  "
                f"{' '.join(f'{rate:.2f}' for rate in positions)}"
            )
            cells[f"{category} {name}"] = {
                "speed": round(speed, 3),
                "by_processor": round(by_processor, 3),
                "plain_steps_at_their_mean": round(own, 3),
                "tokens_per_step": round(sums.tokens_per_step, 3),
                "by_position": positions,
                "tokens_per_second_off": round(off.num_tokens / off.seconds, 1),
            }
    return cells


# --- acceptance of the two schemes ------------------------------------------------------------------------------------


def coupling(setup: Setup, number: int) -> dict[str, Any]:
    """On texts that the target writes: how often a draft's token is the target's with shared noise (what the engine
    does), and with the rejection sampling of Leviathan et al., which accepts with probability 1 - TV(p, q)."""
    import torch

    from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
    from autobot_llm.engine.kv_cache.block_pool import BlockPool
    from autobot_llm.engine.noise import exponential_noise, noise_keys
    from autobot_llm.engine.sequence import Sequence

    options = EngineOptions(folder=MODEL, cache_dir=Path.home() / ".cache" / "autobot_llm", device="cpu")
    engine, draft = setup.engine, load_draft_model(MODEL, DRAFT, options)
    ids_V = np.arange(engine.config.vocab_size)
    result: dict[str, Any] = {}
    for name, temperature, top_p in (("T 0.6", 0.6, 1.0), ("T 0.8 top-p 0.95", 0.8, 0.95), ("T 1.0", 1.0, 1.0)):
        shared, rejection = [], []
        for category in CATEGORIES:
            for seed, ids in enumerate(setup.prompts(category)[:number]):
                params = SamplingParams(max_tokens=64, temperature=temperature, top_p=top_p, seed=seed)
                engine.add(0, EngineRequest(ids, (params,)), RequestStats())
                (choice,) = engine._choices.values()
                while engine.has_work:
                    engine.step()
                tokens = choice.sequence.token_ids
                both = []
                for executor in (engine.executor, draft.executor):
                    double = Sequence(0, tokens[:-1], params)
                    pool = BlockPool(256, 16, prefix_caching=False)
                    double.block_ids.extend(pool.allocate(-(-len(tokens) // 16)) or ())
                    logits = []
                    for start in range(0, len(tokens) - 1, 64):
                        stop = min(start + 64, len(tokens) - 1)
                        for position in range(start, stop):
                            part = ScheduledSequence(double, position, 1, True)
                            logits.append(executor.execute(build_batch([part], 16))[0].clone())
                    both.append(torch.stack(logits).numpy())
                for position in range(len(ids), len(tokens)):
                    p_V, q_V = (_distribution(each[position - 1], temperature, top_p) for each in both)
                    noise_V = exponential_noise(noise_keys([(seed, position)]), ids_V)[0]
                    shared.append((p_V / noise_V).argmax() == (q_V / noise_V).argmax())
                    rejection.append(np.minimum(p_V, q_V).sum())
        result[name] = {
            "positions": len(shared),
            "shared_noise": round(float(np.mean(shared)), 4),
            "rejection_sampling": round(float(np.mean(rejection)), 4),
        }
        print(name, result[name])
    draft.close()
    return result


def _distribution(logits_V: Any, temperature: float, top_p: float) -> Any:
    weights_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)
    weights_V /= weights_V.sum()
    order = np.argsort(-weights_V)
    weights_V[order[np.cumsum(weights_V[order]) - weights_V[order] >= top_p]] = 0
    return weights_V / weights_V.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="prompts of each category at most (24; there are 25)")
    parser.add_argument("--half", choices=("held-out", "tuning", "all"), default="held-out", help="of the prompts")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=["ngram", "draft", "auto"])
    parser.add_argument("--new-tokens", type=int, default=128, help="most tokens of an answer (128)")
    parser.add_argument("--num-tokens", type=int, default=5, help="most tokens of a draft (5)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts answered at once (1 8)")
    parser.add_argument("--threads", type=int, default=None, help="the engine's threads (measured)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--coupling", action="store_true", help="compare the two schemes of acceptance instead")
    other.add_argument("--adversarial", action="store_true", help="answers that are hard on speculation instead")
    other.add_argument("--identity", type=int, metavar="PROMPTS", help="count the answers that differ instead")
    arguments = parser.parse_args()
    if "auto" not in arguments.methods:
        arguments.methods.append("auto")
    setup = Setup(arguments.threads, arguments.num_tokens)
    try:
        if arguments.coupling:
            result = coupling(setup, min(arguments.prompts, 4))
        elif arguments.adversarial:
            result = adversarial(setup, arguments.prompts)
        elif arguments.identity:
            result = identity(setup, arguments.identity, min(64, arguments.new_tokens))
        else:
            result = run(setup, arguments)
    finally:
        setup.close()
    print(json.dumps({"machine": platform.processor() or platform.machine(), "result": result}))


if __name__ == "__main__":
    main()
