"""Engines without a model: recorded answers, drafts that were recorded with them, and steps that take what a table
says. Knows the speculator as the engine does; knows nothing of what is compared."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.request import RequestStats
from autobot_llm.engine.sequence import UNKNOWN_TOKEN, SamplingParams, Sequence
from autobot_llm.engine.speculative.proposer import Computed, Draft
from autobot_llm.engine.speculative.speculator import Speculator


@dataclass(frozen=True)
class Trace:
    """An answer, and the draft model's guesses after each of its tokens."""

    mode: str
    category: str
    is_held_out: bool
    num_prompt_tokens: int
    token_ids: list[int]
    guesses: list[list[int]]


class Machine(Protocol):
    """What things take, in seconds. `room` is for draft tokens beside the sequences' own."""

    room: int
    looking: float
    """For each sequence that is looked at while nothing is computed."""
    is_beside_host: bool

    def step(self, mode: str, num_sequences: int, num_draft: int) -> float: ...

    def drafting(self, num_sequences: int, num_tokens: int, num_behind: int) -> float: ...

    def noise(self, rng: random.Random) -> float:
        """What a step takes longer, of its time: a busy machine only ever adds."""
        ...


@dataclass(frozen=True)
class CpuCosts:
    """Milliseconds of the processor: a lone sequence's step, each further sequence, a draft token, a step's being
    verified at all, and what every six rows more cost, the kernels' tile."""

    plain: float
    sequence: float
    token: float
    verified: float = 0.07
    tile: float = 0.8


CPU_COSTS = {"greedy": CpuCosts(1.51, 0.40, 0.28), "sampled": CpuCosts(1.87, 0.53, 0.35)}


class Cpu:
    """One thread of an AMD EPYC with AVX-512 in a busy virtual machine, the embedded model, November 2026."""

    room = 256
    looking = 3e-6
    is_beside_host = False

    def step(self, mode: str, num_sequences: int, num_draft: int) -> float:
        costs = CPU_COSTS[mode]
        tiles = -(-(num_sequences + num_draft) // 6)
        took = costs.plain + costs.tile * (tiles - 1) + costs.sequence * (num_sequences - 1) + costs.token * num_draft
        return (took + costs.verified * (num_draft > 0)) / 1e3

    def drafting(self, num_sequences: int, num_tokens: int, num_behind: int) -> float:
        return (num_tokens * (0.25 + 0.15 * num_sequences) + 0.04 * num_behind) / 1e3

    def noise(self, rng: random.Random) -> float:
        return 0.03 * abs(rng.gauss(0.0, 1.0)) + (rng.random() * 0.5 if rng.random() < 0.05 else 0.0)


@dataclass(frozen=True)
class Gpu:
    """Mistral-7B's shape on an H200, November 2026. Milliseconds by `sizes`, numbers of sequences: a step without
    drafts, beside the host; what having drafts adds, each of their tokens, and a pass of the draft. `catching_up`: a
    pass that catches up, and `behind`: each token of that. `waiting`: what a step without drafts takes longer where the
    host waited before it."""

    sizes: tuple[int, ...] = (1, 8, 16, 32, 128)
    plain: tuple[float, ...] = (3.61, 4.0, 4.18, 4.3, 5.4)
    drafted: tuple[float, ...] = (0.8, 0.7, 1.0, 2.4, 5.0)
    token: tuple[float, ...] = (0.02, 0.024, 0.034, 0.034, 0.034)
    draft_pass: tuple[float, ...] = (0.19, 0.43, 0.44, 0.45, 1.0)
    catching_up: float = 0.2
    behind: float = 0.001
    waiting: float = 0.35
    looking: float = 5e-6
    room: int = 128
    is_beside_host: bool = True

    def step(self, mode: str, num_sequences: int, num_draft: int) -> float:
        added = self._at(self.drafted, num_sequences) + num_draft * self._at(self.token, num_sequences)
        return (self._at(self.plain, num_sequences) + added * (num_draft > 0)) / 1e3

    def drafting(self, num_sequences: int, num_tokens: int, num_behind: int) -> float:
        catching_up = self.catching_up * (num_behind > 2 * num_sequences) + self.behind * num_behind
        return (num_tokens * self._at(self.draft_pass, num_sequences) + catching_up) / 1e3

    def noise(self, rng: random.Random) -> float:
        return 0.012 * abs(rng.gauss(0.0, 1.0)) + (rng.random() * 0.3 if rng.random() < 0.02 else 0.0)

    def _at(self, values: tuple[float, ...], num_sequences: int) -> float:
        return float(np.interp(num_sequences, self.sizes, values))


MACHINES: dict[str, Machine] = {
    "cpu": Cpu(),
    "gpu": Gpu(),
    "gpu, fp8 weights": Gpu(plain=(2.85, 3.0, 3.3, 3.5, 4.6), draft_pass=(0.16, 0.43, 0.44, 0.45, 1.0)),
    "gpu, no gaps": Gpu(drafted=(0.55, 0.6, 0.65, 0.7, 2.0), draft_pass=(0.12, 0.2, 0.25, 0.3, 0.6)),
    "gpu, a dearer draft": Gpu(draft_pass=(0.4, 0.55, 0.6, 0.65, 1.1), behind=0.004),
}


class Clock:
    """Time that passes as it is told to, with a busy machine's noise."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.now = 0.0
        self._machine = machine
        self._rng = random.Random(seed)

    def __call__(self) -> float:
        return self.now

    def noisy(self, seconds: float) -> float:
        return seconds * (1.0 + self._machine.noise(self._rng))


class RecordedDraft:
    """CostlyProposer that guesses what the draft model did."""

    name = "draft"
    wanted = None

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
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
        self._clock.now += self._clock.noisy(self._machine.drafting(len(sequences), num_tokens, num_behind))
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


class Simulation:
    """An engine whose sequences say what was recorded. `seconds` of what was answered, without noise on a CPU."""

    def __init__(self, machine: Machine, clock: Clock, draft: RecordedDraft) -> None:
        self._machine = machine
        self._clock = clock
        self._draft = draft
        self._ids = itertools.count()
        self._step_cost = StepCost()
        self._live: list[tuple[Sequence, Trace]] = []

    def answer(self, traces: list[Trace], speculator: Speculator | None) -> float:
        """Seconds that the answers take at once, after their prompts."""
        begin = self._clock.now
        for trace in traces:
            params = SamplingParams(max_tokens=10**6, temperature=0.0 if trace.mode == "greedy" else 0.8)
            sequence = Sequence(next(self._ids), trace.token_ids[: trace.num_prompt_tokens + 1], params)
            if len(sequence.token_ids) < len(trace.token_ids):
                self._draft.follow(sequence, trace)
                self._live.append((sequence, trace))
        if self._machine.is_beside_host:
            self._beside(speculator)
        else:
            while self._live:
                self._in_turn(speculator)
        return self._clock.now - begin

    def _beside(self, speculator: Speculator | None) -> None:
        """As Engine._draft_beside_device does: steps without drafts run beside the host, which waits where drafts after
        their tokens may pay."""
        clock, waited = self._clock, 0.0
        under_way = False
        while self._live:
            room = self._machine.room - len(self._live)
            if under_way:
                begin = clock.now
                clock.now += clock.noisy(self._seconds(0)) + waited
                waits = speculator is not None and room > 0 and self._is_promising(speculator, room)
                self._go_on([0] * len(self._live), speculator, clock.now - begin)
                under_way, waited = not waits, 0.0
            elif speculator is None or not self._in_turn(speculator, is_plain_run=False):
                under_way, waited = True, self._machine.waiting / 1e3 if isinstance(self._machine, Gpu) else 0.0

    def _is_promising(self, speculator: Speculator, room: int) -> bool:
        sequences = [sequence for sequence, _ in self._live]
        for sequence in sequences:
            sequence.token_ids.append(UNKNOWN_TOKEN)
        found = speculator.is_promising(sequences, room)
        for sequence in sequences:
            sequence.token_ids.pop()
        return found

    def _in_turn(self, speculator: Speculator | None, *, is_plain_run: bool = True) -> bool:
        """One step that is waited for; whether it had drafts. Without drafts it is left alone unless `is_plain_run`."""
        clock, live = self._clock, self._live
        begin, room = clock.now, self._machine.room
        if speculator is not None:
            clock.now += self._machine.looking * len(live)
            speculator.propose([sequence for sequence, _ in live], room - len(live))
        num_right = []
        left = room - len(live)
        for sequence, trace in live:
            came = trace.token_ids[len(sequence.token_ids) :]
            draft_ids = sequence.draft_ids = sequence.draft_ids[: min(len(came), left)]
            left -= len(draft_ids)
            right = next((i for i, pair in enumerate(zip(draft_ids, came, strict=False)) if pair[0] != pair[1]), None)
            num_right.append(min(len(draft_ids) if right is None else right, len(came) - 1))
        num_draft = room - len(live) - left
        if num_draft or is_plain_run:
            clock.now += clock.noisy(self._seconds(num_draft))
            self._go_on(num_right, speculator, clock.now - begin)
        return num_draft > 0

    def _seconds(self, num_draft: int) -> float:
        return self._machine.step(self._live[0][1].mode, len(self._live), num_draft)

    def _go_on(self, num_right: list[int], speculator: Speculator | None, seconds: float) -> None:
        """What a step of so many seconds made of the sequences."""
        live, items = self._live, []
        for sequence, _ in live:
            num_draft = len(sequence.draft_ids)
            items.append(ScheduledSequence(sequence, len(sequence.token_ids) - 1, 1 + num_draft, True, 0, num_draft))
        num_draft = sum(item.num_draft for item in items)
        plan = StepPlan(tuple(items), len(live) + num_draft, 0, num_draft)
        if speculator is not None and num_draft:
            speculator.record(plan, num_right, seconds, [RequestStats() for _ in live])
        elif speculator is not None:
            speculator.record_plain(plan, seconds, self._step_cost)
        self._live = []
        for (sequence, trace), right in zip(live, num_right, strict=True):
            sequence.token_ids = trace.token_ids[: len(sequence.token_ids) + right + 1]
            sequence.draft_ids = []
            if len(sequence.token_ids) < len(trace.token_ids):
                self._live.append((sequence, trace))
            elif speculator is not None:
                speculator.forget(sequence)
