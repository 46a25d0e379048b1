"""Drafts from the text itself: what followed the last time that the latest tokens occurred. Knows token ids; knows
nothing of models.

The longest match wins (from 4 tokens down to 1), among equally long ones the most recent. The search goes up to the
very end: a match may overlap the tail, and then the draft goes on from its own beginning, as repetitions do.

Source: Saxena, "Prompt lookup decoding", 2023. The index is a dictionary from each run of 1 to n tokens to the last
place where it ended, kept as the text grows: a token costs n insertions once, and a draft n look-ups at most, however
long the text is.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Protocol

from autobot_llm.engine.sequence import UNKNOWN_TOKEN, Sequence
from autobot_llm.engine.speculative.proposer import Draft

LOOKUP_MAX = 4


class SuffixIndex:
    """Where each run of 1 to `max_length` tokens of a growing text ended last. The text's end itself is not in it."""

    __slots__ = ("_ends", "_num_indexed", "max_length")

    def __init__(self, max_length: int = LOOKUP_MAX) -> None:
        self.max_length = max_length
        self._ends: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in range(max_length))
        self._num_indexed = 0  # runs that end before this place are in the index

    def find(self, token_ids: list[int]) -> tuple[int, int]:
        """(length, place): the longest run at the end of the text that occurred before, and where its last earlier
        occurrence ended; (0, 0) where none did. The text must be the one before, with more tokens or the same."""
        num_tokens = len(token_ids)
        self._extend(token_ids, num_tokens)
        for length in range(min(self.max_length, num_tokens - 1), 0, -1):
            place = self._ends[length - 1].get(tuple(token_ids[num_tokens - length :]))
            if place is not None:
                return length, place
        return 0, 0

    def _extend(self, token_ids: list[int], num_tokens: int) -> None:
        """Index the runs that end before the last token."""
        for end in range(self._num_indexed + 1, num_tokens):
            for length in range(1, min(self.max_length, end) + 1):
                self._ends[length - 1][tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, num_tokens - 1)


def continuation(token_ids: SequenceABC[int], place: int, num_tokens: int) -> list[int]:
    """The tokens from `place` on; past the end of the text it goes on with what it has drafted."""
    draft = list(token_ids[place : place + num_tokens])
    period = len(token_ids) - place
    while len(draft) < num_tokens:
        draft.append(draft[len(draft) - period])
    return draft


class Observer(Protocol):
    """What hears how guesses went."""

    def __call__(self, kind: str, tried: int, passed: int) -> None: ...


class _Text:
    """What is kept of one sequence: its index, and how the last guesses went."""

    __slots__ = ("draft_ids", "index", "kind", "num_tokens", "streak")

    def __init__(self, max_length: int) -> None:
        self.index = SuffixIndex(max_length)
        self.streak = 0  # tokens in a row that were guessed right
        self.num_tokens = 0  # when the last draft was made
        self.draft_ids: list[int] = []
        self.kind = ""


class NgramProposer:
    """FreeProposer over prompt and answer. A draft's kind is the length of its match, or, while guesses have been
    right one after the other, how many: somebody who copies goes on copying.

    `observe(kind, tried, passed)` hears of each draft, verified or not, how many of its first tokens are known by now
    to have been right, and how many were looked at.
    """

    name = "ngram"

    def __init__(self, observe: Observer, max_length: int = LOOKUP_MAX) -> None:
        self._observe = observe
        self._max_length = max_length
        self._texts: dict[int, _Text] = {}

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        text = self._texts.get(sequence.id)
        if text is None:
            text = self._texts[sequence.id] = _Text(self._max_length)
        token_ids = sequence.token_ids
        if token_ids[-1] == UNKNOWN_TOKEN:
            token_ids = token_ids[:-1]
        if text.draft_ids:
            self._look_back(text, token_ids)
        else:
            text.streak = 0
        length, place = text.index.find(token_ids)
        text.num_tokens = len(token_ids)
        if not length:
            text.draft_ids = []
            return None
        text.draft_ids = draft_ids = continuation(token_ids, place, num_tokens)
        text.kind = kind = _KINDS[min(text.streak, len(_KINDS) - 1)] or _LENGTHS[length]
        return Draft(draft_ids, kind)

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence.id, None)

    def _look_back(self, text: _Text, token_ids: list[int]) -> None:
        """Compare the last draft with what came."""
        came = token_ids[text.num_tokens : text.num_tokens + len(text.draft_ids)]
        if not came:
            return
        passed = 0
        for guess, token_id in zip(text.draft_ids, came, strict=False):
            if guess != token_id:
                break
            passed += 1
        is_right = passed == len(came)
        self._observe(text.kind, passed if is_right else passed + 1, passed)
        text.streak = text.streak + passed if is_right else 0


_LENGTHS = tuple(f"match of {length}" for length in range(65))
_KINDS = ("", *("run of 1-3",) * 3, *("run of 4-7",) * 4, *("run of 8-15",) * 8, "run of 16 or more")
