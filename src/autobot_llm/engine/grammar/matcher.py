"""Where one answer stands in its grammar, and which tokens may follow. Knows token ids; knows nothing of logits.

A matcher belongs to its sequence and not to a step: it moves with each token that is accepted, so preemption, chunks
and batches do not concern it. A drafted continuation is cut with `num_allowed`, or walked with `advance` and taken back
with `rollback`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from autobot_llm.errors import InvalidRequestError

if TYPE_CHECKING:
    import llguidance

UInt8Array = npt.NDArray[np.uint8]

# Processor time that one answer's masks may take: an ordinary answer of 2,000 tokens takes a tenth of it. Together with
# the library's limit on each mask it keeps a hostile grammar from slowing everybody down for long.
MAX_MASK_SECONDS = 2.0


class Grammar:
    """A compiled grammar: what every answer under it begins with. `field` is the request's field that asked for it.

    Answers under one grammar share what the library learns of it on the way, its limits too: once one of them has met
    a limit, the grammar `is_spent`, and is compiled anew for those that come.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocab_size: int,
        field: str,
        *,
        max_mask_seconds: float = MAX_MASK_SECONDS,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_mask_seconds = max_mask_seconds
        self.field = field
        self.is_spent = False
        self._matcher = matcher

    def start(self) -> Matcher:
        return Matcher(self, self._matcher.deep_copy())


# V vocabulary
class Matcher:
    """One answer's place in its grammar. Not thread-safe; a call may be made from any thread."""

    __slots__ = ("_bits", "_grammar", "_matcher", "_seconds")

    def __init__(self, grammar: Grammar, matcher: llguidance.LLMatcher) -> None:
        self._grammar = grammar
        self._matcher = matcher
        # One bit more than tokens: the library's own end token.
        self._bits = np.zeros(-(-(grammar.vocab_size + 1) // 32), np.uint32)
        self._seconds = 0.0

    @property
    def field(self) -> str:
        """The request's field that asked for the grammar."""
        return self._grammar.field

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

        Raises InvalidRequestError where the grammar needs more work than it gets, for this place or for the answer so
        far, and where the vocabulary cannot spell what must follow.
        """
        start = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._seconds += time.thread_time() - start
        if self._matcher.is_error():
            self._grammar.is_spent = True
            raise self._refusal(self._matcher.get_error().splitlines()[0])
        if self._seconds > self._grammar.max_mask_seconds:
            raise self._refusal(f"its masks took {self._seconds:.1f} s")
        return np.unpackbits(self._bits.view(np.uint8), count=self._grammar.vocab_size, bitorder="little")

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
        return Matcher(self._grammar, self._matcher.deep_copy())

    def _refusal(self, reason: str) -> InvalidRequestError:
        if reason.startswith("NoExtension"):  # the library's name for it
            message = "no token of this model's vocabulary continues the answer"
        else:
            message = f"the grammar is too costly to follow: {reason}"
        return InvalidRequestError(f"{self.field}: {message}", param=self.field)
