"""Shorten a context by what a small language model finds predictable: the likeliest words say the least.

Knows log probabilities that somebody else computes; knows no engine. Two steps, both of which keep the order:

1. Sentences are ranked by how much likelier they make the question, and by the rare words that they share with it; the
   least helpful ones leave (the idea of LongLLMLingua, Jiang et al. 2023).
2. Within what is left, the words that tell least leave, until the target is met (Selective Context, Li et al. 2023).
   Numbers, negations, and everything that is not prose stay.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autobot_llm.providers.base import ScoredToken, TextScorer
from autobot_llm.universal.compression.context import bm25_scores, sentences
from autobot_llm.universal.compression.phrases import NEGATIONS
from autobot_llm.universal.compression.result import CountTokens
from autobot_llm.universal.compression.structure import MARK, mask

SENTENCE_SLACK = 1.25  # how much more than the target may be left for words to be pruned from
MAX_SCORED_SENTENCES = 64  # asked about one by one; of more, the first choice is BM25's
_PIECE = re.compile(r"\s*\S+")


@dataclass(frozen=True, slots=True)
class _Word:
    """A word with the white space before it, and what it tells: minus its log probability; None for one that stays."""

    text: str
    information: float | None


async def prune(
    text: str, target_tokens: int, *, scorer: TextScorer, count_tokens: CountTokens, question: str = ""
) -> str:
    """`text` with about `target_tokens` tokens, and more only where what must stay has more.

    With a `question`, what helps to answer it is kept first.
    """
    if count_tokens(text) <= target_tokens:
        return text
    if question:
        text = await _helpful_sentences(text, int(target_tokens * SENTENCE_SLACK), question, scorer, count_tokens)
    tokens = await scorer.score(text)
    return await asyncio.to_thread(_without_predictable, text, tokens, target_tokens, count_tokens)


async def _helpful_sentences(text: str, max_tokens: int, question: str, scorer: TextScorer, count: CountTokens) -> str:
    pieces = sentences(text)
    shared = await asyncio.to_thread(bm25_scores, question, pieces)
    candidates = sorted(range(len(pieces)), key=lambda number: (-shared[number], number))[:MAX_SCORED_SENTENCES]
    alone = await _log_probability(question, "", scorer)
    helps = {number: await _log_probability(question, pieces[number] + "\n", scorer) - alone for number in candidates}
    best_shared, best_help = max(shared) or 1.0, max(map(abs, helps.values())) or 1.0

    def worth(number: int) -> float:
        return shared[number] / best_shared + helps.get(number, -best_help) / best_help

    kept: set[int] = set()
    left = max_tokens
    for number in sorted(range(len(pieces)), key=lambda number: (-worth(number), number)):
        if (cost := count(pieces[number])) <= left:
            kept.add(number)
            left -= cost
    if not kept:
        return text
    return "".join(pieces[number] for number in sorted(kept)).strip()


async def _log_probability(text: str, before: str, scorer: TextScorer) -> float:
    return sum(token.logprob or 0.0 for token in await scorer.score(text, before=before))


def _words(text: str, tokens: Sequence[ScoredToken]) -> list[_Word]:
    """The text's words; a word tells as much as its tokens together. What is protected is one word that stays."""
    masked = mask(text)
    words: list[_Word] = []
    told = iter(tokens)
    token = next(told, None)
    end = 0
    spans = iter(masked.spans)
    for found in _PIECE.finditer(masked.text):
        plain, *after_marks = found.group().split(MARK)
        piece = plain + "".join(next(spans) + part for part in after_marks)
        end += len(piece)
        information = 0.0
        while token is not None and token.end <= end:
            information -= token.logprob or 0.0
            token = next(told, None)
        words.append(_Word(piece, None if after_marks or _must_stay(piece, first=not words) else information))
    return words


def _must_stay(piece: str, *, first: bool) -> bool:
    word = piece.strip().strip(".,;:!?()").lower()
    if any(character.isdigit() for character in word) or word in NEGATIONS or word.endswith(("n't", "n’t")):
        return True
    # Ends of sentences and beginnings of lines hold the text together.
    return first or "\n" in piece or piece[-1] in ".!?:;" or not any(character.isalnum() for character in word)


def _without_predictable(text: str, tokens: Sequence[ScoredToken], target_tokens: int, count: CountTokens) -> str:
    """Drop the least informative words, as few as bring the text to its target: found by halving."""
    words = _words(text, tokens)
    droppable = sorted(
        (number for number, word in enumerate(words) if word.information is not None),
        key=lambda number: (words[number].information, number),
    )

    def without(num_dropped: int) -> str:
        dropped = set(droppable[:num_dropped])
        return "".join(word.text for number, word in enumerate(words) if number not in dropped).strip()

    low, high = 0, len(droppable)
    while low < high:
        middle = (low + high) // 2
        if count(without(middle)) <= target_tokens:
            high = middle
        else:
            low = middle + 1
    return without(low)
