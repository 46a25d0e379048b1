"""Drafts from the text itself: what followed the last time that the latest tokens occurred. Knows token ids; knows
nothing of models.

The longest match wins (from 4 tokens down to 1), among equally long ones the most recent. The search goes up to the
very end: a match may overlap the tail, and then the draft goes on from its own beginning, as repetitions do.

Source: Saxena, "Prompt lookup decoding", 2023. The index is a dictionary from each run of 1 to n tokens to the last
place where it ended, kept as the text grows: a token costs n insertions once, and a draft n look-ups at most, however
long the text is. A run is kept as one number, its token ids side by side: the run of one more token follows from it by
a shift, at a fraction of a tuple's time.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple, Protocol

from autobot_llm.engine.sequence import UNKNOWN_TOKEN, Sequence
from autobot_llm.engine.speculative.proposer import Draft

LOOKUP_MAX = 4
MEMORY = 0.9  # of a text's success, per guess
SELDOM, OFTEN = 0.25, 0.5
PAUSE, MOST_PAUSE = 2, 8
"""Tokens for which a text whose guesses are seldom right is left alone after a wrong one, twice as many after the next,
up to so many: looking takes one or two per cent of a small model's step."""
_ID_BITS = 20  # of a token id: the largest vocabularies have a quarter of a million


class SuffixIndex:
    """Where each run of 1 to `max_length` tokens of a growing text ended last. The text's end itself is not found."""

    __slots__ = ("_ends", "_found", "_num_indexed", "_runs", "max_length")

    def __init__(self, max_length: int = LOOKUP_MAX) -> None:
        self.max_length = max_length
        self._ends: tuple[tuple[int, dict[int, int]], ...] = tuple((i, {}) for i in range(max_length))
        self._runs: list[int | None] = [None] * max_length  # those that end with the last indexed token, by length
        self._num_indexed = 0
        self._found = 0, 0

    def find(self, token_ids: list[int]) -> tuple[int, int]:
        """(length, place): the longest run at the end of the text that occurred before, and where its last earlier
        occurrence ended; (0, 0) where none did. The text must be the one before, with more tokens or the same."""
        num_tokens = len(token_ids)
        if num_tokens == self._num_indexed:
            return self._found
        if num_tokens - self._num_indexed > 1:
            self._index(token_ids, num_tokens - 1)
        runs, run = self._runs, token_ids[-1]
        token_id, length, place = run, 0, 0
        for i, ends in self._ends:
            if (found := ends.get(run)) is not None:
                length, place = i + 1, found
            ends[run] = num_tokens
            before, runs[i] = runs[i], run
            if before is None:
                break  # the text is not longer
            run = before << _ID_BITS | token_id
        self._num_indexed, self._found = num_tokens, (length, place)
        return self._found

    def read(self, token_ids: list[int], num_tokens: int) -> None:
        """Take in the first tokens of a text that has more."""
        if num_tokens > self._num_indexed:
            self._index(token_ids, num_tokens)

    def _index(self, token_ids: list[int], num_tokens: int) -> None:
        """The same for tokens of which nobody asks where they were before."""
        runs, start = self._runs, self._num_indexed
        for end, token_id in enumerate(token_ids[start:num_tokens], start + 1):
            run = token_id
            for i, ends in self._ends:
                ends[run] = end
                before, runs[i] = runs[i], run
                if before is None:
                    break
                run = before << _ID_BITS | token_id
        self._num_indexed = num_tokens


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
    """What is kept of one sequence: its index, and its last guess."""

    __slots__ = ("index", "kind", "num_guessed", "num_tokens", "pause", "place", "resume_at", "streak", "success")

    def __init__(self, max_length: int) -> None:
        self.index = SuffixIndex(max_length)
        self.success = 0.3  # of its guesses, the latest counting most
        self.streak = 0  # tokens in a row that were guessed right
        self.num_tokens = 0  # when the last draft was made
        self.num_guessed = 0  # its tokens; 0: there was none
        self.place = 0  # where it was copied from
        self.kind = ""
        self.resume_at = 0  # tokens; before that nothing is guessed
        self.pause = PAUSE  # of the next time that a guess is wrong


class NgramProposer:
    """FreeProposer over prompt and answer. A draft's kind is the length of its match, or, while guesses have been
    right one after the other, how many: somebody who copies goes on copying. And it says how often this text's last
    guesses were right, seldom, sometimes or often: what is true of texts that copy is not of those that do not.

    `observe(kind, tried, passed)` hears of each draft, verified or not, how many of its first tokens are known by now
    to have been right, and how many were looked at.
    """

    name = "ngram"

    def __init__(self, observe: Observer, max_length: int = LOOKUP_MAX) -> None:
        self._observe = observe
        self._max_length = max_length
        self._texts: dict[int, _Text] = {}

    def read(self, sequence: Sequence, num_tokens: int) -> None:
        self._text(sequence).index.read(sequence.token_ids, num_tokens)

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        text = self._text(sequence)
        token_ids = sequence.token_ids
        if token_ids[-1] == UNKNOWN_TOKEN:
            token_ids = token_ids[:-1]
        if text.num_guessed:
            self._look_back(text, token_ids)
        if len(token_ids) < text.resume_at:
            text.num_guessed = 0
            return None
        length, place = text.index.find(token_ids)
        text.num_tokens = num_known = len(token_ids)
        if not length:
            text.num_guessed = text.streak = 0
            return None
        text.num_guessed, text.place = num_tokens, place
        names = _NAMES[(text.success > SELDOM) + (text.success > OFTEN)]
        text.kind = kind = names.runs[min(text.streak, _LONGEST_RUN)] if text.streak else names.matches[length]
        if place + num_tokens <= num_known:
            return Draft(token_ids[place : place + num_tokens], kind)
        return Draft(continuation(token_ids, place, num_tokens), kind)

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence.id, None)

    def _text(self, sequence: Sequence) -> _Text:
        text = self._texts.get(sequence.id)
        if text is None:
            text = self._texts[sequence.id] = _Text(self._max_length)
        return text

    def _look_back(self, text: _Text, token_ids: list[int]) -> None:
        """Compare the last draft with what came: as far as it was right, the text is its own continuation."""
        start, place = text.num_tokens, text.place
        num_came = min(len(token_ids) - start, text.num_guessed)
        passed = 0
        while passed < num_came and token_ids[place + passed] == token_ids[start + passed]:
            passed += 1
        if passed:
            text.pause = PAUSE
            text.success = 1.0 - (1.0 - text.success) * MEMORY**passed
            text.streak += passed
        if passed < num_came:
            text.success *= MEMORY
            text.streak = 0
            if text.success <= SELDOM:
                text.resume_at = len(token_ids) + text.pause
                text.pause = min(2 * text.pause, MOST_PAUSE)
            self._observe(text.kind, passed + 1, passed)
        elif passed:
            self._observe(text.kind, passed, passed)


class _Names(NamedTuple):
    """Of kinds, by the length of the match and by the length of the run."""

    matches: tuple[str, ...]
    runs: tuple[str, ...]


_LONGEST_RUN = 16
_RUNS = ("", *("run of 1-3",) * 3, *("run of 4-7",) * 4, *("run of 8-15",) * 8, "run of 16 or more")
_NAMES = tuple(
    _Names(
        tuple(f"match of {length}, {often} right" for length in range(65)),
        tuple(f"{run}, {often} right" for run in _RUNS),
    )
    for often in ("seldom", "sometimes", "often")
)
