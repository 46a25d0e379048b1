"""Judge what the controller of speculation decides, without a clock: real answers, simulated steps.

`record` has the embedded model answer prompts, greedily and sampled, and notes what its draft model would have guessed
at every position (some minutes). From then on what a draft comes to is known whatever is drafted, so the real
speculator runs through the answers while each step takes what a table says (simulated_steps.py), with noise. A table
takes seconds, and tells differences of 1 %, which a busy machine does not.

    python benchmarks/speculation_policies.py record
    python benchmarks/speculation_policies.py                    # the half that the controller may be tuned with
    python benchmarks/speculation_policies.py --half held-out --batch 1 4 8 --prompts 5
    python benchmarks/speculation_policies.py record --draft DRAFT --traces drafts.jsonl    # another draft model's
    python benchmarks/speculation_policies.py --traces drafts.jsonl --machine "gpu" "gpu, fp8 weights" --batch 1 8 32
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from simulated_steps import MACHINES, NEW_TOKENS, Clock, Looking, Machine, RecordedDraft, Simulation, Trace
from speculation_setup import DRAFT, Half, Setup

from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.measurements import ON_CPU, ON_GPU
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

TRACES = Path.home() / ".cache" / "autobot_llm" / "speculation_traces.jsonl"
CATEGORIES = ("chat", "copy", "story", "code", "long_prefix")
MODES = ("greedy", "sampled")
NUM_TOKENS = 5


def record(draft: Path, path: Path, number: int) -> None:
    setup = Setup(1, NUM_TOKENS, max_num_batched_tokens=512, draft=draft, max_prompt_tokens=1800)
    lines = []
    for mode in MODES:
        for category in CATEGORIES:
            asked = setup.prompts(category)[:number]
            for i, ids in enumerate(track(asked, f"{mode} {category}", transient=True, console=Console(stderr=True))):
                params = setup.params(NEW_TOKENS, is_sampled=mode == "sampled", seed=i)
                (answer,) = setup.answers([(ids, params)])
                token_ids = [*ids, *answer]
                double = Sequence(len(lines) + 10**6, token_ids, params)
                guesses = []
                for end in range(len(ids) + 1, len(token_ids)):
                    double.token_ids = token_ids[:end]
                    (guess,) = setup.draft.propose([double], NUM_TOKENS)
                    guesses.append([] if guess is None else guess.token_ids)
                setup.draft.forget(double)
                trace = Trace(mode, category, i % 2 == 1, len(ids), token_ids, guesses)
                lines.append(json.dumps(asdict(trace)))
    setup.close()
    path.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} answers in {path}")


def compare(traces: list[Trace], machine: Machine, size: int, num_prompts: int, num_seeds: int) -> dict[str, float]:
    """Speed of auto against off and against the best method that drafts always, by category."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for seed in range(num_seeds):
        clock = Clock(machine, seed)
        draft = RecordedDraft(machine, clock)
        simulation = Simulation(machine, clock, draft)
        make_free = partial(Looking, clock=clock, seconds=machine.looking)
        priors, always = ON_GPU if machine.is_beside_host else ON_CPU, Always(NUM_TOKENS)
        every = {
            "off": None,
            "ngram": Speculator(NUM_TOKENS, make_free=make_free, policy=always, clock=clock),
            "draft": Speculator(NUM_TOKENS, costly=draft, policy=always, clock=clock),
            "auto": Speculator(NUM_TOKENS, make_free=make_free, costly=draft, priors=priors, clock=clock),
        }
        if not machine.is_beside_host:  # as where an engine starts
            every["auto"].rehearse(Sequence(-1, [0, 0], SamplingParams(max_tokens=1, temperature=0.0)))
        rounds = []
        for category in CATEGORIES:
            mine = [trace for trace in traces if trace.category == category]
            asked = [mine[i % len(mine)] for i in range(max(size, min(num_prompts, len(mine))))] if mine else []
            rounds += [(category, asked[start : start + size]) for start in range(0, len(asked), size)]
        random.Random(seed).shuffle(rounds)
        for warm_up, (category, asked) in [(True, found) for found in rounds[:3]] + [
            (False, found) for found in rounds
        ]:
            for name, speculator in every.items():
                took = simulation.answer(asked, speculator)
                if not warm_up:
                    seconds[category, name] += took
    found = {}
    for category in CATEGORIES:
        if seconds[category, "auto"]:
            best = min(seconds[category, name] for name in ("off", "ngram", "draft"))
            found[category] = seconds[category, "off"] / seconds[category, "auto"]
            found[f"{category} beside the best"] = best / seconds[category, "auto"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("compare", "record"), default="compare")
    parser.add_argument("--half", choices=("tuning", "held-out", "all"), default="tuning", help="of the prompts")
    parser.add_argument("--machine", nargs="+", choices=MACHINES, default=["cpu"], help="whose costs (cpu)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="answers at once (1 8)")
    parser.add_argument("--prompts", type=int, default=16, help="of each category at most, at least a batch (16)")
    parser.add_argument("--seeds", type=int, default=3, help="runs with other noise, in another order (3)")
    parser.add_argument("--traces", type=Path, default=TRACES, help="the file of the recorded answers")
    parser.add_argument("--draft", type=Path, default=DRAFT, help="record: a draft model's folder (the shipped one)")
    arguments = parser.parse_args()
    if arguments.what == "record":
        record(arguments.draft, arguments.traces, 2 * arguments.prompts)
        return
    if not arguments.traces.exists():
        parser.error(f"{arguments.traces} is not there: run `python benchmarks/speculation_policies.py record` first")
    half: Half = arguments.half
    traces = [Trace(**json.loads(line)) for line in arguments.traces.read_text().splitlines()]
    kept = [trace for trace in traces if half == "all" or trace.is_held_out == (half == "held-out")]
    print(f"auto against off (against the best of off, n-grams always, the draft always); simulated, prompts: {half}")
    print(f"  {'':36}", *(f"{category:>13}" for category in CATEGORIES))
    gains, beside = [], []
    for machine in arguments.machine:
        for mode in MODES:
            for size in arguments.batch:
                of_mode = [trace for trace in kept if trace.mode == mode]
                if not of_mode:
                    continue
                found = compare(of_mode, MACHINES[machine], size, arguments.prompts, arguments.seeds)
                cells = []
                for category in CATEGORIES:
                    if category in found:
                        gains.append(found[category])
                        beside.append(found[f"{category} beside the best"])
                        cells.append(f"{gains[-1]:5.2f} ({beside[-1]:5.3f})")
                print(f"  {machine:20} {mode:8} {size:3} at once", *cells, flush=True)
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    print(f"  geometric mean {mean:.3f}, worst {min(gains):.3f}; beside the best: worst {min(beside):.3f}")


if __name__ == "__main__":
    main()
