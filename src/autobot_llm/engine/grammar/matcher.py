"""Where one answer stands in its grammar, and which tokens may follow. Knows token ids; knows nothing of logits.

A matcher belongs to its sequence and not to a step: it moves with each token that is accepted, so preemption, chunks
and batches do not concern it. A drafted continuation is cut with `num_allowed`, or walked with `advance` and taken back
with `rollback`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from autobot_llm.errors import InvalidRequestError

if TYPE_CHECKING:
    import llguidance

UInt8Array = npt.NDArray[np.uint8]


class Grammar:
    """A compiled grammar: what every answer under it begins with. `field` is the request's field that asked for it."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, field: str) -> None:
        self.vocab_size = vocab_size
        self.field = field
        self._matcher = matcher

    def start(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self.vocab_size, self.field)

    def named(self, field: str) -> Grammar:
        """The same grammar, asked for by another field."""
        return self if field == self.field else Grammar(self._matcher, self.vocab_size, field)


# V vocabulary
class Matcher:
    """One answer's place in its grammar. Not thread-safe; a call may be made from any thread."""

    __slots__ = ("_bits", "_matcher", "_vocab_size", "field")

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, field: str) -> None:
        self.field = field
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-(vocab_size + 1) // 32), np.uint32)  # the library's own end token is the last bit

    @property
    def is_satisfied(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> UInt8Array:
        """allowed_V: 1 for each token that may come next, the end tokens among them where the answer may end.

        Raises InvalidRequestError where the grammar needs more work for this place than it gets, or the vocabulary
        cannot spell what must follow.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise self._failure()
        return np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")

    def advance(self, token_id: int) -> bool:
        """Take a token as the next one; False, and the matcher is of no use any more, where it is not allowed."""
        return self._matcher.consume_token(token_id)

    def num_allowed(self, token_ids: list[int]) -> int:
        """How many of these tokens may follow, one after the other. The matcher stays where it is."""
        return self._matcher.validate_tokens(token_ids)

    def rollback(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        taken_back = self._matcher.rollback(num_tokens)
        assert taken_back, "no more tokens are taken back than were taken"

    def clone(self) -> Matcher:
        """A matcher at the same place that goes its own way."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self.field)

    def _failure(self) -> InvalidRequestError:
        reason = self._matcher.get_error().splitlines()[0]
        if reason.startswith("NoExtension"):  # the library's name for it
            reason = "no token of this model's vocabulary continues the answer"
        else:
            reason = f"the grammar is too costly to follow: {reason}"
        return InvalidRequestError(f"{self.field}: {reason}", param=self.field)
