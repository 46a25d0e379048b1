"""When to leave texts alone. Knows steps and whether looking was in vain; knows nothing of texts or costs."""

from __future__ import annotations

MOST_REST = 8
"""Steps that pass unlooked at, at most: what begins to be predictable meanwhile is noticed that much later."""


class Rests:
    """Steps of a small model that pass without anybody looking for drafts, or measuring.

    Looking at texts, deciding and booking takes a few per cent of such a step: the caches are full of weights when it
    is their turn. So after each look in vain twice as many steps pass as after the one before, up to MOST_REST, and
    none once something was drafted or a text has left. Unless it `may_rest`, every step is looked at.
    """

    __slots__ = ("_length", "_num_left", "_num_passed", "may_rest")

    def __init__(self, *, may_rest: bool) -> None:
        self.may_rest = may_rest
        self._length = self._num_left = self._num_passed = 0

    def passes(self) -> bool:
        """Whether the step at hand is one of them."""
        if not self._num_left:
            return False
        self._num_left -= 1
        self._num_passed += 1
        return True

    def go_on(self) -> None:
        """A look was in vain."""
        if self.may_rest:
            self._num_left = self._length = min(2 * self._length or 1, MOST_REST)

    def end(self) -> None:
        """There may be something to find."""
        self._num_left = self._length = 0

    def take(self) -> int:
        """The steps that have passed since this was called last."""
        number, self._num_passed = self._num_passed, 0
        return number
