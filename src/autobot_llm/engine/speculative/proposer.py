"""What makes drafts. Knows sequences of tokens; knows nothing of who else is in the batch, of costs or of verification.

A method is a class with these few verbs. The speculator (speculator.py) asks the controller whose drafts are worth
their time, sets `Sequence.draft_ids`, and the engine verifies them whatever they are.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Protocol

from autobot_llm.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a sequence, best guess first. `kind` tells drafts of one method apart whose chances
    differ: the controller keeps their acceptance apart."""

    token_ids: list[int]
    kind: str


class FreeProposer(Protocol):
    """A method that drafts for next to nothing, so every sequence is asked at every step, and its guesses are compared
    with what came even where they were not verified."""

    name: str

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        """At most that many tokens after the last one that is known; None where it has no idea."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has left; no effect where nothing is."""
        ...


class CostlyProposer(Protocol):
    """A method that has a model to run."""

    name: str

    def lag(self, sequence: Sequence) -> int:
        """How many tokens it has to catch up with before it can draft for a sequence: at least 1."""
        ...

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[list[int]]:
        """A draft for each, of at most that many tokens; empty where it has no room for a sequence now."""
        ...

    def forget(self, sequence: Sequence) -> None: ...

    def close(self) -> None: ...
