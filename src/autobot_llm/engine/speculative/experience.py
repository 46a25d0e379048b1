"""How drafts have gone, by what is known of a draft: its kind, its text, and what lookup had at its place. Knows no
costs, and makes no choice.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

from autobot_llm.engine.speculative.measurements import MADE_TO_GUESS, AcceptanceHistory


class Beside:
    """What a costly method's drafts are worth for one text at places of one kind: the better of what they are there in
    any text and what they are in this text anywhere. Where a copy was found, a model guesses better, too. Of an
    AcceptanceHistory it has what choices need.
    """

    def __init__(self, of_text: AcceptanceHistory, of_place: AcceptanceHistory) -> None:
        rates = map(max, of_text.rates(), of_place.rates())
        self._expected = list(accumulate(accumulate(rates, mul), initial=1.0))

    def expected(self) -> list[float]:
        return self._expected


class Experience:
    """Of methods whose drafts have `max_length` tokens at most. The method named `free` offers drafts of many kinds for
    nothing; another's are taken for those of a model that was made to guess, until they are known.
    """

    def __init__(self, max_length: int, free: str | None) -> None:
        self._max_length = max_length
        self._free = free
        self._of_kinds: dict[tuple[str, str], AcceptanceHistory] = {}  # by method and kind
        self._of_texts: dict[int, AcceptanceHistory] = {}  # of a costly method's drafts, by sequence id
        self._of_places: dict[
            tuple[str, str], AcceptanceHistory
        ] = {}  # by their kind, and that of the free draft there
        self._places: dict[int, str] = {}  # where the sequences are: the kind of their free drafts

    @property
    def num_texts(self) -> int:
        return len(self._of_texts)

    def look(self, places: dict[int, str]) -> None:
        """Take in where the sequences are now: the kinds of the free drafts that there are, by sequence id."""
        self._places = places

    def of_kind(self, method: str, kind: str) -> AcceptanceHistory:
        history = self._of_kinds.get((method, kind))
        if history is None:
            presumed = 0.0 if method == self._free else MADE_TO_GUESS
            history = self._of_kinds[method, kind] = AcceptanceHistory(self._max_length, presumed=presumed)
        return history

    def here(self, method: str, kind: str, sequence_id: int) -> AcceptanceHistory | Beside:
        """Of a costly method's drafts for this sequence now: some texts, and some places, are easier than others."""
        of_text = self._of_text(method, kind, sequence_id)
        of_place = self._of_place(method, kind, sequence_id)
        return of_text if of_place is None else Beside(of_text, of_place)

    def record(self, method: str, kind: str, sequence_id: int, tried: int, passed: int) -> None:
        """Learn from a costly method's draft for a sequence, which may have left."""
        self.of_kind(method, kind).record(tried, passed)
        if (of_place := self._of_place(method, kind, sequence_id)) is not None:
            of_place.record(tried, passed)
        if (of_text := self._of_texts.get(sequence_id)) is not None:
            of_text.record(tried, passed)

    def forget(self, sequence_id: int) -> None:
        self._of_texts.pop(sequence_id, None)

    def _of_text(self, method: str, kind: str, sequence_id: int) -> AcceptanceHistory:
        history = self._of_texts.get(sequence_id)
        if history is None:
            prior = self.of_kind(method, kind)
            history = self._of_texts[sequence_id] = AcceptanceHistory(self._max_length, prior)
        return history

    def _of_place(self, method: str, kind: str, sequence_id: int) -> AcceptanceHistory | None:
        """None where there is no free draft."""
        place = self._places.get(sequence_id)
        if place is None:
            return None
        history = self._of_places.get((kind, place))
        if history is None:
            prior = self.of_kind(method, kind)
            history = self._of_places[kind, place] = AcceptanceHistory(self._max_length, prior)
        return history
