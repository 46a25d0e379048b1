"""What a sequence may lose by drafts: a bound that holds whatever was expected of them. Knows seconds only."""

from __future__ import annotations

GRANT_STEPS = 0.75
"""What a new sequence may lose, in its shares of a plain step: enough to find out what its drafts are worth."""

LOSS_SHARE = 0.005
"""Of its time, what it may lose besides."""

MOST_STEPS = 4.0
"""The most that gains and waiting are worth later: a text that stops being copied loses no more than this after it."""


class Credit:
    """An account in seconds: GRANT_STEPS and LOSS_SHARE of the sequence's time, plus what drafts have gained, less what
    they have cost, at most MOST_STEPS.

    Nothing may be spent that is not there, so at the end of an answer, with measured costs, drafts have cost it at
    most GRANT_STEPS steps and LOSS_SHARE of its time more than they have gained: by construction, whatever an adversary
    makes of the guesses. `now` is the time that a sequence has spent in the engine, counted in its share of each
    step as if all had been plain; `share` its share of a step.
    """

    __slots__ = ("_balance", "_since")

    def __init__(self) -> None:
        self._balance: float | None = None
        self._since = 0.0

    def balance(self, now: float, share: float) -> float:
        before = self._balance
        if before is None:
            balance = GRANT_STEPS * share
        else:
            balance = min(before + LOSS_SHARE * (now - self._since), MOST_STEPS * share)
        self._balance, self._since = balance, now
        return balance

    def book(self, gain: float, now: float, share: float) -> None:
        """Enter what a step's drafts have gained this sequence, less their cost."""
        self._balance = min(self.balance(now, share) + gain, MOST_STEPS * share)
