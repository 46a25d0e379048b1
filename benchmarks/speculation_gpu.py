"""Speculation on a GPU beside none: a model that speaks, its drafts, and the same prompts by every method in turn.

End-to-end tokens per second, prompts included, prefix caching off, greedy unless told otherwise. `auto` keeps what it
has learned from prompt to prompt, as a server does; the others draft always. Answers are compared with those without
drafts: in bfloat16 a step of several rows rounds otherwise than a step of one, so near-ties may fall differently.
Prints tables and one JSON line at the end.

    python benchmarks/widen.py src/autobot_llm/assets/tiny 7b && python benchmarks/widen.py \\
        src/autobot_llm/assets/tiny-draft draft-68m --shape draft-68m
    python benchmarks/speculation_gpu.py 7b --draft draft-68m --batch 1 8 32 128
    python benchmarks/widen_heads.py src/autobot_llm/assets/tiny src/autobot_llm/assets/tiny-medusa medusa-7b
    python benchmarks/speculation_gpu.py 7b --heads medusa-7b --batch 1 8
    python benchmarks/widen_heads.py src/autobot_llm/assets/tiny src/autobot_llm/assets/tiny-eagle3 eagle3-7b
    python benchmarks/speculation_gpu.py 7b --eagle eagle3-7b --batch 1 8
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import PipelinedExecutor
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sampler import SamplingArraysBuilder
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.build import Method, SpeculationOptions
from autobot_llm.engine.speculative.measurements import ON_GPU
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.providers.native.provider import engine_options
from autobot_llm.settings import load_settings

PROMPTS = Path(__file__).parent / "data" / "dev_prompts.jsonl"
CATEGORIES = ("chat", "copy", "story", "code", "long_prefix")
NEW_TOKENS = 160
SAMPLED_TEMPERATURE, SAMPLED_TOP_P = 0.8, 0.95
LINE_NUMBERS, TREE_NUMBERS = (0, 1, 2, 3, 5, 7, 15), (3, 7, 15, 31, 63)


@dataclasses.dataclass
class Sums:
    """What one method did with one category."""

    num_tokens: int = 0
    num_steps: int = 0
    num_differing: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        return self.num_tokens / self.seconds


def prompts(engine: Engine, category: str) -> list[list[int]]:
    found = []
    for line in PROMPTS.read_text().splitlines():
        record = json.loads(line)
        if record["category"] == category:
            text = record.get("prompt") or "".join(
                f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in record["messages"]
            )
            text += "" if "prompt" in record else "<|assistant|>\n"
            found.append(engine.tokenizer.encode(text, add_special_tokens=False))
    return found


def answer(engine: Engine, asked: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], float, int]:
    """The tokens of each answer, the seconds for all of them, and the steps."""
    torch.cuda.synchronize()
    start, num_steps = time.perf_counter(), engine.num_steps
    sequences = []
    for i, ids in enumerate(asked):
        seeded = dataclasses.replace(params, seed=params.seed + i)
        engine.add(i, EngineRequest(ids, (seeded,)), RequestStats())
        sequences.append(engine._requests[i][0].sequence)
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - start
    return [shown(s) for s in sequences], seconds, engine.num_steps - num_steps


def shown(sequence: Sequence) -> list[int]:
    """The tokens up to the end: a step under way may have added what nobody asked for."""
    ids = sequence.output_ids[:NEW_TOKENS]
    return next((ids[: i + 1] for i, token_id in enumerate(ids) if token_id in sequence.params.stop_token_ids), ids)


def methods(engine: Engine, num_tokens: int) -> dict[str, Speculator | None]:
    """Every method over the parts of the engine's own speculator; `auto` chooses between its costly one and n-grams."""
    assert engine.speculator is not None, engine.speculation_reason
    costly, clock = engine.speculator._costly, time.perf_counter
    found: dict[str, Speculator | None] = {
        "off": None,
        "ngram": Speculator(num_tokens, make_free=NgramProposer, policy=Always(num_tokens), clock=clock),
    }
    if costly is not None:
        found[costly.name] = Speculator(num_tokens, costly=costly, policy=Always(num_tokens), clock=clock)
    auto = Speculator(num_tokens, make_free=NgramProposer, costly=costly, priors=ON_GPU, clock=clock)
    return found | {"auto": auto}


def run_batch(
    engine: Engine, every: dict[str, Speculator | None], batch: int, number: int, *, is_sampled: bool = False
) -> dict[str, Any]:
    names = list(every) if batch == 1 else ["off", "auto"]
    params = SamplingParams(
        max_tokens=NEW_TOKENS,
        temperature=SAMPLED_TEMPERATURE if is_sampled else 0.0,
        top_p=SAMPLED_TOP_P if is_sampled else 1.0,
        seed=7,
        stop_token_ids=engine.config.eos_token_ids,
    )
    rounds = []
    for category in CATEGORIES:
        asked = list(itertools.islice(itertools.cycle(prompts(engine, category)), max(batch, number)))
        rounds += [(category, asked[i : i + batch]) for i in range(0, len(asked), batch)]
    random.Random(0).shuffle(rounds)
    found = {(category, name): Sums() for category in CATEGORIES for name in names}
    for warm_up, (category, asked) in [(True, r) for r in rounds[:3]] + [(False, r) for r in rounds]:
        answers = {}
        order = random.Random(len(asked[0])).sample(names, len(names))
        for name in order:
            engine.speculator = every[name]
            answers[name], seconds, num_steps = answer(engine, asked, params)
            if not warm_up:
                sums = found[category, name]
                sums.num_tokens += sum(map(len, answers[name]))
                sums.num_steps += num_steps
                sums.seconds += seconds
        if not warm_up:
            for name in names:
                pairs = zip(answers[name], answers["off"], strict=True)
                found[category, name].num_differing += sum(mine != off for mine, off in pairs)
    engine.speculator = every["auto"]
    title = f"batch {batch}, {'sampled' if is_sampled else 'greedy'}, {max(batch, number)} prompts a category"
    return report(title, found, names)


def report(title: str, found: dict[tuple[str, str], Sums], names: list[str]) -> dict[str, Any]:
    print(f"\n{title}: tokens/s (x off) of {', '.join(CATEGORIES)}")
    cells: dict[str, Any] = {}
    for name in names:
        row = []
        for category in CATEGORIES:
            sums, off = found[category, name], found[category, "off"]
            row.append(f"{sums.speed:8.0f} ({sums.speed / off.speed:4.2f})")
            cells[f"{category} {name}"] = {
                "tokens_per_second": round(sums.speed, 1),
                "ratio": round(sums.speed / off.speed, 3),
                "tokens_per_step": round(sums.num_tokens / sums.num_steps, 2),
                "ms_per_step": round(sums.seconds / sums.num_steps * 1e3, 2),
                "differing": sums.num_differing,
            }
        differing = sum(found[category, name].num_differing for category in CATEGORIES)
        mean = sum(found[c, name].speed / found[c, "off"].speed for c in CATEGORIES) / len(CATEGORIES)
        per_step = " ".join(f"{found[c, name].num_tokens / found[c, name].num_steps:.2f}" for c in CATEGORIES)
        print(f"  {name:6} {' '.join(row)}  mean {mean:4.2f}, {differing} differ, tokens/step {per_step}", flush=True)
    return cells


def about(every: dict[str, Speculator | None]) -> dict[str, Any]:
    """Acceptance by position, and what steps cost as the controller has measured it."""
    told: dict[str, Any] = {}
    for name, speculator in every.items():
        if speculator is None:
            continue
        for line, text in speculator.lines().items():
            print(f"  {name}: {line} {text}")
            told[f"{name}, {line}"] = text
        costs = speculator.controller
        for size in (1, 8, 32):
            if (plain := costs.costs.plain(size)) is not None:
                added = costs.costs.added
                per_pass = costs.costly_costs.per_pass(size)
                told[f"{name}, costs at {size}"] = text = (
                    f"plain {plain * 1e3:.2f} ms, {size} / {5 * size} draft tokens add {added(size, size) * 1e3:.2f} / "
                    f"{added(size, 5 * size) * 1e3:.2f}, a pass of the draft {(per_pass or 0) * 1e3:.2f}"
                )
                print(f"  {name}, costs at {size}: {text}")
    return told


def step_costs(engine: Engine, *, with_trees: bool = False) -> dict[str, Any]:
    """Milliseconds from a launch to its tokens: so many sequences of 512 tokens, with so many drafts each."""
    executor, pool = engine.executor, BlockPool(4096, 16, prefix_caching=False, scattered=True)
    assert isinstance(executor, PipelinedExecutor)
    told: dict[str, Any] = {}
    numbers = TREE_NUMBERS if with_trees else LINE_NUMBERS
    print(f"\nms a step, waited for: {numbers} draft tokens of each sequence{', in a tree' if with_trees else ''}")
    for batch in (1, 2, 4, 8, 16, 32):
        row = []
        for number in numbers:
            if number and batch * number > executor.room_for_drafts(batch):
                break
            scheduled = []
            for i in range(batch):
                sequence = Sequence(i, [1] * 512, SamplingParams(max_tokens=64, temperature=0.0))
                sequence.block_ids.extend(pool.allocate(36) or ())
                sequence.draft_ids = [1] * number
                if with_trees:  # each token has two after it
                    sequence.draft_parents = [(node - 2) // 2 for node in range(number)]
                scheduled.append(ScheduledSequence(sequence, 511, 1 + number, True, 0, number))
            step = build_batch(scheduled, 16)
            sampling = SamplingArraysBuilder(engine.config.vocab_size).build([item.sequence for item in scheduled])
            seconds = []
            for _ in range(12):
                start = time.perf_counter()
                executor.launch(step, sampling).wait()
                seconds.append(time.perf_counter() - start)
            row.append(round(sorted(seconds)[3] * 1e3, 2))
            for item in scheduled:
                pool.free(item.sequence.block_ids)
        told[str(batch)] = row
        print(f"  {batch:3} sequences: {' '.join(f'{ms:6.2f}' for ms in row)}", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    guesser = parser.add_mutually_exclusive_group()
    guesser.add_argument("--draft", type=Path, help="a draft model's folder")
    guesser.add_argument("--heads", type=Path, help="a folder of Medusa heads (widen_heads.py)")
    guesser.add_argument("--eagle", type=Path, help="the folder of an EAGLE-3 draft (widen_heads.py)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each category, at least a batch (8)")
    parser.add_argument("--num-tokens", type=int, default=5, help="most tokens of a draft (5)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--sampled", action="store_true", help="at batch 1 sampled, too")
    parser.add_argument("--quantization", default="none", help="what weights become at load: fp8, w8a8, w8, w4")
    arguments = parser.parse_args()
    settings = load_settings(
        env_file=None,
        environ={},
    )
    given: dict[Method, Path | None] = {
        "medusa": arguments.heads,
        "eagle3": arguments.eagle,
        "draft": arguments.draft,
    }
    method: Method = next((each for each, folder in given.items() if folder), "ngram")
    heads = arguments.heads or arguments.eagle
    speculation = SpeculationOptions(method, arguments.draft, heads, arguments.num_tokens)
    start = time.perf_counter()
    options = dataclasses.replace(
        engine_options(settings, arguments.model),
        prefix_caching=False,
        speculation=speculation,
        quantization=QuantizationType(arguments.quantization),
    )
    engine = load_engine(options)
    print(f"{torch.cuda.get_device_name()}; loaded in {time.perf_counter() - start:.1f} s; {engine.speculation_reason}")
    gc.freeze()
    every = methods(engine, arguments.num_tokens)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for batch in arguments.batch:
        result[f"batch {batch}, greedy"] = run_batch(engine, every, batch, arguments.prompts)
        if batch == 1 and arguments.sampled:
            result["batch 1, sampled"] = run_batch(engine, every, 1, arguments.prompts, is_sampled=True)
    result["about"] = about(every)
    result[f"ms of steps with {LINE_NUMBERS} drafts each"] = step_costs(engine)
    if heads:
        result[f"ms of steps with trees of {TREE_NUMBERS} drafts each"] = step_costs(engine, with_trees=True)
    engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
