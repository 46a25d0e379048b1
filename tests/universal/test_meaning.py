"""Two texts share an answer only where nothing between them could matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.universal.semantic.meaning import MAX_CHARACTERS, meaning_of

PAIRS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "semantic_pairs.jsonl").read_text("utf-8").splitlines()
]
DIFFERENT = [pair for pair in PAIRS if not pair["same"]]
SAME = [pair for pair in PAIRS if pair["same"]]


def test_there_are_enough_pairs_and_none_twice() -> None:
    assert len(DIFFERENT) >= 150
    assert len(SAME) >= 60
    assert len({(pair["a"], pair["b"]) for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("pair", DIFFERENT, ids=lambda pair: f"{pair['kind']}: {pair['a']}")
def test_texts_that_differ_in_meaning_never_count_as_one(pair: dict[str, Any]) -> None:
    assert meaning_of(pair["a"]) != meaning_of(pair["b"])


def test_most_paraphrases_that_change_no_word_of_weight_count_as_one() -> None:
    num_known = sum(meaning_of(pair["a"]) == meaning_of(pair["b"]) for pair in SAME)
    assert num_known >= 40  # measured: docs/results/semantic_cache.md


@pytest.mark.parametrize("text", [pair["b"] for pair in SAME if "'" not in pair["b"]])
def test_a_text_means_what_it_means_with_other_spaces_around_it(text: str) -> None:
    assert meaning_of(f"  {text.replace(' ', '  ')}\n") == meaning_of(text)


@pytest.mark.parametrize("text", ["", "  \n", "x" * (MAX_CHARACTERS + 1), "a \ue0000 b"])
def test_what_cannot_be_judged_has_no_meaning(text: str) -> None:
    assert meaning_of(text) is None


@pytest.mark.parametrize("text", ["???", ".", "hello", "Hi there!", "please", "thanks", "Can you", "'s", "what is"])
def test_little_text_is_judged_without_losing_all_of_it(text: str) -> None:
    assert meaning_of(text)


TEMPLATES = (
    "How do I delete user {}?", "Can you tell me what {} is?", "Please translate the word '{}'", "What is {}'s weight?",
    "Could you list {} please?", "Why is {} so?", "I can't find {}, thanks", "Was ist {}", "Write a poem about {}.",
)  # fmt: skip


@given(st.sampled_from(TEMPLATES), st.from_regex(r"[A-Za-z0-9_+#@/.-]{0,8}[0-9][A-Za-z0-9_+#@/-]{0,8}", fullmatch=True),
       st.from_regex(r"[A-Za-z0-9_+#@/.-]{0,8}[0-9][A-Za-z0-9_+#@/-]{0,8}", fullmatch=True))  # fmt: skip
def test_whatever_holds_a_digit_is_compared_as_it_stands(template: str, one: str, other: str) -> None:
    assert (meaning_of(template.format(one)) == meaning_of(template.format(other))) == (one == other)


@given(st.sampled_from(TEMPLATES), st.from_regex(r"[A-Z][a-z]{1,9}", fullmatch=True))
def test_a_name_is_another_word_than_the_same_letters_in_small(template: str, name: str) -> None:
    assert meaning_of(template.format(name)) != meaning_of(template.format(name.lower()))


@given(st.text(max_size=60), st.text(max_size=60))
def test_two_texts_with_other_words_than_weightless_ones_differ(one: str, other: str) -> None:
    """For texts that are not English nothing is weightless but spaces, a sentence's first capital and its end."""
    first, second = meaning_of(one), meaning_of(other)
    if first is not None and first == second:
        assert "".join(one.split()).lower().strip(".!,?。") == "".join(other.split()).lower().strip(".!,?。")


WEIGHTLESS = (
    "the", "a", "of", "is", "how", "what", "do", "i", "can", "could", "you", "please", "thanks", "tell", "me", "to",
    "big", ",", "?", "!", ".", "Anna's", "why", "when", "hello", "write", "explain", "who", "means", "works", "was",
)  # fmt: skip
OF_WEIGHT = (
    "not",
    "never",
    "dog",
    "France",
    "12",
    "thirteen",
    "km",
    "`x`",
    "'y'",
    "in",
    "from",
    "more",
    "all",
    "un-do",
)
SENTENCES = st.lists(st.sampled_from((*WEIGHTLESS, *OF_WEIGHT)), max_size=12)


@given(SENTENCES, SENTENCES, st.sampled_from(OF_WEIGHT))
def test_a_word_of_weight_is_never_lost_wherever_it_stands(before: list[str], after: list[str], word: str) -> None:
    assert meaning_of(" ".join((*before, word, *after))) != meaning_of(" ".join((*before, *after)))


@given(SENTENCES, SENTENCES, st.sampled_from(OF_WEIGHT), st.sampled_from(OF_WEIGHT))
def test_a_word_of_weight_is_never_taken_for_another(before: list[str], after: list[str], one: str, two: str) -> None:
    first, second = (meaning_of(" ".join((*before, word, *after))) for word in (one, two))
    assert (first == second) == (one == two)
