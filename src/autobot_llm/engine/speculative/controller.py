"""Decide each step which drafts are worth their time, none of them included. Knows chances and seconds; knows nothing
of tokens or models.

The rule. A plain step of B sequences takes F + B m seconds: a part that all share, and each one's own. E draft tokens
add c(B, E), and bring a sequence g more tokens than its one, by cautious chances of each being reached and right. Until
every sequence has come as far as a plain step brings it, that is

    F / (1 + the least g) + the sum over sequences of (m + its part of c) / (1 + g)

seconds, which is what a choice is judged by; the best is taken if it is quicker than a plain step by MARGIN. The shared
part is saved only where everybody gets ahead: a draft for one of many must be worth its own time, else its owner would
be served at the expense of the others. For a lone sequence it is (plain + c) / (1 + g), the time of a token. All of it
is measured: chances by method, kind and place of a draft (experience.py), seconds by size of step (measurements.py).
Where a costly method's next drafts are under way, c is what steps with such have taken longer: a device computes them
while the host is busy anyway. A free draft in their place is charged with the method's beginning anew.

The guarantee. Expectations may be wrong, so nothing is drafted whose cost could not be lost whole (credit.py): there is
one account, of what drafts have gained lately less what they have cost, verifying, drafting, catching up and looks all
included. So whatever is drafted and however wrong it is, drafts cost at most MOST_STEPS steps, a part of one for each
answer and half a per cent of the time more than they gain. Besides: two tokens every RETRY steps, and learning what
each size of step costs. Counted in measured costs, that is: where none is known for a plain step there is nothing to
lose against, so a plain step is what is run then, and once every REFRESH drafted ones.

What is switched off is looked at again. Free drafts are compared with what came even where they were not verified; a
costly method is tried on one sequence every PROBE_EVERY steps, where it never pays more and more seldom on a CPU, while
half of the account pays for that.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

from autobot_llm.engine.speculative.costly_costs import CostlyCosts
from autobot_llm.engine.speculative.credit import Credit
from autobot_llm.engine.speculative.lengths import NOTHING, candidate_lengths, own_length, seconds_of
from autobot_llm.engine.speculative.measurements import (
    ENOUGH,
    ON_CPU,
    AcceptanceHistory,
    Priors,
    StepCosts,
)
from autobot_llm.engine.speculative.policy import CostlyOffer, Decision, DraftResult, Histories

REFRESH = 512
MARGIN = 1.03
"""How much quicker than a plain step the best choice must be: less than that is lost in what is not known."""
RETRY = 256
"""Plain steps after which a likely free draft is verified although its measured costs speak against it: they may have
been measured at a bad moment, and without drafts they are not measured again."""
PROBE_EVERY = 128
"""Steps from one try of a costly method that is not expected to pay to the next, at first."""
PROBES = 2
"""Tries that come to nothing until each is twice as far away as the one before: costs may have been measured at a bad
moment."""
PROBE_TOKENS = 2
LIKELY = 0.5
TOKENS_PER_STEP = 2.0
"""What a step with drafts is taken to bring a sequence, to say how many such steps an answer has left at most."""


class Controller:
    """DraftPolicy by measured costs. `floor`: kinds whose measured acceptance is below it are not used, whatever they
    cost (None: costs alone decide)."""

    def __init__(self, max_tokens: int, floor: float | None = None, priors: Priors = ON_CPU) -> None:
        self.costs = StepCosts(priors)
        self.costly_costs = CostlyCosts(priors)
        self.credit = Credit()
        self._max_tokens = max_tokens
        self._floor = floor
        self._num_sequences = 1  # of the latest step
        self._num_since_plain = 0
        self._num_since_draft = 0
        self._num_since_offer = 0
        self._num_since_probe = PROBE_EVERY
        self._num_probes = 0  # in a row that came to nothing
        self._offer_every = priors.offer_every
        self._is_shared = priors.is_shared
        self._costly_pass = priors.costly_pass
        self._catch_up_steps = priors.catch_up_steps
        self._most_probe = priors.most_probe
        self._uses_costly = False
        self._num_passes = 1  # of the costly method when it was last asked

    def pass_over(self, num_steps: int) -> None:
        """Steps without drafts have passed that nobody measured."""
        self.costs.pass_over(num_steps)
        self._num_since_draft += num_steps
        self._num_since_probe += num_steps
        self._num_since_offer += num_steps
        self.credit.wait(num_steps)

    def record_step(
        self,
        num_sequences: int,
        num_draft_tokens: int,
        seconds: float,
        drafting_seconds: float = 0.0,
        *,
        was_ready: bool = False,
    ) -> None:
        """Learn from a step without prompts, and of it what drafting took, or looking in vain. `was_ready`: its drafts
        were under way when they were wanted."""
        if was_ready:
            self.costs.record_ready(num_sequences, num_draft_tokens, seconds)
        else:
            self.costs.record(num_sequences, num_draft_tokens, seconds - drafting_seconds)
        self._num_sequences = num_sequences
        if num_draft_tokens:
            self._num_since_plain += 1
            self._num_since_draft = 0
        else:
            self._num_since_plain = 0
            self._num_since_draft += 1
        self._num_since_probe += 1
        self.credit.wait(1)

    def settle(self, num_sequences: int, results: SequenceABC[DraftResult], *, was_ready: bool = False) -> None:
        """Book what the drafts of a step that was recorded have cost, and what they have gained."""
        plain = self.costs.plain(num_sequences)
        if not plain or not results:
            return
        # Where everybody has a draft, what is right saves its part of what all share, too: who is left behind by the
        # others soon cannot get a draft any more, and then it saves its own time alone.
        is_worth_all = self._is_shared or len(results) == num_sequences
        worth = plain / num_sequences if is_worth_all else self.costs.own_share(num_sequences)
        num_tokens = sum(result.num_tokens for result in results)
        cost = self.costs.added_ready(num_sequences, num_tokens) if was_ready else None
        if cost is None:
            cost = self.costs.added(num_sequences, num_tokens)
            if num_costly := sum(result.is_costly for result in results):
                cost += self._num_passes * self._per_pass(num_costly, plain)
        self.credit.book((worth * sum(result.num_right for result in results) - cost) / plain)

    def welcome_next(self) -> None:
        """A text has left, and makes room for one that may lose as much as each."""
        self.credit.welcome(self._num_sequences)

    def is_allowed(self, history: AcceptanceHistory) -> bool:
        """Whether the floor lets drafts of a kind be used; their acceptance is measured all the same."""
        return self._floor is None or len(history) < ENOUGH or history.rate >= self._floor

    def wants_offer(self) -> bool:
        self._num_since_offer += 1
        return self._uses_costly or self._num_since_offer >= self._offer_every

    def may_pay(self, free: Histories, costly: CostlyOffer | None, room: int) -> bool:
        if not (plain := self._known_plain(len(free))):
            return False
        # a draft that begins with the token under way is worth something only if that one is right
        free = [history if history is not None and history.first_chance >= LIKELY else None for history in free]
        decision, _ = self._choose(free, costly, room, plain)
        return decision is not None

    def decide(self, free: Histories, costly: CostlyOffer | None, room: int) -> Decision | None:
        if not (plain := self._known_plain(len(free))):
            return None
        decision, catch_up = self._choose(free, costly, room, plain)
        if costly is None:
            return decision
        self._note(decision)
        if decision is not None and decision.num_costly:
            self._num_passes = costly.num_passes(decision.num_costly)
            self.credit.book(-catch_up / plain)
        return decision

    def goes_on(self, free: Histories, costly: CostlyOffer, room: int) -> bool:
        if not (plain := self._known_plain(len(free))):
            return False
        decision, _ = self._choose(free, costly, room, plain)
        if decision is None or not costly.has_ready(decision.num_costly, decision.costly_for):
            return False
        # not its passes: the step before is not settled yet, and of drafts under way all is measured
        self._note(decision)
        return True

    def _known_plain(self, num_sequences: int) -> float | None:
        """A plain step's seconds, unless they have to be measured first, or again."""
        return None if self._num_since_plain >= REFRESH else self.costs.plain(num_sequences)

    def _note(self, decision: Decision | None) -> None:
        """Remember what became of the costly method's offer."""
        self._num_since_offer = 0
        self._uses_costly = decision is not None and decision.num_costly > 0
        if decision is not None and decision.num_costly:
            self._num_since_probe = 0
            self._num_probes = self._num_probes + 1 if decision.is_probe else 0

    def _choose(
        self, free: Histories, costly: CostlyOffer | None, room: int, plain: float
    ) -> tuple[Decision | None, float]:
        """What to draft, and the seconds that the costly method has to catch up for."""
        limits = _Limits(min(self._max_tokens, room // len(free)), room, self.credit.balance * plain)
        if limits.length == 0:
            return None, 0.0
        decision, seconds = self._best_free(free, plain, limits)
        if decision is None and self._num_since_draft >= RETRY:
            decision = _likely(free)
        if costly is None:
            return decision, 0.0
        decision, catch_up = self._best_costly(free, costly, decision, seconds, plain, limits)
        if decision is None and self._num_since_probe >= self._probe_every and room >= PROBE_TOKENS:
            return self._probe(costly, plain)
        return decision, catch_up

    def _best_free(self, free: Histories, plain: float, limits: _Limits) -> tuple[Decision | None, float]:
        """The best lengths of the free drafts, and their seconds: those that are worth their own time, or those that
        serve everybody at once."""
        num_sequences, added = len(free), self.costs.added
        each = added(num_sequences, num_sequences) / num_sequences
        # Below half of what it takes, no draft is worth a closer look: the usual case, and it costs little.
        least_chance = each * num_sequences / plain / 2
        likely = [
            (i, history)
            for i, history in enumerate(free)
            if history is not None and history.first_chance > least_chance
        ]
        own = self.costs.own_share(num_sequences)
        if len(likely) < num_sequences:  # nothing that all share is saved, so each has to be worth its own time
            likely = [(i, history) for i, history in likely if history.first_chance * own > each]
        most = limits.length if likely else 0
        while most and added(num_sequences, most * len(likely)) > limits.seconds:
            most -= 1
        if not most:
            return None, plain
        expected: list[SequenceABC[float]] = [NOTHING] * num_sequences
        for i, history in likely:
            expected[i] = history.expected()[: most + 1]
        shared = plain - own * num_sequences
        best, best_seconds = None, plain / MARGIN
        for lengths in candidate_lengths(self.costs, expected, plain, own):
            seconds = seconds_of(self.costs, expected, lengths, shared, own)
            if seconds < best_seconds:
                best, best_seconds = lengths, seconds
        return (None, plain) if best is None else (Decision(best), best_seconds)

    def _best_costly(
        self,
        free: Histories,
        costly: CostlyOffer,
        decision: Decision | None,
        seconds: float,
        plain: float,
        limits: _Limits,
    ) -> tuple[Decision | None, float]:
        """The costly method for every sequence that it can draft for, or for those that it promises more than their
        free drafts do, as far ahead as pays; and the seconds that it has to catch up for. `decision` and its seconds
        are what there is without it."""
        num_sequences = len(free)
        each = self.costs.added(num_sequences, num_sequences) / num_sequences
        num_free = [
            0 if its is None else own_length(its.expected()[: limits.length + 1], plain / num_sequences, each)
            for its in free
        ]
        able, lacking = [], []
        for i, (its, other) in enumerate(zip(costly.histories, free, strict=True)):
            if its is not None:
                able.append(i)
                if other is None or other.expected()[num_free[i]] < its.expected()[limits.length]:
                    lacking.append(i)
        best, best_seconds, catch_up = decision, seconds / MARGIN if decision is None else seconds, 0.0
        if decision is not None and costly.num_ready:  # it is not asked now, so its next drafts are not under way then
            number = self.costly_costs.tokens(num_sequences, costly.num_ready) * num_sequences
            if (ready := self.costs.added_ready(num_sequences, number)) is not None:
                drafting = costly.num_passes(costly.num_ready) * self._per_pass(num_sequences, plain)
                best_seconds *= 1.0 + max(0.0, self.costs.added(num_sequences, number) + drafting - ready) / plain
        for chosen in (able,) if len(lacking) == len(able) else (able, lacking):
            found = self._costly_for(chosen, free, num_free, costly, best_seconds, plain, limits)
            if found is not None:
                best, best_seconds, catch_up = found
        return best, catch_up

    def _costly_for(
        self,
        chosen: list[int],
        free: Histories,
        num_free: list[int],
        costly: CostlyOffer,
        best_seconds: float,
        plain: float,
        limits: _Limits,
    ) -> tuple[Decision, float, float] | None:
        """The best length of the costly method for these sequences, its seconds, and those of catching up; None where
        none is better than `best_seconds`."""
        if not chosen:
            return None
        num_sequences = len(free)
        per_pass = self._per_pass(len(chosen), plain)
        num_ready = costly.num_ready if len(chosen) == num_sequences else 0
        num_behind = 0 if num_ready else sum(costly.lags[i] - 1 for i in chosen)
        catch_up = self.costly_costs.catch_up(num_behind, per_pass)
        if catch_up > limits.seconds:
            return None
        is_chosen = set(chosen)
        kept = [0 if i in is_chosen else number for i, number in enumerate(num_free)]
        num_kept = sum(kept)
        expected = [
            NOTHING if (history := (costly.histories if i in is_chosen else free)[i]) is None else history.expected()
            for i in range(num_sequences)
        ]
        own = self.costs.own_share(num_sequences)
        steps_left = max(1.0, costly.num_left / TOKENS_PER_STEP)
        shared = plain - own * num_sequences + catch_up / min(self._catch_up_steps, steps_left)
        best: Decision | None = None
        for length in range(max(1, min(num_ready, limits.length)), limits.length + 1):
            tokens = self.costly_costs.tokens(len(chosen), length)
            number = num_kept + tokens * len(chosen)
            drafting = costly.num_passes(length) * per_pass
            if length <= num_ready and (ready := self.costs.added_ready(num_sequences, number)) is not None:
                drafting = ready - self.costs.added(num_sequences, number)
            if number > limits.room or catch_up + drafting + self.costs.added(num_sequences, number) > limits.seconds:
                break
            lengths = [length if i in is_chosen else number for i, number in enumerate(kept)]
            counts = [tokens if i in is_chosen else number for i, number in enumerate(kept)]
            these = seconds_of(self.costs, expected, lengths, shared + drafting, own, counts)
            if these < best_seconds:
                best, best_seconds = Decision(kept, length, chosen), these
        return None if best is None else (best, best_seconds, catch_up)

    @property
    def _probe_every(self) -> int:
        return min(PROBE_EVERY << max(0, self._num_probes - PROBES), self._most_probe)

    def _probe(self, costly: CostlyOffer, plain: float) -> tuple[Decision | None, float]:
        """Try the costly method on the sequence that it lags behind least, where half of the account pays for that."""
        lag = min(costly.lags)
        per_pass = self._per_pass(1, plain)
        catch_up = self.costly_costs.catch_up(lag - 1, per_pass)
        seconds = costly.num_passes(PROBE_TOKENS) * per_pass + self.costs.added(len(costly.lags), PROBE_TOKENS)
        if catch_up + seconds > self.credit.balance * plain / 2:
            return None, 0.0
        return Decision([0] * len(costly.lags), PROBE_TOKENS, [costly.lags.index(lag)], is_probe=True), catch_up

    def _per_pass(self, num_sequences: int, plain: float) -> float:
        return self.costly_costs.expected_pass(num_sequences, plain * self._costly_pass)


class _Limits(NamedTuple):
    """Of a step's drafts: how long each may be, how many tokens there are for all, and the seconds that may be lost."""

    length: int
    room: int
    seconds: float


def _likely(free: Histories) -> Decision | None:
    """Two tokens of the draft whose first one is likeliest, if it is more likely than not."""
    known = [(history.first_chance, i) for i, history in enumerate(free) if history is not None]
    chance, best = max(known, default=(0.0, 0))
    return Decision([2 if i == best else 0 for i in range(len(free))]) if chance > 0.5 else None
