"""When to leave texts alone. Knows steps, and whether looking was in vain; knows nothing of texts or costs."""

from __future__ import annotations

MOST_REST = 16
"""Steps that pass unlooked at, at most: what begins to be predictable meanwhile is noticed that much later."""
PATIENCE = 2
"""Looks in vain until as many steps again pass after each."""
PATIENCE_KEPT = 2 * PATIENCE
"""Looks in vain that count on when nobody is left: what comes then is another text, with another beginning."""


class Rests:
    """Steps of a small model that pass without anybody looking for drafts, or measuring.

    Looking at texts, deciding and booking takes 4 % of such a step, several times what it takes by itself: the caches
    are full of weights when it is their turn. So the more looks have been in vain, the more steps pass after each, from
    one to MOST_REST; after one that was not there is the next at once. Unless it `may_rest`, every step is looked at.
    """

    __slots__ = ("_num_left", "_num_passed", "_num_vain", "may_rest")

    def __init__(self, *, may_rest: bool) -> None:
        self.may_rest = may_rest
        self._num_vain = self._num_left = self._num_passed = 0

    def passes(self) -> bool:
        """Whether the step at hand is one of them."""
        if not self._num_left:
            return False
        self._num_left -= 1
        self._num_passed += 1
        return True

    def looked(self, is_in_vain: bool) -> None:
        """Somebody has looked; in vain where nothing is drafted."""
        if not is_in_vain:
            self._num_left = self._num_vain = 0
        elif self.may_rest:
            self._num_left = min(1 << self._num_vain // PATIENCE, MOST_REST)
            self._num_vain += 1

    def start_over(self) -> None:
        """Nobody is left to look at."""
        self._num_left = 0
        self._num_vain = min(self._num_vain, PATIENCE_KEPT)

    def take(self) -> int:
        """The steps that have passed since this was called last."""
        number, self._num_passed = self._num_passed, 0
        return number
