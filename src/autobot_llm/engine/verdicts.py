"""A step that is under way, and what one with drafts comes to, once its rows are chosen. Knows plans, verdicts and
choices; launches nothing and makes no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import NamedTuple

from autobot_llm.engine.batching.drafts import straighten
from autobot_llm.engine.batching.plan import StepBatch, StepPlan
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.choice import Choice
from autobot_llm.engine.executor import Features, LaunchedStep, TreeExecutor
from autobot_llm.engine.sampler import Outcome, SamplingFailure
from autobot_llm.engine.speculative.acceptance import Verdict
from autobot_llm.engine.speculative.speculator import Speculator


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was launched, and when. `batch` is there where it has drafts: nothing is planned before their
    verdict, so its sequences have not been advanced, and some may have left."""

    plan: StepPlan
    launched: LaunchedStep
    start_time: float
    batch: StepBatch | None = None


Judged = list[tuple[Choice, list[Outcome], int]]
"""What a step with drafts has brought to choices: tokens, and how many they had before."""


def take_verdicts(
    plan: StepPlan,
    batch: StepBatch,
    verdicts: SequenceABC[Verdict],
    scheduler: Scheduler,
    choices: Mapping[int, Choice],
    mover: TreeExecutor | None,
) -> Judged:
    """Resolve a plan, whose trees become lines first. Returns what each choice gets that is still there, by sequence
    in `choices`."""
    if batch.tree_masks_T is not None and mover is not None:
        mover.move(*straighten(plan, batch, [verdict.path for verdict in verdicts]))
    scheduler.advance(plan)
    tokens = tokens_of([verdict.outcomes[-1] for verdict in verdicts])
    scheduler.resolve(plan, tokens, [verdict.num_accepted for verdict in verdicts])
    judged: Judged = []
    found = iter(verdicts)
    for item in plan.scheduled:
        verdict = next(found) if item.samples else None
        choice = choices.get(item.sequence.id)
        if choice is None:
            continue
        choice.stats.largest_batch = max(choice.stats.largest_batch, len(plan.scheduled))
        if verdict is not None:
            num_before = item.start + item.num_tokens - item.num_draft - item.sequence.num_prompt_tokens
            judged.append((choice, verdict.outcomes, num_before))
    return judged


class Lesson(NamedTuple):
    """A step with drafts that was resolved: what it brought to choices, and what it has to teach. `features` None:
    those that the speculator has kept itself."""

    plan: StepPlan
    verdicts: SequenceABC[Verdict]
    judged: Judged
    seconds: float
    features: Features | None = None

    @property
    def may_end(self) -> bool:
        """Whether one of the choices may have come to its end."""
        return any(choice.may_end(outcomes, num_before) for choice, outcomes, num_before in self.judged)


def learn(speculator: Speculator, lesson: Lesson) -> None:
    """Let the speculator see a plan that was resolved, and what its drafts came to, unless somebody had left before:
    then the step says little."""
    plan, verdicts, judged, seconds, features = lesson
    speculator.observe(plan, verdicts, features)
    if len(judged) == len(verdicts):
        stats = [choice.stats for choice, _, _ in judged]
        speculator.record(plan, [verdict.num_accepted for verdict in verdicts], seconds, stats)


def tokens_of(outcomes: SequenceABC[Outcome]) -> list[int | None]:
    """None for what failed."""
    return [None if isinstance(outcome, SamplingFailure) else outcome.token_id for outcome in outcomes]
