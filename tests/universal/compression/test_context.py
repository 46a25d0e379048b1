"""The passages that bear on a question are chosen, in their order, within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobot_llm.universal.compression import CompressionResult, PromptCompressor, select_relevant_context
from autobot_llm.universal.compression.context import bm25_scores, sentences

SHOP = [
    "Refunds take 5-7 working days once the parcel has arrived.",
    "The shop was founded in 1998 in a garage.",
    "Electronics can be returned within 14 days, all else within 30 days.",
    "Our office dog is called Biscuit and sleeps a lot.",
    "A refund is paid to the card that was used for the order.",
]


def num_words(text: str) -> int:
    return len(text.split())


def test_the_most_relevant_passages_come_in_their_original_order() -> None:
    chosen = select_relevant_context("How long does a refund take?", SHOP, max_contexts=2)
    assert chosen == [SHOP[0], SHOP[4]]


def test_three_passages_are_chosen_unless_told_otherwise() -> None:
    assert len(select_relevant_context("refund", SHOP)) == 3
    assert select_relevant_context("refund", SHOP[:2]) == SHOP[:2]
    assert select_relevant_context("refund", []) == []
    assert select_relevant_context("refund", SHOP, max_contexts=0) == []


def test_a_rare_word_tells_more_than_one_that_is_everywhere() -> None:
    texts = ["the order number", "the order of the dog", "the order date"]
    scores = bm25_scores("order dog", texts)
    assert scores[1] > scores[0] == scores[2]


def test_a_question_of_common_words_alone_still_ranks() -> None:
    assert select_relevant_context("Who are you?", ["A stone.", "Who are you and who am I?"], 1) == [
        "Who are you and who am I?"
    ]


def test_chinese_is_matched_by_its_characters() -> None:
    texts = ["天气很好", "退款需要五天", "我们有一只狗"]
    assert select_relevant_context("退款要多久？", texts, 1) == [texts[1]]


def test_embeddings_replace_words_where_they_are_given() -> None:
    asked: list[Sequence[str]] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(texts)
        return [[1.0, 0.0] if "dog" in text or "pet" in text else [0.0, 1.0] for text in texts]

    assert select_relevant_context("Which pet?", SHOP, 1, embed=embed) == [SHOP[3]]
    assert asked == [["Which pet?", *SHOP]]


def test_an_embedding_of_no_length_is_relevant_to_nothing() -> None:
    assert select_relevant_context("q", ["a", "b"], 1, embed=lambda texts: [[0.0]] * len(texts)) == ["a"]


def test_a_budget_is_never_exceeded_and_is_filled_with_sentences() -> None:
    long = " ".join(SHOP)
    chosen = select_relevant_context(
        "How long does a refund take?", [long, SHOP[1]], max_tokens=12, count_tokens=num_words
    )
    assert chosen == [SHOP[0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*SHOP, " ".join(SHOP)]), max_size=8), st.integers(0, 60), st.integers(0, 5))
def test_for_any_passages_the_budget_and_the_order_hold(texts: list[str], max_tokens: int, max_contexts: int) -> None:
    chosen = select_relevant_context("refund days", texts, max_contexts, max_tokens=max_tokens, count_tokens=num_words)
    assert len(chosen) <= max_contexts
    assert sum(map(num_words, chosen)) <= max_tokens
    position = 0
    for text in chosen:
        pieces = set(map(str.strip, sentences(text)))
        while not pieces <= set(map(str.strip, sentences(texts[position]))):
            position += 1


@pytest.mark.parametrize("wrong", [{"max_contexts": -1}, {"max_tokens": -1}])
def test_a_negative_bound_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 or more"):
        select_relevant_context("q", ["a"], **wrong)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='ab .!?\n"。', max_size=40))
def test_sentences_put_together_are_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text


def many_passages() -> str:
    topics = ["refund", "parcel", "garden", "engine", "music", "bread", "river", "window"]
    return "\n\n".join(
        " ".join(f"The {topic} number {i} was looked at by person {j} on day {i + j}." for j in range(6))
        for i, topic in enumerate(topics * 3)
    )


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_context_is_compressed_to_its_ratio_within_five_percent(ratio: float) -> None:
    compressor = PromptCompressor(ratio=ratio, count_tokens=num_words)
    result = compressor.compress_context("What became of the refund?", many_passages())
    assert isinstance(result, CompressionResult)
    assert ratio - 0.05 <= result.compression_ratio <= ratio
    assert result.compressed_text.count("refund") == many_passages().count("refund")
    assert not result.is_estimate


@pytest.mark.parametrize(
    "text", ["One long sentence that has no end and no parts", "A long first passage.\n\nA long second one."]
)
def test_a_text_of_which_nothing_fits_stays_whole(text: str) -> None:
    result = PromptCompressor(ratio=0.1, count_tokens=num_words).compress_context("What?", text)
    assert (result.compressed_text, result.compression_ratio) == (text, 1.0)
