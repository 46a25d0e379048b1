"""Decide each step which drafts are worth their time, none of them included. Knows chances and seconds; knows nothing
of tokens or models.

The rule. A plain step of B sequences takes F + B m seconds: a part that all share, and each one's own. E draft tokens
add c(B, E), and bring a sequence g more tokens than its one, by cautious chances of each being reached and right. Until
every sequence has come as far as a plain step brings it, that is

    F / (1 + the least g) + the sum over sequences of (m + its part of c) / (1 + g)

seconds, which is what a choice is judged by; the best is taken if it is quicker than a plain step by MARGIN. The shared
part is saved only where everybody gets ahead: a draft for one of many must be worth its own time, else its owner would
be served at the expense of the others. For a lone sequence it is (plain + c) / (1 + g), the time of a token. All of it
is measured: chances by method and kind of draft, seconds by size of step (measurements.py).

The guarantee. Expectations may be wrong, so no draft is longer than what its sequence can afford to lose whole: three
quarters of a step, half a per cent of its time, and what drafts have gained it lately (credit.py). So whatever is
drafted and however wrong it is, drafts cost an answer at most that much more than they gain it. (On a GPU, where
sequences share nearly all of a step, that holds for the answers of a batch together.) What is found out at the engine's
expense comes besides: looks at a costly method, for at most PROBE_SHARE of the time and PROBE_GRANT steps; two tokens
every RETRY steps; and learning what each size of step costs. Counted in measured costs, that is: where none is known
for a plain step there is nothing to lose against, so a plain step is what is run then, and once every REFRESH drafted
ones.

What is switched off is looked at again. Free drafts are compared with what came even where they were not verified; a
costly method is tried on one sequence whenever the allowance for it has the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceABC
from statistics import fmean

from autobot_llm.engine.speculative.measurements import (
    ENOUGH,
    ON_CPU,
    AcceptanceHistory,
    CostlyCosts,
    Priors,
    StepCosts,
)
from autobot_llm.engine.speculative.policy import CostlyOffer, CreditOf, Decision, DraftResult, Histories

REFRESH = 128
MARGIN = 1.03
"""How much quicker than a plain step the best choice must be: less than that is lost in what is not known."""
RETRY = 256
"""Plain steps after which a likely free draft is verified although its measured costs speak against it: they may have
been measured at a bad moment, and without drafts they are not measured again."""
PROBE_SHARE = 0.005
PROBE_GRANT = 8.0  # plain steps, for the first looks at a costly method
PROBE_MOST = 64.0  # plain steps: no more is saved up
PROBE_TOKENS = 2
PROBE_EVERY = 16  # steps that are not waited for, before one is waited for to look at a costly method
LIKELY = 0.5
CATCH_UP_STEPS = 32
"""Steps over which a costly method's catching up with a sequence is expected to pay."""


class Controller:
    """DraftPolicy by measured costs. `floor`: kinds whose measured acceptance is below it are not used, whatever they
    cost (None: costs alone decide)."""

    def __init__(self, max_tokens: int, floor: float | None = None, priors: Priors = ON_CPU) -> None:
        self.costs = StepCosts(priors)
        self.costly_costs = CostlyCosts(priors)
        self._max_tokens = max_tokens
        self._floor = floor
        self._num_since_plain = 0
        self._num_since_draft = 0
        self._num_since_offer = 0
        self._num_since_look = 0
        self._offer_every = priors.offer_every
        self._is_shared = priors.is_shared
        self._uses_costly = False
        self._num_passes = 1  # of the costly method when it was last asked
        self._is_probing = False
        self._now = 0.0  # a sequence's time in the engine: its share of every step, as if all had been plain
        self._allowance: float | None = None  # for probes and catching up; None: no plain step was measured yet

    def record_step(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step without prompts, drafting not included in its seconds."""
        self.costs.record(num_sequences, num_draft_tokens, seconds)
        if num_draft_tokens:
            self._num_since_plain += 1
            self._num_since_draft = 0
        else:
            self._num_since_plain = 0
            self._num_since_draft += 1
        plain = self.costs.plain(num_sequences)
        if plain is not None:
            self._now += plain / num_sequences
            self._earn(PROBE_SHARE * plain, plain)

    def settle(self, num_sequences: int, results: SequenceABC[DraftResult]) -> None:
        """Book what the drafts of a step that was recorded have cost their sequences, and gained them."""
        plain = self.costs.plain(num_sequences)
        if plain is None or not results or self._is_probing:
            return  # a probe is the engine's expense
        share = plain / num_sequences
        # Where everybody has a draft, what is right saves its part of what all share, too: who is left behind by the
        # others soon cannot afford a draft any more, and then it saves its own time alone.
        is_worth_all = self._is_shared or len(results) == num_sequences
        worth = share if is_worth_all else self.costs.own_share(num_sequences)
        num_tokens = sum(result.num_tokens for result in results)
        each = self.costs.added(num_sequences, num_tokens) / num_tokens
        num_costly = sum(result.is_costly for result in results)
        per_pass = self.costly_costs.per_pass(num_costly) if num_costly else None
        drafting = 0.0 if per_pass is None else self._num_passes * per_pass / num_costly
        gains = [
            result.num_right * worth - result.num_tokens * each - drafting * result.is_costly for result in results
        ]
        if self._is_shared:
            gains = [fmean(gains)] * len(gains)
        for result, gain in zip(results, gains, strict=True):
            result.credit.book(gain, self._now, share)
            if result.is_costly:
                self._earn(max(0.0, gain), plain)

    def is_allowed(self, history: AcceptanceHistory) -> bool:
        """Whether the floor lets drafts of a kind be used; their acceptance is measured all the same."""
        return self._floor is None or len(history) < ENOUGH or history.rate >= self._floor

    def wants_offer(self) -> bool:
        self._num_since_offer += 1
        return self._uses_costly or self._num_since_offer >= self._offer_every

    def may_pay(self, free: Histories, costly: CostlyOffer | None, credit_of: CreditOf) -> bool:
        plain = self.costs.plain(len(free))
        if plain is None or self._num_since_plain >= REFRESH:
            return False
        # a draft that begins with the token under way is worth something only if that one is right
        free = [history if history is not None and history.first_chance >= LIKELY else None for history in free]
        decision, seconds = self._best_free(free, plain, credit_of)
        if decision is not None or (self._num_since_draft >= RETRY and _likely(free) is not None):
            return True
        if costly is None:
            return False
        decision, _ = self._best_costly(free, costly, None, seconds, plain, credit_of)
        if decision is not None:
            return True
        self._num_since_look += 1
        if self._num_since_look < PROBE_EVERY or self._probe_seconds(costly, plain) > (self._allowance or 0.0):
            return False
        self._num_since_look = 0
        return True

    def decide(self, free: Histories, costly: CostlyOffer | None, credit_of: CreditOf) -> Decision | None:
        self._is_probing = False
        plain = self.costs.plain(len(free))
        if plain is None or self._num_since_plain >= REFRESH:
            return None
        decision, seconds = self._best_free(free, plain, credit_of)
        if decision is None and self._num_since_draft >= RETRY:
            decision = _likely(free)
        if costly is None:
            return decision
        self._num_since_offer = 0
        decision, catch_up = self._best_costly(free, costly, decision, seconds, plain, credit_of)
        self._uses_costly = decision is not None and decision.num_costly > 0
        if self._uses_costly and self._allowance is not None:
            self._allowance -= catch_up
        decision = self._probe(costly, plain) if decision is None else decision
        if decision is not None and decision.num_costly:
            self._num_passes = costly.num_passes(decision.num_costly)
        return decision

    def _balance_of(self, credit_of: CreditOf, num_sequences: int, share: float) -> Callable[[int], float]:
        """What the sequence at a place may spend: its own, or where steps are shared what all have on the average."""
        if not self._is_shared:
            return lambda i: credit_of(i).balance(self._now, share)
        mean = fmean(credit_of(i).balance(self._now, share) for i in range(num_sequences))
        return lambda i: mean

    def _earn(self, seconds: float, plain: float) -> None:
        before = PROBE_GRANT * plain if self._allowance is None else self._allowance
        self._allowance = min(before + seconds, max(before, PROBE_MOST * plain))

    def _best_free(self, free: Histories, plain: float, credit_of: CreditOf) -> tuple[Decision | None, float]:
        """The best lengths of the free drafts, and their seconds: those that are worth their own time, or those that
        serve everybody at once."""
        num_sequences = len(free)
        share = plain / num_sequences
        each = self.costs.added(num_sequences, num_sequences) / num_sequences
        # Below half of what it takes, no draft is worth a closer look: the usual case, and it costs little.
        least_chance = each / share / 2
        likely = [
            (i, history)
            for i, history in enumerate(free)
            if history is not None and history.first_chance > least_chance
        ]
        own = self.costs.own_share(num_sequences)
        if len(likely) < num_sequences:  # nothing that all share is saved, so each has to be worth its own time
            likely = [(i, history) for i, history in likely if history.first_chance * own > each]
        if not likely:
            return None, plain
        each = self.costs.added(num_sequences, len(likely)) / len(likely)
        survivals: list[SequenceABC[float]] = [()] * num_sequences
        balance_of = self._balance_of(credit_of, num_sequences, share)
        for i, history in likely:
            affordable = int(min(self._max_tokens, balance_of(i) / max(each, 1e-9)))
            if affordable > 0:
                survivals[i] = history.survival()[:affordable]
        if not any(survivals):
            return None, plain
        shared = plain - own * num_sequences
        best, best_seconds = None, plain / MARGIN
        for lengths in self._candidates(survivals, plain, own):
            seconds = self._seconds(survivals, lengths, shared, own)
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
        credit_of: CreditOf,
    ) -> tuple[Decision | None, float]:
        """The costly method for every sequence that it can draft for, or for those that have no likelier free draft, as
        far ahead as pays; and the seconds that it has to catch up for. `decision` and its seconds are what there is
        without it."""
        num_free = [0] * len(free) if decision is None else decision.num_free
        able = [i for i, its in enumerate(costly.histories) if its is not None]
        lacking = [i for i in able if num_free[i] == 0]
        best, best_seconds, catch_up = decision, seconds / MARGIN if decision is None else seconds, 0.0
        for chosen in (able,) if len(lacking) in (0, len(able)) else (able, lacking):
            found = self._costly_for(chosen, free, num_free, costly, best_seconds, plain, credit_of)
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
        credit_of: CreditOf,
    ) -> tuple[Decision, float, float] | None:
        """The best length of the costly method for these sequences, its seconds, and those of catching up; None where
        none is better than `best_seconds`."""
        num_sequences = len(free)
        share = plain / num_sequences
        per_pass = self.costly_costs.per_pass(len(chosen)) if chosen else None
        if per_pass is None or self._allowance is None:
            return None
        least = (self._added_by_costly(num_sequences, len(chosen), 1) + per_pass) / len(chosen)
        balance_of = self._balance_of(credit_of, num_sequences, share)
        balances = {i: balance_of(i) for i in chosen}
        chosen = [i for i in chosen if balances[i] >= least]
        catch_up = sum(costly.lags[i] - 1 for i in chosen) * self.costly_costs.per_token_behind(per_pass)
        if not chosen or catch_up > self._allowance:
            return None
        affordable = min(balances[i] for i in chosen) * len(chosen)
        is_chosen = set(chosen)
        survivals = [
            history.survival() if (history := (costly.histories if i in is_chosen else free)[i]) is not None else ()
            for i in range(num_sequences)
        ]
        own = self.costs.own_share(num_sequences)
        shared = plain - own * num_sequences + catch_up / CATCH_UP_STEPS
        best: Decision | None = None
        for length in range(1, self._max_tokens + 1):
            drafting = costly.num_passes(length) * per_pass
            if self._added_by_costly(num_sequences, len(chosen), length) + drafting > affordable:
                break
            tokens = self.costly_costs.tokens(len(chosen), length)
            lengths = [length if i in is_chosen else number for i, number in enumerate(num_free)]
            counts = [tokens if i in is_chosen else number for i, number in enumerate(num_free)]
            these = self._seconds(survivals, lengths, shared + drafting, own, counts)
            if these < best_seconds:
                kept = [0 if i in is_chosen else number for i, number in enumerate(num_free)]
                best, best_seconds = Decision(kept, length, chosen), these
        return None if best is None else (best, best_seconds, catch_up)

    def _added_by_costly(self, num_sequences: int, num_chosen: int, length: int) -> float:
        """Seconds that verifying the costly method's drafts of that depth adds, for so many of the sequences."""
        return self.costs.added(num_sequences, num_chosen * self.costly_costs.tokens(num_chosen, length))

    def _probe(self, costly: CostlyOffer, plain: float) -> Decision | None:
        """Try the costly method on the sequence that it lags behind least, where the allowance has the time."""
        seconds = self._probe_seconds(costly, plain)
        if self._allowance is None or seconds > self._allowance:
            return None
        self._allowance -= seconds
        self._is_probing = True
        return Decision([0] * len(costly.lags), PROBE_TOKENS, [costly.lags.index(min(costly.lags))])

    def _probe_seconds(self, costly: CostlyOffer, plain: float) -> float:
        per_pass = self.costly_costs.per_pass(1)
        per_pass = plain if per_pass is None else per_pass
        seconds = costly.num_passes(PROBE_TOKENS) * per_pass + self.costs.added(len(costly.lags), PROBE_TOKENS)
        return seconds + (min(costly.lags) - 1) * self.costly_costs.per_token_behind(per_pass)

    def _candidates(self, survivals: SequenceABC[SequenceABC[float]], plain: float, own: float) -> Iterator[list[int]]:
        """Lengths that may be the best: each sequence's by its own time, and the likeliest tokens of all as long as
        the tokens per second grow."""
        num_sequences, added = len(survivals), self.costs.added
        ranked = [(chance, i) for i, survival in enumerate(survivals) for chance in survival]
        ranked.sort(key=_chance, reverse=True)
        if num_sequences > 1:
            each = added(num_sequences, len(ranked)) / len(ranked)
            yield [_own_length(survival, own, each) for survival in survivals]
        tokens = float(num_sequences)
        best_rate, best_number = tokens / plain, 0
        for number, (chance, _) in enumerate(ranked, 1):
            tokens += chance
            rate = tokens / (plain + added(num_sequences, number))
            if rate > best_rate:
                best_rate, best_number = rate, number
        lengths = [0] * num_sequences
        for _, i in ranked[:best_number]:
            lengths[i] += 1
        yield lengths

    def _seconds(
        self,
        survivals: SequenceABC[SequenceABC[float]],
        lengths: list[int],
        shared: float,
        own: float,
        counts: list[int] | None = None,
    ) -> float:
        """What drafts of these lengths take until every sequence has come as far as a plain step brings it. `counts`:
        their tokens, where they are trees."""
        counts = lengths if counts is None else counts
        number = sum(counts)
        each = self.costs.added(len(counts), number) / number if number else 0.0
        seconds, least = 0.0, math.inf
        for survival, length, count in zip(survivals, lengths, counts, strict=True):
            tokens = 1.0 + sum(survival[:length])
            least = min(least, tokens)
            seconds += (own + count * each) / tokens
        return seconds + shared / least


def _own_length(survival: SequenceABC[float], own: float, each: float) -> int:
    tokens, best, best_length = 1.0, own, 0
    for length, chance in enumerate(survival, 1):
        tokens += chance
        if (own + length * each) / tokens < best:
            best, best_length = (own + length * each) / tokens, length
    return best_length


def _likely(free: Histories) -> Decision | None:
    """Two tokens of the draft whose first one is likeliest, if it is more likely than not."""
    known = [(history.first_chance, i) for i, history in enumerate(free) if history is not None]
    chance, best = max(known, default=(0.0, 0))
    return Decision([2 if i == best else 0 for i in range(len(free))]) if chance > 0.5 else None


def _chance(ranked: tuple[float, int]) -> float:
    return ranked[0]
