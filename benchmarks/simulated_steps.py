"""Engines without a model: recorded answers, drafts that were recorded with them, and steps that take what a table
says. Knows the speculator as the engine does; knows nothing of what is compared."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.gpu.graph_sizes import CHAIN_SIZES, padded_size
from autobot_llm.engine.request import RequestStats
from autobot_llm.engine.sequence import UNKNOWN_TOKEN, SamplingParams, Sequence
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.ngram import NgramProposer, Observer
from autobot_llm.engine.speculative.proposer import Computed, Draft, LaunchedDrafts
from autobot_llm.engine.speculative.speculator import Speculator

NEW_TOKENS = 160
"""The most of an answer."""

GOING_ON = 0.5
"""Of the host's time between tokens and a launch, where the drafts that are under way are taken without a look."""

MOST_MISSING = 5
"""Tokens of a sequence that the first pass of a chain takes, for the draft's shape."""


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
    booking: float
    """Beside that, for each step that does not rest: deciding, measuring and the books."""
    is_beside_host: bool

    def step(self, mode: str, num_sequences: int, num_draft: int) -> float: ...

    def drafting(self, mode: str, num_sequences: int, num_tokens: int, num_behind: int) -> float:
        """Pass by pass, waited for."""
        ...

    def chain(self, mode: str, num_tokens: int, missing: list[int]) -> float | None:
        """So many passes that are launched at once, with the step behind them, where the first one takes so many tokens
        of each sequence; None: that is too many."""
        ...

    def gap(self, num_sequences: int) -> float:
        """From the tokens of a step to the launch of one with drafts, what was looked at included."""
        ...

    def noise(self, rng: random.Random) -> float:
        """What a step takes longer, of its time: a busy machine only ever adds."""
        ...


@dataclass(frozen=True)
class CpuCosts:
    """Milliseconds of the processor: a lone sequence's step, each further sequence, a draft token, and the draft's pass
    over one; a step's being verified at all, what every six rows more cost, the kernels' tile, and what a pass takes
    however few there are."""

    plain: float
    sequence: float
    token: float
    drafted: float
    verified: float = 0.22
    tile: float = 0.5
    draft_pass: float = 0.06


CPU_COSTS = {"greedy": CpuCosts(1.12, 0.16, 0.125, 0.12), "sampled": CpuCosts(1.49, 0.2, 0.17, 0.3)}


class Cpu:
    """One thread of an AMD EPYC with AVX-512 in a virtual machine, the embedded model, November 2026."""

    room = 256
    looking = 15e-6
    booking = 45e-6
    is_beside_host = False

    def step(self, mode: str, num_sequences: int, num_draft: int) -> float:
        costs = CPU_COSTS[mode]
        tiles = -(-(num_sequences + num_draft) // 6)
        took = costs.plain + costs.tile * (tiles - 1) + costs.sequence * (num_sequences - 1) + costs.token * num_draft
        return (took + costs.verified * (num_draft > 0)) / 1e3

    def drafting(self, mode: str, num_sequences: int, num_tokens: int, num_behind: int) -> float:
        costs = CPU_COSTS[mode]
        return (num_tokens * (costs.draft_pass + costs.drafted * num_sequences) + 0.015 * num_behind) / 1e3

    def chain(self, mode: str, num_tokens: int, missing: list[int]) -> None:
        return None

    def gap(self, num_sequences: int) -> float:
        return 0.0

    def noise(self, rng: random.Random) -> float:
        return 0.03 * abs(rng.gauss(0.0, 1.0)) + (rng.random() * 0.5 if rng.random() < 0.05 else 0.0)


@dataclass(frozen=True)
class Gpu:
    """Mistral-7B's shape on an H200, its draft widened to 68M, November 2026. Milliseconds by `sizes`, numbers of
    sequences: a step without drafts, beside the host; what having drafts adds, and each of their tokens; a pass of the
    draft that is launched by itself, and one of a chain, greedy or drawn; what the host takes to launch a step after it
    has waited. `catching_up`: a pass that catches up, and `behind`: each token of that; `waiting`: what a step without
    drafts takes longer where the host waited before it."""

    sizes: tuple[int, ...] = (1, 8, 16, 32, 128)
    plain: tuple[float, ...] = (3.66, 4.0, 4.18, 4.3, 5.4)
    drafted: tuple[float, ...] = (0.34, 0.75, 0.9, 1.3, 2.5)
    token: tuple[float, ...] = (0.005, 0.01, 0.012, 0.012, 0.02)
    draft_pass: tuple[float, ...] = (0.2, 0.43, 0.44, 0.45, 1.0)
    chain_pass: tuple[float, ...] = (0.068, 0.1, 0.12, 0.14, 0.25)
    drawn_pass: tuple[float, ...] = (0.095, 0.19, 0.25, 0.35, 0.9)
    launching: tuple[float, ...] = (0.28, 0.45, 0.6, 0.8, 1.6)
    catching_up: float = 0.3
    behind: float = 0.001
    waiting: float = 0.24
    looking: float = 0.0
    booking: float = 0.0
    room: int = 128
    is_beside_host: bool = True

    def step(self, mode: str, num_sequences: int, num_draft: int) -> float:
        added = self._at(self.drafted, num_sequences) + num_draft * self._at(self.token, num_sequences)
        return (self._at(self.plain, num_sequences) + added * (num_draft > 0)) / 1e3

    def drafting(self, mode: str, num_sequences: int, num_tokens: int, num_behind: int) -> float:
        catching_up = self.catching_up * (num_behind > 2 * num_sequences) + self.behind * num_behind
        return (num_tokens * self._at(self.draft_pass, num_sequences) + catching_up) / 1e3

    def chain(self, mode: str, num_tokens: int, missing: list[int]) -> float | None:
        size = padded_size(len(missing), CHAIN_SIZES)
        if size is None:
            return None
        each = self._at(self.chain_pass if mode == "greedy" else self.drawn_pass, len(missing))
        took = 0.03 + num_tokens * each
        if max(missing) > MOST_MISSING or sum(missing) > max(16, 4 * size):
            took += self.catching_up + self.behind * sum(missing)
        return took / 1e3

    def gap(self, num_sequences: int) -> float:
        return self._at(self.launching, num_sequences) / 1e3

    def noise(self, rng: random.Random) -> float:
        return 0.012 * abs(rng.gauss(0.0, 1.0)) + (rng.random() * 0.3 if rng.random() < 0.02 else 0.0)

    def _at(self, values: tuple[float, ...], num_sequences: int) -> float:
        return float(np.interp(num_sequences, self.sizes[: len(values)], values))


MACHINES: dict[str, Machine] = {
    "cpu": Cpu(),
    "gpu": Gpu(),
    "gpu, fp8 weights": Gpu(plain=(2.2, 2.7, 2.9, 3.3, 4.6)),
    "gpu, a slow host": Gpu(launching=(0.5, 0.8, 1.0, 1.4, 2.4), draft_pass=(0.35, 0.6, 0.65, 0.7, 1.2)),
    "gpu, a dearer draft": Gpu(
        chain_pass=(0.3, 0.4, 0.45, 0.5, 0.9),
        drawn_pass=(0.34, 0.5, 0.6, 0.8, 1.8),
        draft_pass=(0.4, 0.55, 0.6, 0.65, 1.1),
        behind=0.004,
    ),
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


class _Chain(NamedTuple):
    """Passes under way: for whom, how many, how long."""

    sequences: list[Sequence]
    num_tokens: int
    seconds: float


class RecordedDraft:
    """LaunchingProposer that guesses what the draft model did."""

    name = "draft"
    wanted = None

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
        self._clock = clock
        self._traces: dict[int, Trace] = {}
        self._drafted: dict[int, list[int]] = {}
        """Of each sequence that was drafted for, its tokens and the guesses after them that were computed, too."""
        self._behind: _Chain | None = None
        self.launched = 0.0
        """Seconds of the chain that was launched for the step at hand."""
        self.behind = 0.0
        """And of the one that was queued behind the step before it, whoever takes it."""

    def follow(self, sequence: Sequence, trace: Trace, *, is_read: bool) -> None:
        """`is_read`: its prompt was taken in while the device computed it."""
        self._traces[sequence.id] = trace
        if is_read:
            self._drafted[sequence.id] = sequence.token_ids[:-1]

    def observe(self, computed: SequenceABC[Computed], features: object) -> None:
        raise AssertionError("it wants nothing")

    def lag(self, sequence: Sequence) -> int:
        ours, theirs = self._drafted.get(sequence.id, []), sequence.token_ids
        pairs = zip(ours, theirs, strict=False)
        same = next((i for i, (mine, other) in enumerate(pairs) if mine != other), min(len(ours), len(theirs)))
        return max(1, len(theirs) - same)

    def num_passes(self, num_tokens: int) -> int:
        return num_tokens

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        num_behind = sum(self.lag(sequence) - 1 for sequence in sequences)
        trace = self._traces.get(sequences[0].id)
        mode = "greedy" if trace is None else trace.mode
        self._clock.now += self._clock.noisy(self._machine.drafting(mode, len(sequences), num_tokens, num_behind))
        return [self._guess(sequence, num_tokens) for sequence in sequences]

    def launch(self, sequences: SequenceABC[Sequence], num_tokens: int) -> LaunchedDrafts | None:
        behind, self._behind = self._behind, None
        if behind is not None and behind.sequences == sequences and behind.num_tokens >= num_tokens:
            seconds = behind.seconds * num_tokens / behind.num_tokens
        else:
            missing = [self.lag(sequence) for sequence in sequences]
            found = self._machine.chain(self._traces[sequences[0].id].mode, num_tokens, missing)
            if found is None:
                return None
            seconds = self.launched = self._clock.noisy(found)
        drafts = [self._guess(sequence, num_tokens) for sequence in sequences]
        return LaunchedDrafts([list(range(num_tokens)) for _ in sequences], lambda: (drafts, seconds))

    def launch_behind(self, sequences: SequenceABC[Sequence], num_tokens: int, first_rows: list[int]) -> bool:
        found = self._machine.chain(self._traces[sequences[0].id].mode, num_tokens, [2] * len(sequences))
        if found is not None:
            self.behind = self._clock.noisy(found)
            self._behind = _Chain(list(sequences), num_tokens, self.behind)
        return found is not None

    def drop_behind(self) -> None:
        self._behind = None

    def forget(self, sequence: Sequence) -> None:
        self._traces.pop(sequence.id, None)
        self._drafted.pop(sequence.id, None)

    def close(self) -> None:
        pass

    def _guess(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        trace, token_ids = self._traces.get(sequence.id), sequence.token_ids
        if trace is None:  # a sequence that nobody asked for
            guess = [0] * num_tokens
        else:
            guess = trace.guesses[len(token_ids) - trace.num_prompt_tokens - 1][:num_tokens]
        self._drafted[sequence.id] = [*token_ids, *guess[:-1]]  # nobody has computed what follows the last one
        return Draft(list(guess)) if guess else None


class Looking(NgramProposer):
    """What takes so many seconds for each text that it looks at."""

    def __init__(self, observe: Observer, clock: Clock, seconds: float) -> None:
        super().__init__(observe)
        self._clock = clock
        self._seconds = seconds

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        self._clock.now += self._seconds
        return super().propose(sequence, num_tokens)


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
            params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0 if trace.mode == "greedy" else 0.8)
            sequence = Sequence(next(self._ids), trace.token_ids[: trace.num_prompt_tokens + 1], params)
            if len(sequence.token_ids) < len(trace.token_ids):
                is_read = self._machine.is_beside_host and len(traces) <= DraftModel.most_read
                self._draft.follow(sequence, trace, is_read=is_read)
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
                nothing = [0] * len(self._live)
                self._go_on(self._plan(nothing), nothing, speculator, clock.now - begin)
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
        clock, live, machine, draft = self._clock, self._live, self._machine, self._draft
        begin, room = clock.now, machine.room
        queued, draft.behind, draft.launched = draft.behind, 0.0, 0.0
        rests = speculator is None or (not machine.is_beside_host and speculator.rests())
        sequences, left = [sequence for sequence, _ in live], room - len(live)
        goes_on = speculator is not None and machine.is_beside_host and speculator.go_on(sequences, left)
        if speculator is not None and not rests and not goes_on:
            speculator.propose(sequences, left, may_wait=machine.is_beside_host)
        numbers = []
        for sequence, trace in live:
            numbers.append(min(len(sequence.draft_ids), len(trace.token_ids) - len(sequence.token_ids), left))
            left -= numbers[-1]
        num_draft = sum(numbers)
        # The device goes through what was queued behind the last step while the host prepares the next one. A chain is
        # launched half-way through that.
        host = machine.gap(len(live)) * (GOING_ON if goes_on else 1.0) if num_draft else 0.0
        clock.now += max(queued, host / 2 + max(draft.launched, host / 2))
        if not (num_draft or is_plain_run):
            if speculator is not None:
                speculator.settle()
            return False
        plan = self._plan(numbers)
        if speculator is not None:
            if num_draft:
                speculator.launch_behind(plan)
            speculator.settle()
            speculator.look_ahead(sequences, room - len(live))
        num_right = []
        for (sequence, trace), number in zip(live, numbers, strict=True):
            came = trace.token_ids[len(sequence.token_ids) :]
            sequence.draft_ids = sequence.draft_ids[:number]
            pairs = zip(sequence.draft_ids, came, strict=False)
            right = next((i for i, (mine, other) in enumerate(pairs) if mine != other), number)
            num_right.append(min(right, len(came) - 1))
        clock.now += clock.noisy(self._seconds(num_draft)) + machine.booking * (num_draft > 0)
        self._go_on(plan, num_right, speculator, None if rests else clock.now - begin)
        clock.now += machine.booking * (num_draft == 0 and not rests)
        return num_draft > 0

    def _plan(self, numbers: list[int]) -> StepPlan:
        """A step of all that are there, with so many drafts each."""
        items = [
            ScheduledSequence(sequence, len(sequence.token_ids) - 1, 1 + number, True, 0, number)
            for (sequence, _), number in zip(self._live, numbers, strict=True)
        ]
        return StepPlan(tuple(items), len(items) + sum(numbers), 0, sum(numbers))

    def _seconds(self, num_draft: int) -> float:
        return self._machine.step(self._live[0][1].mode, len(self._live), num_draft)

    def _go_on(
        self, plan: StepPlan, num_right: list[int], speculator: Speculator | None, seconds: float | None
    ) -> None:
        """What a step made of the sequences, which took so many seconds; None: nobody has measured it."""
        live = self._live
        if speculator is not None and seconds is not None and plan.num_draft_tokens:
            speculator.record(plan, num_right, seconds, [RequestStats() for _ in live])
        elif speculator is not None and seconds is not None:
            speculator.record_plain(plan, seconds, self._step_cost)
        self._live = []
        for (sequence, trace), right in zip(live, num_right, strict=True):
            sequence.token_ids = trace.token_ids[: len(sequence.token_ids) + right + 1]
            sequence.draft_ids = []
            if len(sequence.token_ids) < len(trace.token_ids):
                self._live.append((sequence, trace))
            elif speculator is not None:
                speculator.forget(sequence)
