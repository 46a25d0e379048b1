"""What drafts and steps have been worth so far. Knows counts and seconds; knows nothing of sequences or of choices."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

HISTORY = 100
"""Drafts of one kind that are remembered."""

ENOUGH = 20
"""Measurements after which a kind is judged by them alone."""

PRIOR_RATE = 0.5
PRIOR_WEIGHT = 2.0  # in measurements: what a kind is taken for while little is known of it


@dataclass(frozen=True, slots=True)
class Priors:
    """What costs are taken for before anything was measured.

    `draft_token`: what a draft token adds to a step, in a sequence's share of a plain one. `token_behind`: what a
    costly method takes for a token that it catches up with, in its passes.
    """

    draft_token: float
    token_behind: float


ON_CPU = Priors(draft_token=0.25, token_behind=0.25)
ON_GPU = Priors(draft_token=0.02, token_behind=1 / 256)
"""A step reads all weights whatever it computes: a few tokens more hardly add to it."""

_NUM_PLAIN, _NUM_EXTRA = 9, 15


class AcceptanceHistory:
    """How the last HISTORY drafts of one kind went, position by position.

    A draft of which `tried` tokens were looked at and `passed` were right says something of the positions up to
    `tried` only. The chance of position j is a product of conditional rates, each among the drafts that were right
    before it (the estimator of Kaplan and Meier, 1958).
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._drafts: deque[tuple[int, int]] = deque()
        self._num_tried = [0] * max_length
        self._num_passed = [0] * max_length
        self._survival: list[float] | None = None
        self.first_chance = PRIOR_RATE
        """That a draft's first token is right: `survival()[0]`."""

    def __len__(self) -> int:
        return len(self._drafts)

    @property
    def rate(self) -> float:
        """Share of the tokens looked at that were right, those after a wrong one not counted."""
        return sum(self._num_passed) / max(1, sum(self._num_tried))

    @property
    def by_position(self) -> list[float | None]:
        """Share of right ones at each position, among drafts that were right before it; None where none was."""
        pairs = zip(self._num_passed, self._num_tried, strict=True)
        return [passed / tried if tried else None for passed, tried in pairs]

    def record(self, tried: int, passed: int) -> None:
        tried = min(tried, self._max_length)
        passed = min(passed, tried)
        self._drafts.append((tried, passed))
        self._add(tried, passed, 1)
        if len(self._drafts) > HISTORY:
            self._add(*self._drafts.popleft(), -1)
        self.first_chance = (self._num_passed[0] + PRIOR_WEIGHT * PRIOR_RATE) / (self._num_tried[0] + PRIOR_WEIGHT)
        self._survival = None

    def survival(self) -> list[float]:
        """The chance that a draft is right up to and including each position."""
        if self._survival is None:
            chance, rate = 1.0, PRIOR_RATE
            self._survival = []
            for passed, tried in zip(self._num_passed, self._num_tried, strict=True):
                rate = (passed + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
                chance *= rate
                self._survival.append(chance)
        return self._survival

    def _add(self, tried: int, passed: int, sign: int) -> None:
        for position in range(tried):
            self._num_tried[position] += sign
        for position in range(passed):
            self._num_passed[position] += sign


class StepCosts:
    """Seconds of steps by the sequences that decode in them, and what draft tokens add.

    Lower quartiles, because what disturbs a step only ever makes it longer: on a busy machine half of them say more
    about the neighbours than about the step. A plain step's cost is known for a number of
    sequences once such a step was measured; what a draft token adds is taken from the nearest size that was.
    """

    def __init__(self, priors: Priors = ON_CPU) -> None:
        self._priors = priors
        self._plain: dict[int, deque[float]] = {}
        self._plain_costs: dict[int, float] = {}
        self._extra: dict[tuple[int, int], deque[float]] = {}
        self._extra_costs: dict[tuple[int, int], float] = {}
        self._added: dict[int, list[float]] = {}
        self._seconds_per_prompt_token: float | None = None

    def record(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step without prompts."""
        if num_draft_tokens == 0:
            plain = self._plain.get(num_sequences)
            if plain is None:
                plain = self._plain[num_sequences] = deque(maxlen=_NUM_PLAIN)
            plain.append(seconds)
            self._plain_costs[num_sequences] = _lower_quartile(plain)
            return
        if (before := self._plain_costs.get(num_sequences)) is None:
            return
        key = (num_sequences.bit_length(), num_draft_tokens.bit_length())
        samples = self._extra.get(key)
        if samples is None:  # what it is taken for counts twice, so that one bad moment does not decide
            guess = self._extra_per_token(num_sequences, key[1])
            samples = self._extra[key] = deque((guess, guess), maxlen=_NUM_EXTRA)
        samples.append((seconds - before) / num_draft_tokens)
        self._extra_costs[key] = max(0.0, _lower_quartile(samples))
        self._added.clear()

    def learn_prompt_token(self, seconds: float | None) -> None:
        """What a prompt's token adds to a step: a draft's is taken for as much where none was measured."""
        if self._seconds_per_prompt_token is None:
            self._added.clear()
        self._seconds_per_prompt_token = seconds

    def plain(self, num_sequences: int) -> float | None:
        """Seconds of a step without drafts; None where none was measured."""
        return self._plain_costs.get(num_sequences)

    def own_share(self, num_sequences: int) -> float:
        """Seconds that each sequence adds to a plain step, from the next smaller size that was measured; call it where
        `plain` is known. A lone sequence's share is the whole; where no smaller size was measured it is taken for 0."""
        plain = self._plain_costs[num_sequences]
        if num_sequences == 1:
            return plain
        smaller = max((size for size in self._plain_costs if size < num_sequences), default=0)
        if smaller == 0:
            return 0.0
        difference = (plain - self._plain_costs[smaller]) / (num_sequences - smaller)
        return min(max(0.0, difference), plain / num_sequences)

    def added(self, num_sequences: int, max_draft_tokens: int) -> list[float]:
        """Seconds that 0, 1, 2 ... `max_draft_tokens` draft tokens add to a step; call it where `plain` is known."""
        added = self._added.get(num_sequences)
        if added is None or len(added) <= max_draft_tokens:
            each: dict[int, float] = {}
            added = [0.0]
            for number in range(1, max_draft_tokens + 1):
                size = number.bit_length()
                if size not in each:
                    each[size] = self._extra_per_token(num_sequences, size)
                added.append(number * each[size])
            self._added[num_sequences] = added
        return added

    def _extra_per_token(self, num_sequences: int, size: int) -> float:
        key = (num_sequences.bit_length(), size)
        if (known := self._extra_costs.get(key)) is not None:
            return known
        near = [other for other in self._extra_costs if abs(other[0] - key[0]) <= 2]
        if near:
            return self._extra_costs[min(near, key=lambda other: abs(other[0] - key[0]) * 4 + abs(other[1] - key[1]))]
        share = self._plain_costs[num_sequences] / num_sequences
        return (
            share * self._priors.draft_token
            if self._seconds_per_prompt_token is None
            else self._seconds_per_prompt_token
        )


def _lower_quartile(values: deque[float]) -> float:
    return sorted(values)[len(values) // 4]
