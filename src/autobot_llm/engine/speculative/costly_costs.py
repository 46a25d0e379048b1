"""What a costly method takes: passes, catching up, and the tokens of its drafts. Knows counts and seconds; knows no
sequences and no choices.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from autobot_llm.engine.speculative.measurements import ENOUGH, ON_CPU, Priors

SURE = 3
"""Measurements of a size after which it is judged by them alone."""


class CostlyCosts:
    """Seconds of a costly method: of one pass over some sequences, and of each token that it catches up with."""

    def __init__(self, priors: Priors = ON_CPU) -> None:
        self._priors = priors
        self._most: dict[int, float] = {}
        """What a pass takes at most, by size: of drafts that began with much to catch up with."""
        self._passes = _Medians()
        self._catch_up = _Medians()
        """Seconds for each token that is caught up with, by the size of their number."""
        self._tokens: dict[tuple[int, int], float] = {}
        self._expected_tokens: dict[tuple[int, int], int] = {}

    def record_tokens(self, num_sequences: int, depth: int, num_tokens: int) -> None:
        """Learn how many tokens so many drafts of that depth had: a tree has more than its depth."""
        key, each = (num_sequences.bit_length(), depth), num_tokens / num_sequences
        if self._tokens.get(key) != each:
            self._tokens[key] = each
            self._expected_tokens.clear()

    def tokens(self, num_sequences: int, depth: int) -> int:
        """Of a draft so deep, where so many are made: a line's, unless the nearest that was seen was a tree."""
        if not self._tokens:
            return depth
        key = num_sequences.bit_length(), depth
        expected = self._expected_tokens.get(key)
        if expected is None:
            size = key[0]
            nearest = min(self._tokens, key=lambda other: 8 * abs(other[0] - size) + abs(other[1] - depth))
            found = self._tokens[nearest]
            expected = self._expected_tokens[key] = depth if found <= nearest[1] else max(depth, round(found))
        return expected

    def record(self, num_sequences: int, num_passes: int, num_behind: int, seconds: float) -> None:
        """`num_behind` counts the tokens beyond one for each sequence that the first pass caught up with."""
        size = num_sequences.bit_length()
        if num_behind <= 2 * num_sequences:
            self._passes.record(size, seconds / num_passes)
        elif self._passes.known:
            each = self.per_pass(num_sequences)
            assert each is not None
            self._catch_up.record(num_behind.bit_length(), max(0.0, seconds - num_passes * each) / num_behind)
        else:
            self._most[size] = min(seconds / num_passes, self._most.get(size, math.inf))

    def expected_pass(self, num_sequences: int, presumed: float) -> float:
        """What a pass is taken for: no more than is `presumed`, until it was measured some times. The first may hold a
        compiler's time, and what nobody tries for that is not measured again."""
        measured = self.per_pass(num_sequences)
        if measured is None:
            return presumed
        return measured if self._passes.is_sure(num_sequences.bit_length()) else min(measured, presumed)

    def per_pass(self, num_sequences: int) -> float | None:
        """Of so many sequences, or of the nearest number that was measured; None where none was."""
        known = self._passes.known or self._most
        if not known:
            return None
        size = num_sequences.bit_length()
        nearest = _nearest(known, size)
        return known[nearest] * self._priors.twice_as_many ** max(0, size - nearest)

    def catch_up(self, num_behind: int, per_pass: float) -> float:
        """Seconds of catching up with so many tokens: each takes what it took where about as many were behind, once
        that was measured some times. Beyond what was measured a token takes no more than it is taken for: most of
        catching up with a few is that there are any."""
        each = per_pass * self._priors.token_behind
        known = self._catch_up.known
        if not known:
            return num_behind * each
        nearest = _nearest(known, num_behind.bit_length())
        measured = known[nearest] if self._catch_up.is_sure(nearest) else min(known[nearest], each)
        num_measured = min(num_behind, (1 << nearest) - 1)
        return num_measured * measured + (num_behind - num_measured) * min(measured, each)


class _Medians:
    """Of the last ENOUGH seconds of each size, computed as they come: they are asked for much more often."""

    def __init__(self) -> None:
        self.known: dict[int, float] = {}
        self._seconds: dict[int, deque[float]] = {}

    def record(self, size: int, seconds: float) -> None:
        of_size = self._seconds.setdefault(size, deque(maxlen=ENOUGH))
        of_size.append(seconds)
        self.known[size] = median(of_size)

    def is_sure(self, size: int) -> bool:
        """Whether what is known of this size, or of the nearest, is more than one bad moment."""
        return bool(self.known) and len(self._seconds[_nearest(self.known, size)]) >= SURE


def _nearest(known: Mapping[int, float], size: int) -> int:
    return size if size in known else min(known, key=lambda other: abs(other - size))
