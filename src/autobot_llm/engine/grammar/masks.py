"""Make a step's masks while the device works. Knows sequences and their matchers; knows nothing of logits.

The library lets Python run meanwhile, and so does waiting for a device: a step pays for masks only what they take
longer than its own work.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

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


class MaskMaker:
    """The masks of one step at a time. `begin` may be left out, or followed by another: `finish` makes what lacks."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._begun: Future[Masks] | None = None

    def begin(self, sequences: SequenceABC[Sequence]) -> None:
        """Start on the masks of those sequences that have a grammar."""
        self._wait()
        constrained = [sequence for sequence in sequences if sequence.matcher is not None]
        if not constrained:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="autobot-masks")
        self._begun = self._thread.submit(make_masks, constrained)

    def finish(self, sequences: SequenceABC[Sequence]) -> Masks:
        """The masks by sequence id; an error for a grammar that is too costly to follow."""
        masks = self._wait()
        lacking = [s for s in sequences if s.matcher is not None and s.id not in masks]
        return masks | make_masks(lacking) if lacking else masks

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _wait(self) -> Masks:
        begun, self._begun = self._begun, None
        return {} if begun is None else begun.result()


def make_masks(sequences: SequenceABC[Sequence]) -> Masks:
    masks: Masks = {}
    for sequence in sequences:
        assert sequence.matcher is not None
        try:
            tokens_V = sequence.matcher.mask()
        except InvalidRequestError as error:
            masks[sequence.id] = error
        else:
            masks[sequence.id] = Allowed(tokens_V, is_forced=int(tokens_V.sum()) == 1)
    return masks
