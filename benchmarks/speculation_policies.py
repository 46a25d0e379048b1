"""Judge what the controller of speculation decides, without a clock: real answers, simulated steps.

`record` has the embedded model answer prompts, greedily and sampled, and notes what its draft model would have guessed
at every position (some minutes). From then on what a draft comes to is known whatever is drafted, so the real
speculator runs through the answers while each step takes what COSTS says, with noise. A table takes seconds, and tells
differences of 1 %, which a busy machine does not.

    python benchmarks/speculation_policies.py record
    python benchmarks/speculation_policies.py                    # the half that the controller may be tuned with
    python benchmarks/speculation_policies.py --half held-out --batch 1 4 8 --prompts 5
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from speculation_setup import CATEGORIES, Half, Setup

from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.request import RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.proposer import Computed, Draft
from autobot_llm.engine.speculative.speculator import Speculator

TRACES = Path.home() / ".cache" / "autobot_llm" / "speculation_traces.jsonl"
NUM_TOKENS = 5
ROOM = 256  # draft tokens of a step
BOOKKEEPING = 3e-6  # seconds for each sequence at each step


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the processor: a lone sequence's step, each further sequence, a draft token, a step's being
    verified at all, and what every six rows more cost, the kernels' tile. One thread of an AMD EPYC with AVX-512 in a
    busy virtual machine, November 2026."""

    plain: float
    sequence: float
    token: float
    verified: float = 0.07
    tile: float = 0.8

    def seconds(self, num_sequences: int, num_draft: int) -> float:
        tiles = -(-(num_sequences + num_draft) // 6)
        took = self.plain + self.tile * (tiles - 1) + self.sequence * (num_sequences - 1) + self.token * num_draft
        return (took + self.verified * (num_draft > 0)) / 1e3


COSTS = {"greedy": Costs(1.51, 0.40, 0.28), "sampled": Costs(1.87, 0.53, 0.35)}


@dataclass(frozen=True)
class Trace:
    """An answer, and the draft model's guesses after each of its tokens."""

    mode: str
    category: str
    is_held_out: bool
    num_prompt_tokens: int
    token_ids: list[int]
    guesses: list[list[int]]


class Clock:
    """Time that passes as it is told to, with a busy machine's noise: it only ever adds."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self._rng = random.Random(seed)

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        spike = self._rng.random() * 0.5 if self._rng.random() < 0.05 else 0.0
        self.now += seconds * (1.0 + 0.03 * abs(self._rng.gauss(0.0, 1.0)) + spike)


class RecordedDraft:
    """CostlyProposer that guesses what the draft model did."""

    name = "draft"
    wanted = None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._traces: dict[int, Trace] = {}
        self._num_seen: dict[int, int] = {}

    def follow(self, sequence: Sequence, trace: Trace) -> None:
        self._traces[sequence.id] = trace

    def observe(self, computed: SequenceABC[Computed], features: object) -> None:
        raise AssertionError("it wants nothing")

    def lag(self, sequence: Sequence) -> int:
        return max(1, len(sequence.token_ids) - self._num_seen.get(sequence.id, 0))

    def num_passes(self, num_tokens: int) -> int:
        return num_tokens

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        num_behind = sum(self.lag(sequence) - 1 for sequence in sequences)
        self._clock.spend((num_tokens * (0.25 + 0.15 * len(sequences)) + 0.04 * num_behind) / 1e3)
        drafts: list[Draft | None] = []
        for sequence in sequences:
            trace = self._traces[sequence.id]
            self._num_seen[sequence.id] = len(sequence.token_ids)
            guess = trace.guesses[len(sequence.token_ids) - trace.num_prompt_tokens - 1][:num_tokens]
            drafts.append(Draft(list(guess)) if guess else None)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._traces.pop(sequence.id, None)
        self._num_seen.pop(sequence.id, None)

    def close(self) -> None:
        pass


def record() -> None:
    setup = Setup(None, NUM_TOKENS)
    lines = []
    for mode in COSTS:
        for category in CATEGORIES:
            title = f"{mode} {category}"
            for number, ids in enumerate(
                track(setup.prompts(category), title, transient=True, console=Console(stderr=True))
            ):
                params = setup.params(128, is_sampled=mode == "sampled", seed=number)
                (answer,) = setup.answers([(ids, params)])
                token_ids = [*ids, *answer]
                double = Sequence(len(lines) + 10**6, token_ids, params)
                guesses = []
                for end in range(len(ids) + 1, len(token_ids)):
                    double.token_ids = token_ids[:end]
                    (draft,) = setup.draft.propose([double], NUM_TOKENS)
                    guesses.append([] if draft is None else draft.token_ids)
                setup.draft.forget(double)
                trace = Trace(mode, category, number % 2 == 1, len(ids), token_ids, guesses)
                lines.append(json.dumps(asdict(trace)))
    setup.close()
    TRACES.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} answers in {TRACES}")


def run(traces: list[Trace], speculator: Speculator | None, draft: RecordedDraft, clock: Clock) -> tuple[float, int]:
    """Seconds that answers take at once, without noise, and the draft tokens that were verified."""
    live = []
    for number, trace in enumerate(traces):
        params = SamplingParams(max_tokens=10**6, temperature=0.0 if trace.mode == "greedy" else 0.8)
        sequence = Sequence(number, trace.token_ids[: trace.num_prompt_tokens + 1], params)
        if len(sequence.token_ids) < len(trace.token_ids):
            draft.follow(sequence, trace)
            live.append((sequence, trace))
    costs, total, num_verified, step_cost = COSTS[traces[0].mode], 0.0, 0, StepCost()
    while live:
        begin = clock.now
        if speculator is not None:
            clock.now += BOOKKEEPING * len(live)
            speculator.propose([sequence for sequence, _ in live], ROOM)
        total += clock.now - begin
        items, num_right = [], []
        for sequence, trace in live:
            start = len(sequence.token_ids)
            came = trace.token_ids[start:]
            draft_ids = sequence.draft_ids = sequence.draft_ids[: len(came)]
            right = next((i for i, pair in enumerate(zip(draft_ids, came, strict=False)) if pair[0] != pair[1]), None)
            num_right.append(min(len(draft_ids) if right is None else right, len(came) - 1))
            items.append(ScheduledSequence(sequence, start - 1, 1 + len(draft_ids), True, 0, len(draft_ids)))
        num_draft = sum(item.num_draft for item in items)
        num_verified += num_draft
        took = costs.seconds(len(live), num_draft)
        total += took
        clock.spend(took)
        plan = StepPlan(tuple(items), len(live) + num_draft, 0, num_draft)
        if speculator is not None and num_draft:
            speculator.record(plan, num_right, clock.now - begin, [RequestStats() for _ in live])
        elif speculator is not None:
            speculator.record_plain(plan, clock.now - begin, step_cost)
        going_on = []
        for (sequence, trace), right in zip(live, num_right, strict=True):
            sequence.token_ids = trace.token_ids[: len(sequence.token_ids) + right + 1]
            sequence.draft_ids = []
            if len(sequence.token_ids) < len(trace.token_ids):
                going_on.append((sequence, trace))
            elif speculator is not None:
                speculator.forget(sequence)
        live = going_on
    return total, num_verified


def compare(traces: list[Trace], half: Half, sizes: list[int], num_prompts: int, num_seeds: int) -> None:
    kept = [trace for trace in traces if half == "all" or trace.is_held_out == (half == "held-out")]
    gains = []
    print(f"auto against off, simulated, prompts: {half}", *(f"{category:>6}" for category in CATEGORIES))
    for size in sizes:
        for mode in COSTS:
            seconds: dict[tuple[str, bool], float] = defaultdict(float)
            of = {c: [t for t in kept if (t.mode, t.category) == (mode, c)][:num_prompts] for c in CATEGORIES}
            for seed in range(num_seeds):
                clock = Clock(seed)
                draft = RecordedDraft(clock)
                speculator = Speculator(NUM_TOKENS, make_free=NgramProposer, costly=draft, clock=clock)
                for start in range(0, max(map(len, of.values())), size):
                    for category in CATEGORIES:
                        if batch := of[category][start : start + size]:
                            seconds[category, True] += run(batch, speculator, draft, clock)[0]
                            seconds[category, False] += run(batch, None, draft, Clock(0))[0]
            row = [seconds[category, False] / seconds[category, True] for category in CATEGORIES]
            gains += row
            print(f"  {mode:8} {size} at once  ", *(f"{ratio:6.3f}" for ratio in row))
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    print(f"  geometric mean {mean:.3f}, worst {min(gains):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("compare", "record"), default="compare")
    parser.add_argument("--half", choices=("tuning", "held-out", "all"), default="tuning", help="of the prompts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="answers at once (1 8)")
    parser.add_argument("--prompts", type=int, default=25, help="of each category at most (25)")
    parser.add_argument("--seeds", type=int, default=3, help="runs with other noise (3)")
    arguments = parser.parse_args()
    if arguments.what == "record":
        record()
        return
    if not TRACES.exists():
        parser.error(f"{TRACES} is not there: run `python benchmarks/speculation_policies.py record` first")
    traces = [Trace(**json.loads(line)) for line in TRACES.read_text().splitlines()]
    compare(traces, arguments.half, arguments.batch, arguments.prompts, arguments.seeds)


if __name__ == "__main__":
    main()
