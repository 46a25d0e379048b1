"""What a step's prompt tokens cost, as measured. Knows counts and seconds; knows nothing of sequences."""

from __future__ import annotations

from collections import deque
from statistics import median

NUM_SAMPLES = 15
FEWEST_TOKENS = 16
"""Fewer prompt tokens than this say more about a step's fixed cost than about a token's."""
STEP_WEIGHT = 0.2  # of the newest step in the running mean


class StepCost:
    """An estimate of `seconds_per_step` (a step without prompts) and `seconds_per_prompt_token` (beyond that).

    The latter is a median, so that a step which met a compiler or a busy machine changes nothing; a fixed cost of steps
    with prompts is part of it, at the sizes seen last. None: nothing was measured yet.
    """

    def __init__(self) -> None:
        self.seconds_per_step: float | None = None
        self.seconds_per_prompt_token: float | None = None
        self._samples: deque[float] = deque(maxlen=NUM_SAMPLES)

    def record(self, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds` in all and held that many tokens of prompts."""
        if num_prompt_tokens == 0:
            mean = self.seconds_per_step
            self.seconds_per_step = seconds if mean is None else mean + STEP_WEIGHT * (seconds - mean)
        elif num_prompt_tokens >= FEWEST_TOKENS:
            extra = max(0.0, seconds - (self.seconds_per_step or 0.0))
            self._samples.append(extra / num_prompt_tokens)
            self.seconds_per_prompt_token = median(self._samples)

    def num_prompt_tokens_within(self, seconds: float) -> int | None:
        """How many prompt tokens add at most `seconds` to a step, but at least FEWEST_TOKENS, so that prompts always
        advance; None where there is no limit, or none is known yet."""
        if not self.seconds_per_prompt_token:
            return None
        return max(FEWEST_TOKENS, int(seconds / self.seconds_per_prompt_token))
