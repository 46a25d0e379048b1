"""Who decides what is drafted and verified: what a policy is told, and what it answers. Knows no costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from autobot_llm.engine.speculative.experience import Beside
from autobot_llm.engine.speculative.measurements import AcceptanceHistory


class Decision(NamedTuple):
    """`num_free[i]`: tokens of sequence i's free draft to verify. `num_costly`: tokens that the costly method drafts
    for each sequence of `costly_for`; 0: it is not run. `is_probe`: it is, to see whether it would pay."""

    num_free: list[int]
    num_costly: int = 0
    costly_for: SequenceABC[int] = ()
    is_probe: bool = False


class DraftResult(NamedTuple):
    """What became of a sequence's draft: its tokens, how many were right, and whether the costly method made it."""

    num_tokens: int
    num_right: int
    is_costly: bool


Histories = SequenceABC[AcceptanceHistory | None]
"""How drafts like each sequence's went; None where it has none, or one that may not be used."""


@dataclass(frozen=True, slots=True)
class CostlyOffer:
    """What a costly method has to offer each sequence, how many tokens it lags behind, and the passes that drafts of
    some depth take it; as many as that, unless it says otherwise. `num_ready`: drafts for all of the sequences are
    under way already, so deep; they take what they take, whether they are wanted or not. `num_left`: tokens that the
    sequences may still get, on the average."""

    histories: SequenceABC[AcceptanceHistory | Beside | None]
    lags: list[int]
    num_passes: Callable[[int], int] = int
    num_ready: int = 0
    num_left: float = math.inf

    def has_ready(self, num_costly: int, costly_for: SequenceABC[int]) -> bool:
        """Whether such drafts are under way."""
        return 0 < num_costly <= self.num_ready and len(costly_for) == len(self.histories)


class DraftPolicy(Protocol):
    """Who decides. `room`: the draft tokens that a step has room for."""

    def wants_offer(self) -> bool:
        """Whether the costly method is to be asked in this step."""
        ...

    def decide(self, free: Histories, costly: CostlyOffer | None, room: int) -> Decision | None:
        """What to verify; None: nothing."""
        ...

    def may_pay(self, free: Histories, costly: CostlyOffer | None, room: int) -> bool:
        """Whether `decide` may find something to verify after the token that is under way. Decides nothing."""
        ...

    def goes_on(self, free: Histories, costly: CostlyOffer, room: int) -> bool:
        """Whether the drafts that are under way would be taken now: then the next step, of which nothing is known yet,
        takes them without asking again."""
        ...


class Always:
    """DraftPolicy for tests and measurements: as many tokens as there are, whatever they cost; the free draft first."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def wants_offer(self) -> bool:
        return True

    def may_pay(self, free: Histories, costly: CostlyOffer | None, room: int) -> bool:
        return True

    def decide(self, free: Histories, costly: CostlyOffer | None, room: int) -> Decision | None:
        num_free = [0 if history is None else self._num_tokens for history in free]
        if costly is None:
            return Decision(num_free)
        return Decision(num_free, self._num_tokens, [i for i, number in enumerate(num_free) if number == 0])

    def goes_on(self, free: Histories, costly: CostlyOffer, room: int) -> bool:
        decision = self.decide(free, costly, room)
        return decision is not None and costly.has_ready(decision.num_costly, decision.costly_for)
