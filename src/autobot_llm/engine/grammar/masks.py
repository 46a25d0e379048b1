"""The masks of one step. Knows sequences and their matchers; knows nothing of logits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np

from autobot_llm.engine.grammar.matcher import UInt8Array
from autobot_llm.engine.sequence import Sequence
from autobot_llm.errors import InvalidRequestError


# V vocabulary
@dataclass(frozen=True, slots=True)
class Allowed:
    """The tokens that may follow: `tokens_V` is 1 for each, `is_forced` where there is but one."""

    tokens_V: UInt8Array
    is_forced: bool


Masks = dict[int, Allowed | InvalidRequestError]
"""By sequence id; an error for a grammar that cannot be followed further."""


def make_masks(sequences: SequenceABC[Sequence]) -> Masks:
    """The masks of those sequences that have a grammar."""
    masks: Masks = {}
    for sequence in sequences:
        if sequence.matcher is None:
            continue
        try:
            tokens_V = sequence.matcher.mask()
        except InvalidRequestError as error:
            masks[sequence.id] = error
        else:
            masks[sequence.id] = Allowed(tokens_V, is_forced=np.count_nonzero(tokens_V) == 1)
    return masks
