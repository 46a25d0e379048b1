"""Verify drafts: choose the token after each drafted one as the sampler would have, and keep what agrees. Knows logits
and drafts; knows nothing of how the drafts were made.

The engine's tokens are a function of (logits, the tokens before, seed, position): the noise is a hash, not a stream
(noise.py). So the token at each drafted position is the very one that a plain step would have chosen there, provided
that the draft before it was right. A draft token is accepted if and only if it is that token; the first one that is
not is replaced by it. Greedy, sampled, seeded or not, the tokens are the same with and without drafts, whatever was
drafted, hence of the target's distribution: there is nothing to correct, and nothing to prove beyond this sentence.

A draft that was itself sampled from a model's distribution q with this noise is coupled with the target's p: both take
argmax of weight / noise over the same noise, and agree with a probability of at least (1 - TV(p, q)) / (1 + TV(p, q))
(Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024). Rejection
sampling (Leviathan et al., 2022; Chen et al., 2023) reaches 1 - TV(p, q), for tokens that then depend on the drafts;
for a draft without a distribution (a copied text) both accept with probability p. docs/results/speculation_cpu.md says
what the difference is worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import torch

from autobot_llm.engine.batching.plan import ScheduledSequence
from autobot_llm.engine.executor import SampledRows
from autobot_llm.engine.sampler import Outcome, SampledToken, Sampler, SamplingFailure, broken_logits, is_stateless
from autobot_llm.engine.sequence import Sequence


class _Line(NamedTuple):
    """A sequence, its draft, the row of its first logits, and its place in the verdict."""

    sequence: Sequence
    draft_ids: list[int]
    row: int
    place: int


# R rows: one for each sampling sequence and one more for each of its draft tokens, in order; V vocabulary
def verify(sampler: Sampler, logits_RV: torch.Tensor, scheduled: SequenceABC[ScheduledSequence]) -> list[list[Outcome]]:
    """What each item that samples gets: its accepted draft tokens, and the one token after them.

    The last outcome may be a SamplingFailure. Sequences and matchers are as they were when this returns.
    """
    lines = list(_lines(scheduled))
    verdict: list[list[Outcome]] = [[] for _ in lines]
    free = [line for line in lines if is_stateless(line.sequence.params)]
    if free:
        rows = [row for line in free for row in range(line.row, line.row + len(line.draft_ids) + 1)]
        sequences = [line.sequence for line in free for _ in range(len(line.draft_ids) + 1)]
        offsets = [offset for line in free for offset in range(len(line.draft_ids) + 1)]
        outcomes = iter(sampler.sample(_take(logits_RV, rows), sequences, offsets))
        for line in free:
            verdict[line.place] = _agreeing([next(outcomes) for _ in range(len(line.draft_ids) + 1)], line.draft_ids)
    if len(free) < len(lines):
        bound = [line for line in lines if not is_stateless(line.sequence.params)]
        for line, found in zip(bound, _walk(sampler, logits_RV, bound), strict=True):
            verdict[line.place] = found
    return verdict


def verify_sampled(sampled: SampledRows, scheduled: SequenceABC[ScheduledSequence]) -> list[list[Outcome]]:
    """The same where a device has sampled each row with the noise of its position."""
    outcomes: list[Outcome] = [
        SampledToken(token) if math.isfinite(best) else broken_logits(best)
        for token, best in zip(sampled.tokens, sampled.best_logits, strict=True)
    ]
    return [
        _agreeing(outcomes[line.row : line.row + len(line.draft_ids) + 1], line.draft_ids) for line in _lines(scheduled)
    ]


def _lines(scheduled: SequenceABC[ScheduledSequence]) -> Iterator[_Line]:
    row = place = 0
    for item in scheduled:
        if item.samples:
            yield _Line(item.sequence, item.sequence.draft_ids[: item.num_draft], row, place)
            row += 1 + item.num_draft
            place += 1


def _agreeing(outcomes: list[Outcome], draft_ids: list[int]) -> list[Outcome]:
    """The outcomes as far as the draft agrees, and the first one that it does not foresee."""
    for i, (outcome, token_id) in enumerate(zip(outcomes, draft_ids, strict=False)):
        if isinstance(outcome, SamplingFailure) or outcome.token_id != token_id:
            return outcomes[: i + 1]
    return outcomes


def _walk(sampler: Sampler, logits_RV: torch.Tensor, lines: list[_Line]) -> list[list[Outcome]]:
    """One position after the other, where penalties, a minimum length or a grammar look at the tokens before: the
    sequences go along, and are taken back at the end."""
    found: list[list[Outcome]] = [[] for _ in lines]
    num_walked = [0] * len(lines)
    num_taken = [0] * len(lines)  # by the matchers
    walking = list(range(len(lines)))
    depth = 0
    while walking:
        rows = [lines[i].row + depth for i in walking]
        outcomes = sampler.sample(_take(logits_RV, rows), [lines[i].sequence for i in walking])
        going_on = []
        for i, outcome in zip(walking, outcomes, strict=True):
            found[i].append(outcome)
            sequence, draft_ids = lines[i].sequence, lines[i].draft_ids
            if isinstance(outcome, SamplingFailure) or depth == len(draft_ids):
                continue
            token_id = outcome.token_id
            if token_id != draft_ids[depth] or token_id in sequence.params.stop_token_ids:
                continue
            sequence.token_ids.append(token_id)
            num_walked[i] += 1
            if sequence.matcher is not None:
                if not sequence.matcher.advance(token_id):
                    raise AssertionError(f"token {token_id} was chosen under the mask of a grammar that forbids it")
                num_taken[i] += 1
                if sequence.matcher.is_complete:
                    continue
            going_on.append(i)
        walking = going_on
        depth += 1
    for line, walked, taken in zip(lines, num_walked, num_taken, strict=True):
        if walked:
            del line.sequence.token_ids[-walked:]
        if taken:
            assert line.sequence.matcher is not None
            line.sequence.matcher.rollback(taken)
    return found


def _take(logits_RV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
