"""How much of what each method drafts is right: the embedded model, its draft, its heads, prompts of five categories.

No time is measured, so a busy machine disturbs nothing. Every method drafts for every sequence at every step, whatever
it costs, and every answer is compared with the one without speculation. Prints tables, and one JSON line at the end.

    python benchmarks/speculation_acceptance.py                  # the figures of docs/results/speculation_acceptance.md
    python benchmarks/speculation_acceptance.py --prompts 2 --new-tokens 32
    python benchmarks/speculation_acceptance.py --draft FOLDER   # another draft model beside the shipped one
    python benchmarks/speculation_acceptance.py --model FOLDER   # a model of `train medusa --stage 2`, with its heads
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engine_speculation import Sums, add_figures, answer, figures_before
from speculation_setup import MODEL, Setup

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_draft_model
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.speculative.heads import find_heads, make_eagle, make_medusa
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

CATEGORIES = ("story", "chat", "copy", "code", "long_prefix")
MODES = ("greedy", "sampled")
IN_BREADTH = 13  # a tree of 5 * 13 tokens, cut to 64 with its root


def methods(setup: Setup, number: int, draft: Path | None) -> dict[str, Speculator]:
    config, context, model = setup.engine.config, setup.engine.scheduler.max_model_len, setup.options.folder
    medusa, eagle = find_heads(model, "medusa"), find_heads(model, "eagle3")
    costly: dict[str, Any] = {"draft (shipped)": setup.draft}
    if medusa is not None:
        costly[f"medusa, {number} tokens"] = make_medusa(medusa, model, config)
        costly["medusa, 63 tokens"] = make_medusa(medusa, model, config, breadth=IN_BREADTH)
    if eagle is not None:
        costly[f"eagle3, {number} tokens"] = make_eagle(eagle, model, config, context)
        costly["eagle3, 63 tokens"] = make_eagle(eagle, model, config, context, breadth=IN_BREADTH)
    if draft is not None:
        costly[f"draft ({draft.name})"] = load_draft_model(model, draft, setup.options)
    made = {"ngram": Speculator(number, make_free=NgramProposer, policy=Always(number))}
    return made | {name: Speculator(number, costly=each, policy=Always(number)) for name, each in costly.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    room = 64 * arguments.prompts  # for the largest trees of all
    setup = Setup(arguments.threads, arguments.num_tokens, max_num_batched_tokens=room, model=arguments.model)
    engine = setup.engine
    every = methods(setup, arguments.num_tokens, arguments.draft)
    result: dict[str, Any] = {}
    for mode in arguments.modes:
        params = setup.params(arguments.new_tokens, is_sampled=mode == "sampled", seed=1)
        found: dict[str, dict[str, Any]] = {name: {} for name in every}
        for category in CATEGORIES:
            asked = setup.prompts(category)[: arguments.prompts]
            engine.speculator = None
            expected = answer(engine, asked, params, Sums())
            for name, speculator in every.items():
                engine.speculator, sums, before = speculator, Sums(), figures_before(speculator)
                num_tokens, num_steps = tokens_and_steps(engine, asked, params, sums, expected)
                add_figures(speculator, before, sums)
                found[name][category] = {
                    "tokens_per_step": round(num_tokens / max(1, num_steps), 3),
                    "by_position": [
                        round(passed / tried, 2) for passed, tried in zip(sums.passed, sums.tried, strict=True) if tried
                    ],
                }
        result[mode] = found
        report(mode, found)
    for name, speculator in every.items():
        if name != "draft (shipped)":  # which is the setup's
            speculator.close()
    setup.close()
    return result


def tokens_and_steps(
    engine: Engine, asked: list[list[int]], params: SamplingParams, sums: Sums, expected: list[tuple[str, int]]
) -> tuple[int, int]:
    """The tokens of the answers without the first, which the prompt's step gives, and the steps of one sequence that
    gave them: each gives one token of its own and those of the draft that were right."""
    speculator = engine.speculator
    assert speculator is not None
    accepted_before, generated_before = speculator.num_accepted, engine.num_generated_tokens
    assert answer(engine, asked, params, sums) == expected, "speculation changed an answer"
    num_tokens = engine.num_generated_tokens - generated_before - len(asked)
    return num_tokens, num_tokens - (speculator.num_accepted - accepted_before)


def report(mode: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{mode}: tokens of a step; right by position, among drafts that were right before it\n")
    print(f"| | {' | '.join(CATEGORIES)} |\n|---|{'---|' * len(CATEGORIES)}")
    for name, cells in found.items():
        per_step = [f"{cells[category]['tokens_per_step']:.2f}" for category in CATEGORIES]
        print(f"| {name} | {' | '.join(per_step)} |")
    for name, cells in found.items():
        shares = "; ".join(f"{c} {' '.join(f'{x:.2f}' for x in cells[c]['by_position'])}" for c in CATEGORIES)
        print(f"  {name}: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each category, all at once (8)")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer (64)")
    parser.add_argument("--num-tokens", type=int, default=5, help="most tokens of a line (5)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="how tokens are chosen (both)")
    parser.add_argument("--threads", type=int, default=None, help="the engine's threads (measured)")
    parser.add_argument("--draft", type=Path, default=None, help="the folder of another draft model")
    parser.add_argument("--model", type=Path, default=MODEL, help="another model than the embedded one")
    arguments = parser.parse_args()
    print(json.dumps({"prompts": arguments.prompts, "result": run(arguments)}))


if __name__ == "__main__":
    main()
