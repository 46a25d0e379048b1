"""How long drafts are worth being: lengths that may be the best, and what they take. Knows chances and measured costs
of steps; knows nothing of methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from itertools import pairwise

from autobot_llm.engine.speculative.measurements import StepCosts

NOTHING = (1.0,)
"""The tokens that come of a step without a draft."""


def candidate_lengths(
    costs: StepCosts, expected: SequenceABC[SequenceABC[float]], plain: float, own: float
) -> Iterator[list[int]]:
    """Lengths that may be the best: each sequence's by its own time, and the likeliest tokens of all as long as the
    tokens per second grow. `expected`: of each sequence, the tokens that come of a draft of each length, none first."""
    num_sequences, added = len(expected), costs.added
    ranked = [(after - before, i) for i, tokens in enumerate(expected) for before, after in pairwise(tokens)]
    ranked.sort(key=_chance, reverse=True)
    if num_sequences > 1:
        each = added(num_sequences, len(ranked)) / len(ranked)
        yield [own_length(tokens, own, each) for tokens in expected]
    total = float(num_sequences)
    best_rate, best_number = total / plain, 0
    for number, (chance, _) in enumerate(ranked, 1):
        total += chance
        rate = total / (plain + added(num_sequences, number))
        if rate > best_rate:
            best_rate, best_number = rate, number
    lengths = [0] * num_sequences
    for _, i in ranked[:best_number]:
        lengths[i] += 1
    yield lengths


def own_length(expected: SequenceABC[float], own: float, each: float) -> int:
    """The best for a sequence that takes `own` seconds, and `each` for a token of its draft."""
    best, best_length = own, 0
    for length, tokens in enumerate(expected):
        if (own + length * each) / tokens < best:
            best, best_length = (own + length * each) / tokens, length
    return best_length


def seconds_of(
    costs: StepCosts,
    expected: SequenceABC[SequenceABC[float]],
    lengths: list[int],
    shared: float,
    own: float,
    counts: list[int] | None = None,
) -> float:
    """What drafts of these lengths take until every sequence has come as far as a plain step brings it: `shared`
    seconds of all and `own` ones of each. `counts`: their tokens, where they are trees."""
    counts = lengths if counts is None else counts
    each = 0.0
    if number := sum(counts):
        fixed = costs.fixed_part(len(counts), number)
        shared += fixed
        each = (costs.added(len(counts), number) - fixed) / number
    seconds, least = 0.0, math.inf
    for tokens_by_length, length, count in zip(expected, lengths, counts, strict=True):
        tokens = tokens_by_length[length]
        if tokens < least:
            least = tokens
        seconds += (own + count * each) / tokens
    return seconds + shared / least


def _chance(ranked: tuple[float, int]) -> float:
    return ranked[0]
