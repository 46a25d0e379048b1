"""What drafts may lose: a bound that holds whatever was expected of them. Knows plain steps only."""

from __future__ import annotations

FIRST_STEPS = 3.0
"""What may be lost before anything was gained: enough to find out what drafts are worth."""

TEXT_STEPS = 0.75
"""What each answer may lose besides, in its shares of a step: nobody starts with nothing because others lost it."""

LOSS_SHARE = 0.005
"""Of the time, what may be lost besides."""

MOST_STEPS = 6.0
"""The most that gains and waiting are worth later: texts that stop being predictable lose no more than this."""


class Credit:
    """An engine's account in plain steps: FIRST_STEPS, TEXT_STEPS for each answer and LOSS_SHARE of the time, plus what
    drafts have gained, less what they have cost; never more than MOST_STEPS.

    Nothing may be spent that is not there, so from any moment on, with measured costs, drafts cost at most MOST_STEPS
    steps, TEXT_STEPS of each further answer and LOSS_SHARE of the time more than they gain: by construction, whatever
    an adversary makes of the guesses. A step counts as a plain one of as many sequences. One account serves all: what
    one text gains is what the engine can afford to find out about the next.
    """

    __slots__ = ("balance",)

    def __init__(self) -> None:
        self.balance = FIRST_STEPS

    def wait(self, num_steps: int) -> None:
        """Steps have passed."""
        self.book(LOSS_SHARE * num_steps)

    def welcome(self, num_sequences: int) -> None:
        """An answer begins, as one of so many."""
        self.book(TEXT_STEPS / num_sequences)

    def book(self, num_steps: float) -> None:
        """Enter what drafts have gained, less their cost."""
        self.balance = min(self.balance + num_steps, MOST_STEPS)
