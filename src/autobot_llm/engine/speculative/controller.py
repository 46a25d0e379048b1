"""Decide each step which drafts are worth their time, none of them included. Knows chances and seconds; knows nothing
of tokens or models.

A step of B sequences takes C seconds and yields B tokens. A draft token adds c seconds to it and is worth its chance of
being reached and right. The best set maximizes (B + sum of chances) / (C + seconds added): the likeliest draft tokens
of all sequences first, as long as the rate grows. All of it is measured: chances by method and kind of draft
(measurements.py), seconds by size of step. Without a measured plain step there is nothing to lose against, so that is
what is run then, and every REFRESH drafted steps once more.

What is switched off is looked at again. Free drafts are compared with what came even where they were not verified; a
costly method is tried on one sequence whenever PROBE_SHARE of the time since then pays for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol

from autobot_llm.engine.speculative.measurements import ENOUGH, AcceptanceHistory, StepCosts

REFRESH = 128
PROBE_SHARE = 0.005
PROBE_TOKENS = 2
CATCH_UP_STEPS = 16
"""Steps over which a costly method's catching up with a sequence is expected to pay."""

Chances = SequenceABC[float]


class Decision(NamedTuple):
    """`num_free[i]`: tokens of sequence i's free draft to verify. `num_costly`: tokens that the costly method drafts
    for each sequence of `costly_for`; 0: it is not run."""

    num_free: list[int]
    num_costly: int = 0
    costly_for: SequenceABC[int] = ()


@dataclass(frozen=True, slots=True)
class CostlyOffer:
    """What a costly method has to offer: its chances, and how many tokens it lags behind each sequence."""

    chances: Chances
    lags: list[int]


class DraftPolicy(Protocol):
    """Who decides. `free[i]` are the chances of sequence i's free draft, empty where it has none."""

    def decide(self, free: SequenceABC[Chances], costly: CostlyOffer | None) -> Decision: ...


class Always:
    """DraftPolicy for tests and measurements: as many tokens as there are, whatever they cost; the free draft first."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def decide(self, free: SequenceABC[Chances], costly: CostlyOffer | None) -> Decision:
        num_free = [min(len(chances), self._num_tokens) for chances in free]
        if costly is None:
            return Decision(num_free)
        return Decision(num_free, self._num_tokens, [i for i, number in enumerate(num_free) if number == 0])


class CostlyCosts:
    """Seconds of a costly method: of one pass over some sequences, and of each token that it catches up with."""

    def __init__(self) -> None:
        self._passes: dict[int, deque[float]] = {}
        self._catch_up: deque[float] = deque(maxlen=ENOUGH)

    def record(self, num_sequences: int, num_passes: int, num_behind: int, seconds: float) -> None:
        """`num_behind` counts the tokens beyond one for each sequence that the first pass caught up with."""
        if num_behind <= 2 * num_sequences:
            passes = self._passes.setdefault(num_sequences.bit_length(), deque(maxlen=ENOUGH))
            passes.append(seconds / num_passes)
        elif (each := self.per_pass(num_sequences)) is not None:
            self._catch_up.append(max(0.0, seconds - num_passes * each) / num_behind)

    def per_pass(self, num_sequences: int) -> float | None:
        if not self._passes:
            return None
        size = num_sequences.bit_length()
        nearest = min(self._passes, key=lambda other: abs(other - size))
        return float(median(self._passes[nearest])) * 2.0 ** max(0, size - nearest)

    def per_token_behind(self) -> float | None:
        return median(self._catch_up) if self._catch_up else None


class Controller:
    """DraftPolicy by measured costs. `floor`: kinds whose measured acceptance is below it are not used, whatever they
    cost (None: costs alone decide)."""

    def __init__(self, max_tokens: int, floor: float | None = None) -> None:
        self.costs = StepCosts()
        self.costly_costs = CostlyCosts()
        self._max_tokens = max_tokens
        self._floor = floor
        self._num_since_plain = 0
        self._allowance = 0.0  # seconds that may be spent on looking again

    def record_step(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step without prompts, drafting not included in its seconds."""
        self.costs.record(num_sequences, num_draft_tokens, seconds)
        self._num_since_plain = self._num_since_plain + 1 if num_draft_tokens else 0
        self._allowance = min(1.0, self._allowance + PROBE_SHARE * seconds)

    def is_allowed(self, history: AcceptanceHistory) -> bool:
        """Whether the floor lets drafts of a kind be used; their acceptance is measured all the same."""
        return self._floor is None or len(history) < ENOUGH or history.rate >= self._floor

    def decide(self, free: SequenceABC[Chances], costly: CostlyOffer | None) -> Decision:
        num_sequences = len(free)
        nothing = Decision([0] * num_sequences)
        plain = self.costs.plain(num_sequences)
        if plain is None or self._num_since_plain >= REFRESH:
            return nothing
        decision, rate = self._best_free(free, plain) if any(free) else (nothing, num_sequences / plain)
        if costly is None:
            return decision
        per_pass = self.costly_costs.per_pass(num_sequences)
        if per_pass is not None and costly.chances:
            decision, rate = self._best_costly(free, costly, decision, rate, plain, per_pass)
        if decision.num_costly == 0 and not any(decision.num_free):
            return self._probe(costly, decision, plain)
        return decision

    def _best_free(self, free: SequenceABC[Chances], plain: float) -> tuple[Decision, float]:
        num_sequences = len(free)
        tokens, best_rate, best_number = float(num_sequences), num_sequences / plain, 0
        if num_sequences == 1:
            ranked = [(chance, 0) for chance in free[0][: self._max_tokens]]
        else:
            ranked = [(chance, i) for i, chances in enumerate(free) for chance in chances[: self._max_tokens]]
            ranked.sort(key=_chance, reverse=True)
        for number, (chance, _) in enumerate(ranked, 1):
            tokens += chance
            rate = tokens / (plain + number * self.costs.extra_per_token(num_sequences, number))
            if rate > best_rate:
                best_rate, best_number = rate, number
        num_free = [0] * num_sequences
        for _, i in ranked[:best_number]:
            num_free[i] += 1
        return Decision(num_free), best_rate

    def _best_costly(
        self,
        free: SequenceABC[Chances],
        costly: CostlyOffer,
        decision: Decision,
        rate: float,
        plain: float,
        per_pass: float,
    ) -> tuple[Decision, float]:
        """The costly method for every sequence whose free draft is not likelier, as far ahead as pays."""
        num_sequences = len(free)
        first = costly.chances[0]
        chosen = [i for i, chances in enumerate(free) if not chances or chances[0] < first or not decision.num_free[i]]
        if not chosen:
            return decision, rate
        kept = [0 if i in set(chosen) else number for i, number in enumerate(decision.num_free)]
        tokens = num_sequences + sum(sum(free[i][:number]) for i, number in enumerate(kept))
        num_kept = sum(kept)
        num_behind = sum(costly.lags[i] - 1 for i in chosen)
        seconds = plain + num_behind * (self.costly_costs.per_token_behind() or per_pass / 4) / CATCH_UP_STEPS
        best = decision
        for length, chance in enumerate(costly.chances[: self._max_tokens], 1):
            tokens += chance * len(chosen)
            number = num_kept + length * len(chosen)
            extra = number * self.costs.extra_per_token(num_sequences, number)
            this_rate = tokens / (seconds + extra + length * per_pass)
            if this_rate > rate:
                rate, best = this_rate, Decision(kept, length, chosen)
        return best, rate

    def _probe(self, costly: CostlyOffer, decision: Decision, plain: float) -> Decision:
        nearest = min(range(len(costly.lags)), key=costly.lags.__getitem__)
        per_pass = self.costly_costs.per_pass(1)
        per_pass = plain if per_pass is None else per_pass
        behind = self.costly_costs.per_token_behind()
        per_token = per_pass / 4 if behind is None else behind
        extra = PROBE_TOKENS * self.costs.extra_per_token(len(costly.lags), PROBE_TOKENS)
        seconds = PROBE_TOKENS * per_pass + (costly.lags[nearest] - 1) * per_token + extra
        if seconds > self._allowance:
            return decision
        self._allowance -= seconds
        return Decision(decision.num_free, PROBE_TOKENS, [nearest])


def _chance(ranked: tuple[float, int]) -> float:
    return ranked[0]
