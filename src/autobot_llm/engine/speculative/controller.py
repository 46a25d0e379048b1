"""Decide each step which drafts are worth their time, none of them included. Knows chances and seconds; knows nothing
of tokens or models.

A plain step of B sequences takes F + B m seconds: a part that all share, and each one's own. E draft tokens add c E,
and bring a sequence g more tokens than its one, by the chances of each being reached and right. Until every sequence
has come as far as a plain step brings it, that is

    F / (1 + the least g) + the sum over sequences of (m + c E) / (1 + g)

seconds, which is what a choice is judged by. The shared part is saved only where everybody gets ahead: a draft for one
of many must be worth its own time, else its owner would be served at the expense of the others. For a lone sequence it
is (plain + c E) / (1 + g), the time of a token. All of it is measured: chances by method and kind of draft
(measurements.py), seconds by size of step. Without a measured plain step there is nothing to lose against, so that is
what is run then, and every REFRESH drafted steps once more.

What is switched off is looked at again. Free drafts are compared with what came even where they were not verified; a
costly method is tried on one sequence whenever PROBE_SHARE of the time since then pays for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol

from autobot_llm.engine.speculative.measurements import ENOUGH, ON_CPU, AcceptanceHistory, Priors, StepCosts

REFRESH = 128
MARGIN = 1.05
"""How much quicker than a plain step the best choice must be: less than that is lost in what is not known."""
RETRY = 256
"""Plain steps after which a likely free draft is verified although its measured costs speak against it: they may have
been measured at a bad moment, and without drafts they are not measured again."""
PROBE_SHARE = 0.005
PROBE_GRANT = 0.05  # seconds for the first looks at a costly method
PROBE_TOKENS = 2
OFFER_EVERY = 16  # steps, while a costly method is not in use
CATCH_UP_STEPS = 32
"""Steps over which a costly method's catching up with a sequence is expected to pay."""


class Decision(NamedTuple):
    """`num_free[i]`: tokens of sequence i's free draft to verify. `num_costly`: tokens that the costly method drafts
    for each sequence of `costly_for`; 0: it is not run."""

    num_free: list[int]
    num_costly: int = 0
    costly_for: SequenceABC[int] = ()


Histories = SequenceABC[AcceptanceHistory | None]
"""How drafts like each sequence's went; None where it has none, or one that may not be used."""


@dataclass(frozen=True, slots=True)
class CostlyOffer:
    """What a costly method has to offer each sequence, and how many tokens it lags behind."""

    histories: Histories
    lags: list[int]


class DraftPolicy(Protocol):
    """Who decides."""

    def wants_offer(self) -> bool:
        """Whether the costly method is to be asked in this step."""
        ...

    def decide(self, free: Histories, costly: CostlyOffer | None) -> Decision | None:
        """What to verify; None: nothing."""
        ...

    def may_pay(self, free: Histories) -> bool:
        """Whether free drafts like these may be verified. Changes nothing."""
        ...


class Always:
    """DraftPolicy for tests and measurements: as many tokens as there are, whatever they cost; the free draft first."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def wants_offer(self) -> bool:
        return True

    def may_pay(self, free: Histories) -> bool:
        return True

    def decide(self, free: Histories, costly: CostlyOffer | None) -> Decision:
        num_free = [0 if history is None else self._num_tokens for history in free]
        if costly is None:
            return Decision(num_free)
        return Decision(num_free, self._num_tokens, [i for i, number in enumerate(num_free) if number == 0])


class CostlyCosts:
    """Seconds of a costly method: of one pass over some sequences, and of each token that it catches up with."""

    def __init__(self, priors: Priors = ON_CPU) -> None:
        self._priors = priors
        self._most: dict[int, float] = {}
        """What a pass takes at most, by size: of drafts that began with much to catch up with."""
        self._passes: dict[int, deque[float]] = {}
        self._catch_up: deque[float] = deque(maxlen=ENOUGH)
        self._tokens: dict[tuple[int, int], float] = {}

    def record_tokens(self, num_sequences: int, depth: int, num_tokens: int) -> None:
        """Learn how many tokens so many drafts of that depth had: a tree has more than its depth."""
        self._tokens[num_sequences.bit_length(), depth] = num_tokens / num_sequences

    def tokens(self, num_sequences: int, depth: int) -> int:
        """Of a draft so deep, where so many are made: a line's, unless the nearest that was seen was a tree."""
        if not self._tokens:
            return depth
        size = num_sequences.bit_length()
        nearest = min(self._tokens, key=lambda other: 8 * abs(other[0] - size) + abs(other[1] - depth))
        found = self._tokens[nearest]
        return depth if found <= nearest[1] else max(depth, round(found))

    def record(self, num_sequences: int, num_passes: int, num_behind: int, seconds: float) -> None:
        """`num_behind` counts the tokens beyond one for each sequence that the first pass caught up with."""
        size = num_sequences.bit_length()
        if num_behind <= 2 * num_sequences:
            self._passes.setdefault(size, deque(maxlen=ENOUGH)).append(seconds / num_passes)
        elif self._passes:
            each = self.per_pass(num_sequences)
            assert each is not None
            self._catch_up.append(max(0.0, seconds - num_passes * each) / num_behind)
        else:
            self._most[size] = min(seconds / num_passes, self._most.get(size, math.inf))

    def per_pass(self, num_sequences: int) -> float | None:
        """Of so many sequences, or of the nearest number that was measured; None where none was."""
        known = {size: float(median(passes)) for size, passes in self._passes.items()} or self._most
        if not known:
            return None
        size = num_sequences.bit_length()
        nearest = min(known, key=lambda other: abs(other - size))
        return known[nearest] * 2.0 ** max(0, size - nearest)

    def per_token_behind(self, per_pass: float) -> float:
        return float(median(self._catch_up)) if self._catch_up else per_pass * self._priors.token_behind


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
        self._uses_costly = False
        self._allowance = PROBE_GRANT

    def record_step(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step without prompts, drafting not included in its seconds."""
        self.costs.record(num_sequences, num_draft_tokens, seconds)
        self._num_since_plain = self._num_since_plain + 1 if num_draft_tokens else 0
        self._num_since_draft = 0 if num_draft_tokens else self._num_since_draft + 1
        self._allowance = min(1.0, self._allowance + PROBE_SHARE * seconds)

    def is_allowed(self, history: AcceptanceHistory) -> bool:
        """Whether the floor lets drafts of a kind be used; their acceptance is measured all the same."""
        return self._floor is None or len(history) < ENOUGH or history.rate >= self._floor

    def wants_offer(self) -> bool:
        self._num_since_offer += 1
        return self._uses_costly or self._num_since_offer >= OFFER_EVERY

    def may_pay(self, free: Histories) -> bool:
        plain = self.costs.plain(len(free))
        if plain is None or self._num_since_plain >= REFRESH:
            return False
        return self._best_free(free, plain)[0] is not None or (
            self._num_since_draft >= RETRY and _likely(free) is not None
        )

    def decide(self, free: Histories, costly: CostlyOffer | None) -> Decision | None:
        plain = self.costs.plain(len(free))
        if plain is None or self._num_since_plain >= REFRESH:
            return None
        decision, seconds = self._best_free(free, plain)
        if decision is None and self._num_since_draft >= RETRY:
            decision = _likely(free)
        if costly is None:
            return decision
        self._num_since_offer = 0
        decision = self._best_costly(free, costly, decision, seconds, plain)
        self._uses_costly = decision is not None and decision.num_costly > 0
        return self._probe(costly, plain) if decision is None else decision

    def _best_free(self, free: Histories, plain: float) -> tuple[Decision | None, float]:
        """The best lengths of the free drafts, and their seconds: those that are worth their own time, or those that
        serve everybody at once."""
        num_sequences = len(free)
        added = self.costs.added(num_sequences, num_sequences * self._max_tokens)
        # Below half of what it takes, no draft is worth a closer look: the usual case, and it costs little.
        least_chance = num_sequences / plain * added[1] / 2
        survivals = [
            history.survival()[: self._max_tokens]
            if history is not None and history.first_chance > least_chance
            else None
            for history in free
        ]
        if not any(survivals):
            return None, plain
        own = self.costs.own_share(num_sequences)
        shared = plain - own * num_sequences
        best, best_seconds = None, plain / MARGIN
        for lengths in _candidates(survivals, plain, own, added):
            seconds = _seconds(survivals, lengths, shared, own, added)
            if seconds < best_seconds:
                best, best_seconds = lengths, seconds
        return (None, plain) if best is None else (Decision(best), best_seconds)

    def _best_costly(
        self, free: Histories, costly: CostlyOffer, decision: Decision | None, seconds: float, plain: float
    ) -> Decision | None:
        """The costly method for every sequence that has no likelier free draft, as far ahead as pays."""
        num_sequences = len(free)
        num_free = [0] * num_sequences if decision is None else decision.num_free
        chosen = [
            i
            for i, (mine, its) in enumerate(zip(free, costly.histories, strict=True))
            if its is not None and (num_free[i] == 0 or mine is None or mine.first_chance < its.first_chance)
        ]
        per_pass = self.costly_costs.per_pass(len(chosen))
        if not chosen or per_pass is None:
            return decision
        is_chosen = set(chosen)
        survivals = [
            history.survival() if (history := (costly.histories if i in is_chosen else free)[i]) is not None else None
            for i in range(num_sequences)
        ]
        num_behind = sum(costly.lags[i] - 1 for i in chosen)
        own = self.costs.own_share(num_sequences)
        shared = plain - own * num_sequences
        shared += num_behind * self.costly_costs.per_token_behind(per_pass) / CATCH_UP_STEPS
        tokens = [self.costly_costs.tokens(len(chosen), length) for length in range(self._max_tokens + 1)]
        added = self.costs.added(num_sequences, num_sequences * max(tokens))
        best, best_seconds = decision, seconds / MARGIN if decision is None else seconds
        for length in range(1, self._max_tokens + 1):
            lengths = [length if i in is_chosen else number for i, number in enumerate(num_free)]
            counts = [tokens[length] if i in is_chosen else number for i, number in enumerate(num_free)]
            these = _seconds(survivals, lengths, shared + length * per_pass, own, added, counts)
            if these < best_seconds:
                kept = [0 if i in is_chosen else number for i, number in enumerate(num_free)]
                best, best_seconds = Decision(kept, length, chosen), these
        return best

    def _probe(self, costly: CostlyOffer, plain: float) -> Decision | None:
        """Try the costly method on the sequence that it lags behind least, where the allowance has the time."""
        num_sequences = len(costly.lags)
        nearest = min(range(num_sequences), key=costly.lags.__getitem__)
        per_pass = self.costly_costs.per_pass(1)
        per_pass = plain if per_pass is None else per_pass
        seconds = PROBE_TOKENS * per_pass + self.costs.added(num_sequences, PROBE_TOKENS)[PROBE_TOKENS]
        seconds += (costly.lags[nearest] - 1) * self.costly_costs.per_token_behind(per_pass)
        if seconds > self._allowance:
            return None
        self._allowance -= seconds
        return Decision([0] * num_sequences, PROBE_TOKENS, [nearest])


def _candidates(
    survivals: SequenceABC[SequenceABC[float] | None], plain: float, own: float, added: list[float]
) -> Iterator[list[int]]:
    """Lengths that may be the best: each sequence's by its own time, and the likeliest tokens of all as long as the
    tokens per second grow."""
    if len(survivals) > 1:
        yield [0 if survival is None else _own_length(survival, own, added[1]) for survival in survivals]
    ranked = [(chance, i) for i, survival in enumerate(survivals) if survival is not None for chance in survival]
    ranked.sort(key=_chance, reverse=True)
    tokens = float(len(survivals))
    best_rate, best_number = tokens / plain, 0
    for number, (chance, _) in enumerate(ranked, 1):
        tokens += chance
        if tokens / (plain + added[number]) > best_rate:
            best_rate, best_number = tokens / (plain + added[number]), number
    lengths = [0] * len(survivals)
    for _, i in ranked[:best_number]:
        lengths[i] += 1
    yield lengths


def _own_length(survival: SequenceABC[float], own: float, each: float) -> int:
    tokens, best, best_length = 1.0, own, 0
    for length, chance in enumerate(survival, 1):
        tokens += chance
        if (own + length * each) / tokens < best:
            best, best_length = (own + length * each) / tokens, length
    return best_length


def _seconds(
    survivals: SequenceABC[SequenceABC[float] | None],
    lengths: list[int],
    shared: float,
    own: float,
    added: list[float],
    counts: list[int] | None = None,
) -> float:
    """What drafts of these lengths take until every sequence has come as far as a plain step brings it. `counts`: their
    tokens, where they are trees."""
    counts = lengths if counts is None else counts
    number = sum(counts)
    each = added[number] / number if number else 0.0
    seconds, least = 0.0, math.inf
    for survival, length, count in zip(survivals, lengths, counts, strict=True):
        tokens = 1.0 if survival is None else 1.0 + sum(survival[:length])
        least = min(least, tokens)
        seconds += (own + count * each) / tokens
    return seconds + shared / least


def _likely(free: Histories) -> Decision | None:
    """Two tokens of the draft whose first one is likeliest, if it is more likely than not."""
    known = [(history.first_chance, i) for i, history in enumerate(free) if history is not None]
    chance, best = max(known, default=(0.0, 0))
    return Decision([2 if i == best else 0 for i in range(len(free))]) if chance > 0.5 else None


def _chance(ranked: tuple[float, int]) -> float:
    return ranked[0]
