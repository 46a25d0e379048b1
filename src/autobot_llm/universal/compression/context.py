"""Choose the passages that bear on a question. Knows words, or vectors that somebody else makes; knows no model.

BM25: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from autobot_llm.universal.compression.phrases import words as word_list
from autobot_llm.universal.compression.result import CountTokens, estimated_tokens
from autobot_llm.universal.compression.structure import SEPARATOR

Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""One vector for each text, in their order."""

SATURATION = 1.2  # k1: how soon more of the same word stops counting
LENGTH_WEIGHT = 0.75  # b: how much a long passage's words count for less
MIN_STEM = 4

_SENTENCE = re.compile(r".+?(?:[.!?]+[\"'”’)]*(?=\s)\s*|[。！？]+\s*|\n\s*|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# Words of nearly every English question; a question made of nothing else is matched by them all the same.
_COMMON = word_list(
    "a an and are as at be by can did do does for from had has have how i in is it its me my of on or our that the "
    "their there these they this to was were what when where which who whom whose why will with you your"
)


def select_relevant_context(
    query: str,
    contexts: Sequence[str],
    max_contexts: int = 3,
    *,
    max_tokens: int | None = None,
    count_tokens: CountTokens | None = None,
    embed: Embed | None = None,
) -> list[str]:
    """The passages most relevant to `query`, at most `max_contexts` of them, in the order they came in.

    Relevance is BM25, or the cosine of `embed`'s vectors where that is given. With `max_tokens`, a passage that does
    not fit any more gives its best sentences, so that the budget is used and never exceeded; tokens are
    `count_tokens`', else four characters each. Raises ValueError for a negative number.
    """
    if max_contexts < 0 or (max_tokens is not None and max_tokens < 0):
        raise ValueError(f"max_contexts={max_contexts}, max_tokens={max_tokens}: expected 0 or more")
    scores = cosine_scores(query, contexts, embed) if embed is not None else bm25_scores(query, contexts)
    best = sorted(range(len(contexts)), key=lambda number: (-scores[number], number))[:max_contexts]
    if max_tokens is None:
        return [contexts[number] for number in sorted(best)]
    chosen = _within(query, contexts, best, max_tokens, count_tokens or estimated_tokens)
    return [chosen[number] for number in sorted(chosen)]


def bm25_scores(query: str, texts: Sequence[str]) -> list[float]:
    """How much each text speaks of the query's words; a rare word counts for more than one that is in every text."""
    documents = [Counter(words(text)) for text in texts]
    asked = [word for word in words(query) if word not in _COMMON] or words(query)
    lengths = [document.total() for document in documents]
    mean_length = sum(lengths) / max(1, len(lengths)) or 1.0
    frequencies = {word: sum(word in document for document in documents) for word in set(asked)}
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        norm = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * length / mean_length)
        score = 0.0
        for word in asked:
            if (count := document[word]) > 0:
                rarity = math.log(1 + (len(texts) - frequencies[word] + 0.5) / (frequencies[word] + 0.5))
                score += rarity * count * (SATURATION + 1) / (count + norm)
        scores.append(score)
    return scores


def cosine_scores(query: str, texts: Sequence[str], embed: Embed) -> list[float]:
    """Cosine of each text's vector with the query's; 0 for a vector of no length."""
    asked, *vectors = embed([query, *texts])
    return [_cosine(asked, vector) for vector in vectors]


def words(text: str) -> list[str]:
    """The words of a text as they are compared: lower case, without plural endings; each character of Chinese."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        found += list(word) if _UNSPACED.search(word) else [_stem(word)]
    return found


def sentences(text: str) -> list[str]:
    """`text` in pieces that end where a sentence or a line does; joined, they are `text` again."""
    return _SENTENCE.findall(text)


def _within(
    query: str, contexts: Sequence[str], ranked: Sequence[int], max_tokens: int, count: CountTokens
) -> dict[int, str]:
    chosen: dict[int, str] = {}
    left = max_tokens
    for number in ranked:
        whole = contexts[number]
        cost = count(whole + SEPARATOR)
        if cost <= left:
            chosen[number], left = whole, left - cost
            continue
        if part := best_sentences(query, whole, left, count):
            chosen[number], left = part, left - count(part + SEPARATOR)
    return chosen


def best_sentences(query: str, text: str, max_tokens: int, count: CountTokens) -> str:
    """The sentences of `text` that bear most on `query`, in their order, within `max_tokens`; "" where none fits."""
    pieces = sentences(text)
    scores = bm25_scores(query, pieces)
    kept: set[int] = set()
    best = ""
    for number in sorted(range(len(pieces)), key=lambda number: (-scores[number], number)):
        attempt = "".join(pieces[i] for i in sorted(kept | {number})).strip()
        if count(attempt + SEPARATOR) <= max_tokens:
            kept.add(number)
            best = attempt
    return best


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    length = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def _stem(word: str) -> str:
    """Plurals and the like, no more: "orders" finds "order", and "news" stays."""
    for ending, instead in (("sses", "ss"), ("ies", "y"), ("s", "")):
        if word.endswith(ending) and len(word) - len(ending) >= MIN_STEM - 1 and not word.endswith(("ss", "us", "is")):
            return word[: len(word) - len(ending)] + instead
    return word
