"""Prompt lookup finds what a search of the whole text finds, and hears how its guesses went."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.ngram import MOST_PAUSE, NgramProposer, SuffixIndex, continuation

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def naive(token_ids: list[int], max_length: int) -> tuple[int, int]:
    """The longest run at the end that occurred before, and the end of its last earlier occurrence: by looking."""
    for length in range(max_length, 0, -1):
        if length >= len(token_ids):
            continue
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                return length, end
    return 0, 0


@given(
    token_ids=TEXTS,
    max_length=st.integers(1, 5),
    cuts=st.sets(st.integers(1, 60)),
    reads=st.lists(st.integers(0, 60), max_size=10),
)
def test_the_index_finds_what_a_search_of_the_text_finds(
    token_ids: list[int], max_length: int, cuts: set[int], reads: list[int]
) -> None:
    """Whatever the pieces are in which the text grows, and in which it was taken in before."""
    index = SuffixIndex(max_length)
    for i, end in enumerate(sorted({*(cut for cut in cuts if cut <= len(token_ids)), len(token_ids)})):
        for num_read in reads[i::10]:
            index.read(token_ids[:end], min(num_read, end - 1))
        assert index.find(token_ids[:end]) == naive(token_ids[:end], max_length)


@given(token_ids=TEXTS, data=st.data(), num_tokens=st.integers(1, 20))
def test_a_draft_goes_on_from_its_own_beginning_where_the_text_ends(
    token_ids: list[int], data: Any, num_tokens: int
) -> None:
    place = data.draw(st.integers(0, len(token_ids) - 1))
    grown = list(token_ids)
    for i in range(num_tokens):
        grown.append(grown[place + i])
    assert continuation(token_ids, place, num_tokens) == grown[len(token_ids) :]


def test_the_most_recent_match_wins_and_the_longest_before_it() -> None:
    index = SuffixIndex(4)
    assert index.find([1, 2, 9, 5, 2, 7, 1, 2]) == (2, 2)
    assert index.find([1, 2, 9, 5, 2, 7, 1, 2, 5, 2]) == (2, 5)
    assert SuffixIndex(1).find([1, 2, 9, 5, 2, 7, 1, 2]) == (1, 5)


def test_guesses_are_compared_with_what_came_although_nobody_verified_them() -> None:
    heard: list[tuple[str, int, int]] = []
    proposer = NgramProposer(lambda kind, tried, passed: heard.append((kind, tried, passed)))
    sequence = Sequence(0, [1, 2, 3, 4, 5, 1, 2], SamplingParams(max_tokens=50))
    first = proposer.propose(sequence, 4)
    assert first is not None and (first.token_ids, first.kind) == ([3, 4, 5, 1], "match of 2, sometimes right")
    sequence.token_ids.append(3)
    second = proposer.propose(sequence, 4)
    assert second is not None and (second.token_ids, second.kind) == ([4, 5, 1, 2], "run of 1-3, sometimes right")
    sequence.token_ids += [4, 5, 6]
    assert proposer.propose(sequence, 4) is None, "6 has never occurred"
    sequence.token_ids.append(1)
    third = proposer.propose(sequence, 2)
    assert third is not None and (third.token_ids, third.kind) == ([2, 3], "match of 1, sometimes right"), (
        "a miss ends the run"
    )
    assert heard == [("match of 2, sometimes right", 1, 1), ("run of 1-3, sometimes right", 3, 2)]
    proposer.forget(sequence)
    proposer.forget(sequence)


def test_a_text_whose_guesses_are_seldom_right_is_looked_at_now_and_then_until_they_are() -> None:
    proposer = NgramProposer(lambda kind, tried, passed: None)
    sequence = Sequence(0, [1, 2, 1, 3, 1], SamplingParams(max_tokens=500))
    asked = 0
    for token_id in range(5, 65):
        asked += proposer.propose(sequence, 4) is not None
        sequence.token_ids += [token_id, 1]
    assert 8 < asked < 25, "1 has always occurred, and what follows it is always new"
    kinds = []
    for token_id in sequence.token_ids[20:60]:
        draft = proposer.propose(sequence, 4)
        kinds.append(None if draft is None else draft.kind)
        sequence.token_ids.append(token_id)
    assert all(kind is not None for kind in kinds[MOST_PAUSE + 4 :]), "what is right is looked at every time"
    assert kinds[-1] == "run of 16 or more, often right"
