"""Verify drafts: choose the token after each drafted one as the sampler would have, and keep what agrees. Knows logits
and drafts; knows nothing of how the drafts were made.

The engine's tokens are a function of (logits, the tokens before, seed, position): the noise is a hash, not a stream
(noise.py). So the token after each drafted one is the very one that a plain step would have chosen there, provided
that the draft before it was right. A draft token is accepted if and only if it is that token; the first one that is
not is replaced by it. Greedy, sampled, seeded or not, the tokens are the same with and without drafts, whatever was
drafted, hence of the target's distribution: there is nothing to correct, and nothing to prove beyond this sentence.

That holds for trees as for lines. The token after the accepted ones is chosen before anybody looks at what was drafted
there: it is in the tree, and the path goes on, or it is not, and the path ends with it. Several candidates at one
place raise the chance of the first, and nothing else. The schemes that correct for several candidates (SpecInfer, Miao
et al., 2023; recursive rejection sampling, Jeon et al., 2024) draw the token after looking; there is no need here.

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

from autobot_llm.engine.batching.draft_tree import ROOT, depths
from autobot_llm.engine.batching.plan import ScheduledSequence
from autobot_llm.engine.executor import SampledRows
from autobot_llm.engine.sampler import Outcome, SampledToken, Sampler, SamplingFailure, broken_logits, is_stateless
from autobot_llm.engine.sequence import Sequence


class Verdict(NamedTuple):
    """What an item that samples gets: its accepted draft tokens, and the one token after them, which may be a
    SamplingFailure. rows[k] is the row whose logits outcomes[k] was chosen from: that of the sequence's last token,
    then those of the accepted draft tokens, so that the last one's hidden state is in row rows[-1]."""

    outcomes: list[Outcome]
    rows: list[int]

    @property
    def num_accepted(self) -> int:
        return len(self.outcomes) - 1

    @property
    def path(self) -> list[int]:
        """The indices of the accepted tokens in the draft."""
        return [row - self.rows[0] - 1 for row in self.rows[1:]]


class _Drafted(NamedTuple):
    """A sequence, its draft (no parents: a line), the row of its first logits, and its place in the verdict."""

    sequence: Sequence
    draft_ids: list[int]
    parents: list[int]
    row: int
    place: int

    @property
    def num_rows(self) -> int:
        return 1 + len(self.draft_ids)

    @property
    def is_sampled_at_once(self) -> bool:
        """Whether all rows are sampled together, or one position after the other where the tokens before matter. Of a
        tree most rows are beside the path, and a row that is drawn costs about half of what computing it costs."""
        params = self.sequence.params
        return is_stateless(params) and (params.is_greedy or not self.parents)

    @property
    def offsets(self) -> SequenceABC[int]:
        """How far behind the sequence's last token each row's token is."""
        return (0, *depths(self.parents)) if self.parents else range(self.num_rows)

    def child(self, node: int, token_id: int) -> int | None:
        """The draft token after this one (ROOT: after the sequence's last), if it is that token."""
        ids, parents = self.draft_ids, self.parents
        if not parents:
            return node + 1 if node + 1 < len(ids) and ids[node + 1] == token_id else None
        return next((n for n in range(node + 1, len(ids)) if parents[n] == node and ids[n] == token_id), None)


# R rows: one for each sampling sequence and one more for each of its draft tokens, in order; V vocabulary
def verify(sampler: Sampler, logits_RV: torch.Tensor, scheduled: SequenceABC[ScheduledSequence]) -> list[Verdict]:
    """The verdict on each item that samples. Sequences and matchers are as they were when this returns."""
    drafted = list(_drafted(scheduled))
    verdicts = [Verdict([], []) for _ in drafted]
    free = [one for one in drafted if one.is_sampled_at_once]
    if free:
        rows = [row for one in free for row in range(one.row, one.row + one.num_rows)]
        sequences = [one.sequence for one in free for _ in range(one.num_rows)]
        offsets = [offset for one in free for offset in one.offsets]
        outcomes = sampler.sample(_take(logits_RV, rows), sequences, offsets)
        start = 0
        for one in free:
            _follow(one, outcomes[start : start + one.num_rows], verdicts[one.place])
            start += one.num_rows
    if len(free) < len(drafted):
        _walk(sampler, logits_RV, [one for one in drafted if not one.is_sampled_at_once], verdicts)
    return verdicts


def row_offsets(item: ScheduledSequence) -> SequenceABC[int]:
    """How far behind the sequence's last token those of an item's rows are: their noise depends on it."""
    (drafted,) = _drafted([item])
    return drafted.offsets


def verify_sampled(sampled: SampledRows, scheduled: SequenceABC[ScheduledSequence]) -> list[Verdict]:
    """The same where a device has sampled each row with the noise of its position."""
    outcomes = outcomes_of(sampled)
    verdicts = []
    for one in _drafted(scheduled):
        verdicts.append(Verdict([], []))
        _follow(one, outcomes[one.row : one.row + one.num_rows], verdicts[-1])
    return verdicts


def outcomes_of(sampled: SampledRows) -> list[Outcome]:
    """What the rows of a device mean."""
    return [
        SampledToken(token) if math.isfinite(best) else broken_logits(best)
        for token, best in zip(sampled.tokens, sampled.best_logits, strict=True)
    ]


def _drafted(scheduled: SequenceABC[ScheduledSequence]) -> Iterator[_Drafted]:
    row = place = 0
    for item in scheduled:
        if item.samples:
            sequence, number = item.sequence, item.num_draft
            yield _Drafted(sequence, sequence.draft_ids[:number], sequence.draft_parents[:number], row, place)
            row += 1 + number
            place += 1


def _follow(drafted: _Drafted, outcomes: SequenceABC[Outcome], verdict: Verdict) -> None:
    """Take the outcomes as far as the draft agrees, and the first one that it does not foresee."""
    node: int | None = ROOT
    while node is not None:
        outcome = outcomes[node + 1]
        verdict.outcomes.append(outcome)
        verdict.rows.append(drafted.row + node + 1)
        node = None if isinstance(outcome, SamplingFailure) else drafted.child(node, outcome.token_id)


def _walk(sampler: Sampler, logits_RV: torch.Tensor, all_drafted: list[_Drafted], verdicts: list[Verdict]) -> None:
    """One position after the other, since penalties, a minimum length or a grammar look at the tokens before: the
    sequences go along, and are taken back at the end."""
    num_walked = [0] * len(all_drafted)
    num_taken = [0] * len(all_drafted)  # by the matchers
    walking = [(i, ROOT) for i in range(len(all_drafted))]
    while walking:
        rows = [all_drafted[i].row + node + 1 for i, node in walking]
        outcomes = sampler.sample(_take(logits_RV, rows), [all_drafted[i].sequence for i, _ in walking])
        going_on = []
        for (i, node), row, outcome in zip(walking, rows, outcomes, strict=True):
            drafted = all_drafted[i]
            sequence, verdict = drafted.sequence, verdicts[drafted.place]
            verdict.outcomes.append(outcome)
            verdict.rows.append(row)
            if isinstance(outcome, SamplingFailure) or outcome.token_id in sequence.params.stop_token_ids:
                continue
            token_id = outcome.token_id
            following = drafted.child(node, token_id)
            if following is None:
                continue
            sequence.token_ids.append(token_id)
            num_walked[i] += 1
            if sequence.matcher is not None:
                if not sequence.matcher.advance(token_id):
                    raise AssertionError(f"token {token_id} was chosen under the mask of a grammar that forbids it")
                num_taken[i] += 1
                if sequence.matcher.is_complete:
                    continue
            going_on.append((i, following))
        walking = going_on
    for drafted, walked, taken in zip(all_drafted, num_walked, num_taken, strict=True):
        if walked:
            del drafted.sequence.token_ids[-walked:]
        if taken:
            assert drafted.sequence.matcher is not None
            drafted.sequence.matcher.rollback(taken)


def _take(logits_RV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
