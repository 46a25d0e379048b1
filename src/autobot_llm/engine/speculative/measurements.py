"""What drafts and steps have been worth so far. Knows counts and seconds; knows nothing of sequences or of choices.

What a costly method takes besides is costly_costs.py's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

HISTORY = 100
"""Drafts of one kind that are remembered."""

ENOUGH = 20
"""Measurements after which a kind is judged by them alone."""

PRIOR_RATE = 0.5
MADE_TO_GUESS = 0.7
"""The chance that a guess of a model is right which was made to guess, before any was looked at."""
PRIOR_WEIGHT = 4.0  # in measurements: what a kind is taken for while little is known of it
TEXT_WEIGHT = 4.0
"""The same of one text's drafts, which are taken for what drafts in other texts were."""


@dataclass(frozen=True, slots=True)
class Priors:
    """What costs are taken for before anything was measured.

    `drafted_step`: what a step with drafts takes longer, however few there are, in plain steps. `draft_token`: what a
    draft token adds to that, in a sequence's share of a plain one. `costly_pass`: what a pass of a costly method takes,
    in plain steps; `token_behind`: a token that it catches up with, in its passes; `twice_as_many`: how much longer its
    pass takes for two sequences than for one. `offer_every`: steps from one look to the next at a costly method that is
    not in use. `catch_up_steps`: steps over which its catching up with a sequence is expected to pay. `most_probe`: the
    most steps from one try of it to the next, where it never pays.
    `typical`: which of the measured times is taken for what a step takes, as a share of those below it.
    `is_shared`: a step's time is nearly all shared by its sequences, so they gain and lose by drafts together.
    """

    drafted_step: float
    draft_token: float
    costly_pass: float
    token_behind: float
    twice_as_many: float
    offer_every: int
    catch_up_steps: int
    most_probe: int
    typical: float
    is_shared: bool


ON_CPU = Priors(
    drafted_step=0.0,
    draft_token=0.25,
    costly_pass=1.0,
    token_behind=0.25,
    twice_as_many=2.0,
    offer_every=16,
    catch_up_steps=3,
    most_probe=2048,
    typical=0.25,
    is_shared=False,
)
ON_GPU = Priors(
    drafted_step=0.12,
    draft_token=0.02,
    costly_pass=0.1,
    token_behind=1 / 256,
    twice_as_many=1.1,
    offer_every=1,
    catch_up_steps=32,
    most_probe=128,
    typical=0.5,
    is_shared=True,
)
"""A step reads all weights whatever it computes, so a few tokens hardly add to it; but the host has to see the tokens
before the next one, and kernels of several rows are a little slower (docs/results/speculation_gpu.md). A look costs
the host alone, and it is not the host that steps wait for."""

_NUM_PLAIN, _NUM_EXTRA = 9, 15
_PLAIN_EVERY = 4
_TOLERANCE = 0.03


class AcceptanceHistory:
    """How the last HISTORY drafts of one kind went, position by position.

    A draft of which `tried` tokens were looked at and `passed` were right says something of the positions up to
    `tried` only. The chance of position j is a product of conditional rates, each among the drafts that were right
    before it (the estimator of Kaplan and Meier, 1958).

    `prior` is what drafts of this kind are taken for while little is known of them: how the method's went in all
    texts, for those of one. Without it a position is taken for what the one before it is, else nobody ever tried it,
    and for `presumed` at least.
    """

    def __init__(self, max_length: int, prior: AcceptanceHistory | None = None, presumed: float = 0.0) -> None:
        self._max_length = max_length
        self._prior = prior
        self._presumed = presumed
        self._version = self._version_of_prior = 0
        self._drafts: deque[tuple[int, int]] = deque()
        self._num_tried = [0] * max_length
        self._num_passed = [0] * max_length
        self._rates: list[float] | None = None
        self._expected: list[float] = []
        self.first_chance = self._first_presumed = max(PRIOR_RATE, presumed)
        """That a draft's first token is right, by what was measured of this kind."""

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
        if tried > self._max_length:
            tried = self._max_length
        if passed > tried:
            passed = tried
        self._drafts.append((tried, passed))
        self._add(tried, passed, 1)
        if len(self._drafts) > HISTORY:
            self._add(*self._drafts.popleft(), -1)
        num_right = self._num_passed[0] + PRIOR_WEIGHT * self._first_presumed
        self.first_chance = num_right / (self._num_tried[0] + PRIOR_WEIGHT)
        self._rates = None
        self._version += 1

    def expected(self) -> list[float]:
        """The tokens that come of a step with a draft of each length, from none on: its one, and those that are right.

        They are not estimated cautiously: what is not tried is not learned, and what may be lost is bounded elsewhere.
        """
        self.rates()
        return self._expected

    def rates(self) -> list[float]:
        """The chance of each position where those before it are right; anew where something was recorded."""
        prior = self._prior
        if self._rates is not None and (prior is None or prior._version == self._version_of_prior):
            return self._rates
        rates: list[float] = []
        counts = zip(self._num_passed, self._num_tried, strict=True)
        if prior is not None:
            self._version_of_prior = prior._version
            for (passed, tried), rate in zip(counts, prior.rates(), strict=True):
                rates.append((passed + TEXT_WEIGHT * rate) / (tried + TEXT_WEIGHT))
        else:
            rate = PRIOR_RATE
            for passed, tried in counts:
                rate = (passed + PRIOR_WEIGHT * max(rate, self._presumed)) / (tried + PRIOR_WEIGHT)
                rates.append(rate)
        self._rates = rates
        self._expected = list(accumulate(accumulate(rates, mul), initial=1.0))
        return rates

    def _add(self, tried: int, passed: int, sign: int) -> None:
        if tried == 1:  # the usual case: a step without drafts brings one token to compare
            self._num_tried[0] += sign
            self._num_passed[0] += sign * passed
            return
        for position in range(tried):
            self._num_tried[position] += sign
        for position in range(passed):
            self._num_passed[position] += sign


class StepCosts:
    """Seconds of steps by the sequences that decode in them, and what draft tokens add.

    On a CPU these are lower quartiles, because what disturbs a step only ever makes it longer: on a busy machine half
    of them say more about the neighbours than about the step. Beside a device they are medians: there a busy host
    delays steps with drafts, which wait for it, and no others, so that is part of what drafts cost. A plain step's cost
    is known for a number of sequences once such a step was measured. What draft tokens add is kept for each number of
    sequences and of tokens, since steps do not grow evenly (kernels take rows by sixes, graphs come in sizes); where a
    number was not measured, the nearest that was says what a token adds.
    """

    def __init__(self, priors: Priors = ON_CPU) -> None:
        self._priors = priors
        self._plain: dict[int, deque[float]] = {}
        self._plain_costs: dict[int, float] = {}
        self._num_plain = 0
        self._extra: dict[tuple[int, int], deque[float]] = {}
        self._extra_costs: dict[tuple[int, int], float] = {}
        self._added: dict[tuple[int, int], float] = {}
        self._ready: dict[tuple[int, int], deque[float]] = {}
        self._seconds_per_prompt_token: float | None = None

    def pass_over(self, num_steps: int) -> None:
        """Plain steps have passed that nobody measured: the next one says more."""
        self._num_plain += num_steps

    def record(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step without prompts."""
        if num_draft_tokens == 0:
            plain = self._plain.get(num_sequences)
            if plain is None:
                plain = self._plain[num_sequences] = deque(maxlen=_NUM_PLAIN)
            elif len(plain) == _NUM_PLAIN:
                self._num_plain += 1
                if self._num_plain < _PLAIN_EVERY:  # looking at each takes longer than it is worth
                    return
                self._num_plain = 0
            plain.append(seconds)
            self._plain_costs[num_sequences] = self._typical(plain)
            return
        if (before := self._plain_costs.get(num_sequences)) is None:
            return
        key = _size(num_sequences), _size(num_draft_tokens)
        samples = self._extra.get(key)
        if samples is None:  # what it is taken for counts once, so that one bad moment does not decide
            guess = self._extra_per_token(num_sequences, num_draft_tokens)
            samples = self._extra[key] = deque((guess,), maxlen=_NUM_EXTRA)
        samples.append((seconds - before) / num_draft_tokens)
        known, cost = self._extra_costs.get(key), max(0.0, self._typical(samples))
        if known is None or abs(cost - known) > _TOLERANCE * known:  # all that was derived from it is computed again
            self._extra_costs[key] = cost
            self._added.clear()

    def record_ready(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step whose drafts were under way when they were wanted, with what it waited for them."""
        if (before := self._plain_costs.get(num_sequences)) is not None:
            key = num_sequences, num_draft_tokens
            self._ready.setdefault(key, deque(maxlen=_NUM_EXTRA)).append(seconds - before)

    def learn_prompt_token(self, seconds: float | None) -> None:
        """What a prompt's token adds to a step: a draft's is taken for as much where none was measured."""
        if self._seconds_per_prompt_token is None:
            self._added.clear()
        self._seconds_per_prompt_token = seconds

    def plain(self, num_sequences: int) -> float | None:
        """Seconds of a step without drafts; None where none was measured."""
        return self._plain_costs.get(num_sequences)

    def own_share(self, num_sequences: int) -> float:
        """Seconds that each sequence adds to a plain step, on the average from the smallest size that was measured;
        call it where `plain` is known. A lone sequence's share is the whole; without a smaller size it is taken for 0.
        """
        plain = self._plain_costs[num_sequences]
        if num_sequences == 1:
            return plain
        smallest = min(self._plain_costs)
        if smallest == num_sequences:
            return 0.0
        each = (plain - self._plain_costs[smallest]) / (num_sequences - smallest)
        return min(max(0.0, each), plain / num_sequences)

    def added(self, num_sequences: int, num_draft_tokens: int) -> float:
        """Seconds that so many draft tokens add to a step; call it where `plain` is known."""
        key = num_sequences, num_draft_tokens
        added = self._added.get(key)
        if added is None:
            added = self._added[key] = num_draft_tokens * self._extra_per_token(num_sequences, num_draft_tokens)
        return added

    def added_ready(self, num_sequences: int, num_draft_tokens: int) -> float | None:
        """The same of drafts that are under way, with what is waited for them; None where none was measured."""
        samples = self._ready.get((num_sequences, num_draft_tokens))
        return None if samples is None else max(0.0, self._typical(samples))

    def fixed_part(self, num_sequences: int, num_draft_tokens: int) -> float:
        """What `added` would be for next to no tokens: a step's having drafts at all."""
        fixed = self._plain_costs[num_sequences] * self._priors.drafted_step
        if not fixed:
            return 0.0
        expected = num_draft_tokens * self._expected_per_token(num_sequences, num_draft_tokens)
        return self.added(num_sequences, num_draft_tokens) * fixed / expected

    def _typical(self, values: deque[float]) -> float:
        return sorted(values)[int(len(values) * self._priors.typical)]

    def _extra_per_token(self, num_sequences: int, num_draft_tokens: int) -> float:
        size, number = _size(num_sequences), _size(num_draft_tokens)
        if (known := self._extra_costs.get((size, number))) is not None:
            return known
        near = {
            abs(math.log2(other / size)) * 4 + abs(math.log2(count / number)): (each, count)
            for (other, count), each in self._extra_costs.items()
            if size <= 4 * other <= 16 * size
        }
        expected = self._expected_per_token(num_sequences, num_draft_tokens)
        if not near:
            return expected
        each, count = near[min(near)]
        expected_there = self._expected_per_token(num_sequences, count)
        return each * expected / expected_there if expected_there else each

    def _expected_per_token(self, num_sequences: int, num_draft_tokens: int) -> float:
        plain = self._plain_costs[num_sequences]
        each = self._seconds_per_prompt_token
        if each is None:
            each = plain / num_sequences * self._priors.draft_token
        return each + plain * self._priors.drafted_step / num_draft_tokens


def _size(number: int) -> int:
    """The sizes that are told apart: each up to 8, then four to a doubling."""
    shift = max(0, number.bit_length() - 3)
    return number >> shift << shift
