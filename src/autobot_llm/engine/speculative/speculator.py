"""Drafts for the engine's next step, and what came of them. Knows proposers, the controller and sequences; tensors it
hands on, and knows nothing of what is in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import torch

from autobot_llm.engine.batching.draft_tree import depths, is_line
from autobot_llm.engine.batching.plan import StepBatch, StepPlan
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.executor import Executor, FeatureExecutor, Features
from autobot_llm.engine.request import RequestStats
from autobot_llm.engine.sequence import UNKNOWN_TOKEN, Sequence
from autobot_llm.engine.speculative.acceptance import Verdict
from autobot_llm.engine.speculative.computed import computed_of, prompts_of
from autobot_llm.engine.speculative.controller import Controller
from autobot_llm.engine.speculative.experience import Experience
from autobot_llm.engine.speculative.figures import MethodFigures
from autobot_llm.engine.speculative.measurements import ON_CPU, AcceptanceHistory, Priors
from autobot_llm.engine.speculative.ngram import Observer
from autobot_llm.engine.speculative.policy import CostlyOffer, DraftPolicy, DraftResult
from autobot_llm.engine.speculative.possible import possible
from autobot_llm.engine.speculative.proposer import (
    CostlyProposer,
    Draft,
    FreeProposer,
    LaunchedDrafts,
    LaunchingProposer,
    ReadingProposer,
)
from autobot_llm.engine.speculative.rests import Rests

READ_EVERY = 16
"""Steps from one time that lookup takes in what the answers have got to the next, where nobody is drafted for."""
REHEARSED = (1, 1, 1, 32, 32)  # by how many tokens a sequence grows while a method's costs are measured


class _Launched(NamedTuple):
    """Drafts under way, whose they are, how deep, and the tokens that were caught up with for them."""

    drafts: LaunchedDrafts
    sequences: list[Sequence]
    num_tokens: int
    num_behind: int


class Speculator:
    """Sets the drafts of sequences that decode. `max_tokens` bounds each of them.

    `policy` None: by measured costs (`controller`). The free and the costly method are made by the caller; either may
    be None. `clock` is what costs are measured by: the time that the engine's thread computes, which leaves out the
    turns of other programs on its core. `num_steps` counts the steps that verified something.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        make_free: Callable[[Observer], FreeProposer] | None = None,
        costly: CostlyProposer | None = None,
        policy: DraftPolicy | None = None,
        floor: float | None = None,
        priors: Priors = ON_CPU,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        assert make_free is not None or costly is not None, "without a method there is nothing to do"
        self.max_tokens = max_tokens
        self.controller = Controller(max_tokens, floor, priors)
        self.figures: dict[str, MethodFigures] = {}
        self.num_steps = 0
        self.drafting_seconds = 0.0
        """What the costly method took in the step at hand, and looking in vain, where that is timed."""
        self._policy: DraftPolicy = self.controller if policy is None else policy
        self._free = None if make_free is None else make_free(self._observe_free)
        self.experience = Experience(max_tokens + 1, None if self._free is None else self._free.name)
        self._costly = costly
        self._reading = costly if isinstance(costly, ReadingProposer) else None
        self._launching = costly if isinstance(costly, LaunchingProposer) else None
        self._launched: _Launched | None = None  # whose drafts nobody but the device knows
        self._last_wanted: tuple[int, list[int]] = 0, []  # when drafts were launched last: how deep, and of whom
        self._num_behind = 0  # tokens of the drafts that are launched before they are wanted
        self._ready: tuple[list[Sequence], int] = [], 0  # those that were: whose, and how deep
        self._goes_on = False  # whether they are to be taken without a further look
        self._is_ready = self._was_ready = False  # whether they were taken by the step at hand, and by the one settled
        self._wanted = None if costly is None else costly.wanted
        self._features = Features()  # of the step at hand
        self.clock = clock
        self._rests = Rests(may_rest=policy is None and not priors.is_shared)
        self._num_unread = 0  # steps
        self._num_known = 0  # of the sequences that were looked at last, those that have not left
        # by sequence id: method, kind and the parents of a tree, of the step at hand
        self._drafted_by: dict[int, tuple[str, str, list[int]]] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(method.name for method in (self._free, self._costly) if method is not None)

    @property
    def num_proposed(self) -> int:
        return sum(figures.num_proposed for figures in self.figures.values())

    @property
    def num_accepted(self) -> int:
        return sum(figures.num_accepted for figures in self.figures.values())

    @property
    def acceptance_rate(self) -> float:
        """Share of verified draft tokens that were accepted, since the start; 0 where none was verified."""
        return self.num_accepted / max(1, self.num_proposed)

    def lines(self) -> dict[str, str]:
        """Each method's figures in words: `{"acceptance of ngram": "83% of 1,204 tokens; by position 90% 80%"}`."""
        return {f"acceptance of {method}": str(figures) for method, figures in self.figures.items()}

    def rehearse(self, sequence: Sequence) -> None:
        """Find out what the costly method takes, a pass and a token to catch up with, on a sequence that nobody asked
        for: answers are too short to pay for that, and without it would never see a draft."""
        costly = self._costly
        assert costly is not None, "there is something to rehearse"
        for number in (0, *REHEARSED):
            sequence.token_ids.extend([sequence.token_ids[0]] * number)
            num_behind, start = costly.lag(sequence) - 1, self.clock()
            if costly.propose([sequence], 1) == [None]:  # its cache is too small
                break
            if number:  # else it was the first time, with all that that takes
                self.controller.costly_costs.record(1, costly.num_passes(1), num_behind, self.clock() - start)
        costly.forget(sequence)

    def rests(self) -> bool:
        """Whether the step at hand is better left alone: then neither `propose` nor `record_plain` is called for it,
        and it has no drafts."""
        return self._rests.passes()

    @property
    def watches_steps(self) -> bool:
        """Whether `execute` and `observe` have something to do in every step, those that rest included."""
        return self._wanted is not None

    def propose(
        self, sequences: list[Sequence], room: int, *, takes_trees: bool = False, may_wait: bool = False
    ) -> None:
        """Set the drafts of the sequences that the next step may decode, which has `room` for so many tokens of them.
        Unless what runs it `takes_trees`, they are the best paths of those that branch. With `may_wait` some may be
        known to the device alone until `settle`, which is then called before the step's verdict."""
        self.drafting_seconds = 0.0
        self._is_ready = False
        if num_rested := self._rests.take():
            self.controller.pass_over(num_rested)
        for sequence in sequences:
            if sequence.draft_ids:
                sequence.draft_ids, sequence.draft_parents, sequence.draft_rows = [], [], []
        if sequences and room >= len(sequences):
            self._look(sequences, room, takes_trees, may_wait)
        self._ready = [], 0
        if self._launching is not None and self._launched is None:
            self._launching.drop_behind()

    def _look(self, sequences: list[Sequence], room: int, takes_trees: bool, may_wait: bool) -> None:
        start = self.clock() if self._rests.may_rest else 0.0
        self._num_known = len(sequences)
        free, costly = self._free, self._costly
        drafts, histories = self._look_up(sequences)
        offer = self._offer(costly, sequences) if costly is not None and self._policy.wants_offer() else None
        has_any = offer is not None or histories.count(None) < len(histories)
        decision = self._policy.decide(histories, offer, room) if has_any else None
        self._rests.looked(is_in_vain=decision is None)
        if decision is None:
            if self._rests.may_rest:
                self.drafting_seconds = self.clock() - start
            return
        self._is_ready = offer is not None and offer.has_ready(decision.num_costly, decision.costly_for)
        self._drafted_by.clear()
        for sequence, draft, number in zip(sequences, drafts, decision.num_free, strict=True):
            if number and draft is not None and free is not None:
                self._give(sequence, draft.first(number), free.name, draft.kind, takes_trees)
        if costly is not None and decision.num_costly:
            wanting = [sequences[i] for i in decision.costly_for]
            if not (may_wait and self._launch_costly(wanting, decision.num_costly)):
                self._run_costly(costly, wanting, decision.num_costly, takes_trees)

    def look_ahead(self, sequences: list[Sequence], room: int) -> None:
        """Decide beforehand, while a device verifies drafts, whether those that were queued behind them are taken. Call
        it whenever some may have been: an older decision is not about them."""
        ready, num_ready = self._ready
        if self._costly is not None and num_ready and ready == sequences:
            _, histories = self._look_up(sequences)
            offer = self._offer(self._costly, sequences, are_under_way=True)
            self._goes_on = self._policy.goes_on(histories, offer, room)

    def go_on(self, sequences: list[Sequence], room: int) -> bool:
        """Take the drafts that are under way, if that was decided and nobody has come or gone; else ask `propose`."""
        goes_on, self._goes_on = self._goes_on, False
        ready, num_tokens = self._ready
        if not goes_on or ready != sequences or room < num_tokens * len(sequences):
            return False
        self._ready = [], 0
        self._is_ready = self._launch_costly(sequences, num_tokens)
        return self._is_ready

    def read(self, plan: StepPlan, features: Features) -> None:
        """Let the methods take in, while a device computes a step, what they would be late to look at when the first
        drafts are asked for: its prompts, of which a thousand tokens take lookup up to a millisecond, and now and then
        what came since, for there may be too many sequences to draft for until some have left."""
        reading = self._reading
        if reading is not None and plan.num_prompt_tokens and len(plan.scheduled) <= reading.most_read:
            reading.take_in(list(prompts_of(plan)), features)
        if self._free is None:
            return
        self._num_unread += 1
        reads_answers = self._num_unread >= READ_EVERY
        if not (plan.num_prompt_tokens or reads_answers):
            return
        for sequence, start, num_tokens, *_ in plan.scheduled:
            if start < sequence.num_prompt_tokens:
                self._free.read(sequence, min(start + num_tokens, sequence.num_prompt_tokens - 1))
            elif reads_answers:
                self._free.read(sequence, start - 1)
        if reads_answers:
            self._num_unread = 0

    def launch_behind(self, plan: StepPlan) -> None:
        """Queue the drafts of the step after the one that was launched last, which verifies drafts that nobody knows
        yet: where it verifies them all, and the step before it had drafts of the same sequences, too."""
        launched = self._launched
        if launched is None or self._launching is None or not self._num_behind:
            return
        first_rows, row = [], 0
        for item in plan.scheduled:
            if item.num_draft != launched.num_tokens:
                return
            first_rows.append(row)
            row += 1 + item.num_draft
        sequences = [item.sequence for item in plan.scheduled]
        if sequences == launched.sequences and self._launching.launch_behind(sequences, self._num_behind, first_rows):
            self._ready = sequences, self._num_behind

    def settle(self) -> None:
        """Fill in the drafts that were launched, where there are any: waits for them."""
        launched, self._launched = self._launched, None
        self._was_ready = self._is_ready
        if launched is None:
            return
        drafts, self.drafting_seconds = launched.drafts.wait()
        for sequence, draft in zip(launched.sequences, drafts, strict=True):
            if sequence.draft_rows:  # else it has left
                sequence.draft_rows = []
                token_ids = [] if draft is None else draft.token_ids
                sequence.draft_ids[: len(token_ids)] = token_ids
        assert self._costly is not None
        self._record_costly(self._costly, launched.sequences, launched.num_tokens, launched.num_behind)

    def execute(self, executor: Executor, batch: StepBatch) -> torch.Tensor:
        """Run a step of the target; returns logits_RV. What the costly method wants of it is kept for `observe`."""
        if self._wanted is None:
            return executor.execute(batch)
        assert isinstance(executor, FeatureExecutor), "who makes a method has looked"
        logits_RV, self._features = executor.execute_with_features(batch, self._wanted)
        return logits_RV

    def observe(self, plan: StepPlan, verdicts: SequenceABC[Verdict] = (), features: Features | None = None) -> None:
        """Let the costly method see the step that was computed and resolved. `verdicts` are of the items that sample,
        in the plan's order; none: there were no drafts. `features` None: those of `execute`."""
        if self._costly is None or self._wanted is None:
            return
        if features is None:
            features, self._features = self._features, Features()
        self._costly.observe(list(computed_of(plan, verdicts)), features)

    def is_promising(self, sequences: list[Sequence], room: int) -> bool:
        """Whether drafts after tokens that a step under way samples may be worth waiting for these, as many as there is
        `room` for. The sequences' other tokens are known."""
        if not sequences or room < len(sequences):  # where not everybody gets a draft, a device's step saves nothing
            return False
        _, histories = self._look_up(sequences)
        offer = None if self._costly is None else self._offer(self._costly, sequences)
        if offer is None and all(history is None for history in histories):
            return False
        return self._policy.may_pay(histories, offer, room)

    def record_plain(self, plan: StepPlan, seconds: float, step_cost: StepCost) -> None:
        """Learn from a step without drafts, which took so long, in vain drafting included."""
        if plan.num_prompt_tokens or self._rests.may_rest:  # then one may have passed unseen
            self.controller.costs.learn_prompt_token(step_cost.seconds_per_prompt_token)
        if not plan.num_prompt_tokens:
            self.controller.record_step(len(plan.scheduled), 0, seconds, self.drafting_seconds)

    def record(
        self, plan: StepPlan, num_accepted: SequenceABC[int], seconds: float, stats: SequenceABC[RequestStats]
    ) -> None:
        """Learn from a step with drafts that took so long, drafting included. `num_accepted` and `stats` are of the
        items that sample, in the plan's order."""
        self.num_steps += 1
        num_scheduled = len(plan.scheduled)
        plain = self.controller.costs.plain(num_scheduled) if plan.num_prompt_tokens == 0 else None
        sampling = (item for item in plan.scheduled if item.samples)
        results: list[DraftResult] = []
        for item, number, figures in zip(sampling, num_accepted, stats, strict=True):
            figures.num_draft_tokens += item.num_draft
            figures.num_accepted_tokens += number
            if plain is not None:
                figures.seconds_saved += (1 + number) * plain - seconds
            if item.num_draft:
                method, kind, parents = self._drafted_by[item.sequence.id]
                depth = max(depths(parents[: item.num_draft])) if parents else item.num_draft
                self.figures.setdefault(method, MethodFigures()).record(item.num_draft, depth, number)
                is_costly = self._free is None or method != self._free.name
                results.append(DraftResult(item.num_draft, number, is_costly))
                if is_costly:  # a free method is observed whatever is verified
                    tried = min(depth, number + 1)
                    self.experience.record(method, kind, item.sequence.id, tried, number)
        if plan.num_prompt_tokens == 0:
            took, was_ready = self.drafting_seconds, self._was_ready
            self.controller.record_step(num_scheduled, plan.num_draft_tokens, seconds, took, was_ready=was_ready)
            self.controller.settle(num_scheduled, results, was_ready=was_ready)

    def forget(self, sequence: Sequence) -> None:
        self.experience.forget(sequence.id)
        self._num_known -= 1
        if self._num_known <= 0:
            self._rests.start_over()
        self.controller.welcome_next()
        if self._free is not None:
            self._free.forget(sequence)
        if self._costly is not None:
            self._costly.forget(sequence)

    def close(self) -> None:
        if self._costly is not None:
            self._costly.close()

    def _run_costly(
        self, costly: CostlyProposer, sequences: list[Sequence], num_tokens: int, takes_trees: bool
    ) -> None:
        num_behind = sum(costly.lag(s) - 1 for s in sequences)
        start = self.clock()
        drafts = costly.propose(sequences, num_tokens)
        self.drafting_seconds = self.clock() - start
        for sequence, draft in zip(sequences, drafts, strict=True):
            if draft is not None:
                self._give(sequence, draft, costly.name, self._kind(sequence), takes_trees)
        self._record_costly(costly, sequences, num_tokens, num_behind)

    def _launch_costly(self, sequences: list[Sequence], num_tokens: int) -> bool:
        """Queue the costly method's drafts, if it does that; the step that verifies them can be queued behind."""
        if self._launching is None:
            return False
        num_behind = sum(self._launching.lag(s) - 1 for s in sequences)
        launched = self._launching.launch(sequences, num_tokens)
        if launched is None:
            return False
        for sequence, rows in zip(sequences, launched.rows, strict=True):
            sequence.draft_ids, sequence.draft_parents = [UNKNOWN_TOKEN] * len(rows), []
            sequence.draft_rows = rows
            self._drafted_by[sequence.id] = self._launching.name, self._kind(sequence), []
        before, self._last_wanted = self._last_wanted, (num_tokens, [sequence.id for sequence in sequences])
        self._num_behind = max(num_tokens, before[0]) if before[1] == self._last_wanted[1] else 0
        self._launched = _Launched(launched, sequences, num_tokens, num_behind)
        return True

    def _record_costly(
        self, costly: CostlyProposer, sequences: list[Sequence], num_tokens: int, num_behind: int
    ) -> None:
        costs = self.controller.costly_costs
        costs.record(len(sequences), costly.num_passes(num_tokens), num_behind, self.drafting_seconds)
        if given := sum(len(sequence.draft_ids) for sequence in sequences):
            costs.record_tokens(len(sequences), num_tokens, given)

    def _give(self, sequence: Sequence, draft: Draft, method: str, kind: str, takes_trees: bool) -> None:
        draft = possible(draft if takes_trees else draft.as_line(), sequence)
        parents = draft.parents or []
        sequence.draft_ids, sequence.draft_parents = draft.token_ids, [] if is_line(parents) else parents
        self._drafted_by[sequence.id] = method, kind, sequence.draft_parents

    def _kind(self, sequence: Sequence) -> str:
        """Of a costly method's drafts: a model agrees with another's best token more often than with a drawn one."""
        return "greedy" if sequence.params.is_greedy else "sampled"

    def _look_up(self, sequences: list[Sequence]) -> tuple[list[Draft | None], list[AcceptanceHistory | None]]:
        """What the free method has for each, and how drafts like that went, if they may be used."""
        drafts: list[Draft | None] = [None] * len(sequences)
        histories: list[AcceptanceHistory | None] = [None] * len(sequences)
        places: dict[int, str] = {}
        if (free := self._free) is not None:
            for i, sequence in enumerate(sequences):
                if (draft := free.propose(sequence, self.max_tokens + 1)) is not None:
                    drafts[i], histories[i] = draft, self._usable(free.name, draft.kind)
                    places[sequence.id] = draft.kind
        self.experience.look(places)
        return drafts, histories

    def _offer(self, costly: CostlyProposer, sequences: list[Sequence], *, are_under_way: bool = False) -> CostlyOffer:
        usable = {kind: self._usable(costly.name, kind) is not None for kind in set(map(self._kind, sequences))}
        histories = [
            self.experience.here(costly.name, kind, sequence.id) if usable[kind := self._kind(sequence)] else None
            for sequence in sequences
        ]
        ready, num_ready = self._ready
        return CostlyOffer(
            histories,
            [1 if are_under_way else costly.lag(sequence) for sequence in sequences],
            costly.num_passes,
            num_ready if ready == sequences else 0,
            sum(sequence.max_num_tokens - len(sequence.token_ids) for sequence in sequences) / len(sequences),
        )

    def _usable(self, method: str, kind: str) -> AcceptanceHistory | None:
        history = self.experience.of_kind(method, kind)
        return history if self.controller.is_allowed(history) else None

    def _observe_free(self, kind: str, tried: int, passed: int) -> None:
        assert self._free is not None
        self.experience.of_kind(self._free.name, kind).record(tried, passed)
