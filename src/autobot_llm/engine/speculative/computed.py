"""What a step computes of which sequence, for methods that look at its features. Knows plans and verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC

from autobot_llm.engine.batching.plan import StepPlan
from autobot_llm.engine.speculative.acceptance import Verdict
from autobot_llm.engine.speculative.proposer import Computed


def prompts_of(plan: StepPlan) -> Iterator[Computed]:
    """The parts of prompts in a step that may be under way, as far as the tokens after them are known."""
    row = 0
    for sequence, start, num_tokens, *_ in plan.scheduled:
        number = min(start + num_tokens, sequence.num_prompt_tokens - 1) - start
        if number > 0:
            yield Computed(sequence, start, list(range(row, row + number)), None)
        row += num_tokens


def computed_of(plan: StepPlan, verdicts: SequenceABC[Verdict]) -> Iterator[Computed]:
    """What a step settled of each sequence that has its blocks still, which who left it has not."""
    row = logit_row = 0
    given = iter(verdicts)
    for sequence, start, num_tokens, samples, epoch, num_draft in plan.scheduled:
        end = row + num_tokens - num_draft
        rows, chosen_from = list(range(row, end)), None
        if samples:
            chosen_from = logit_row
            if (verdict := next(given, None)) is not None:
                rows += [end + node for node in verdict.path]
                chosen_from = verdict.rows[-1]
            logit_row += 1 + num_draft
        if sequence.epoch == epoch:
            yield Computed(sequence, start, rows, chosen_from)
        row += num_tokens
