"""`PromptCompressor`: results with tokens before and after, the ratio as a target, the same bytes every time."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import appear_in_order, document, negations, numbers

from autobot_llm import ConfigurationError
from autobot_llm.providers.base import ScoredToken
from autobot_llm.universal.compression import COMPRESSED_SYSTEM_PROMPTS, PromptCompressor
from autobot_llm.universal.compression.rules import shorten
from autobot_llm.universal.compression.structure import mask

PROMPTS = {
    prompt["name"]: prompt["text"]
    for prompt in map(
        json.loads, (Path(__file__).parents[2] / "data" / "system_prompts.jsonl").read_text().splitlines()
    )
}
PROSE = ("rag", "support", "documentation", "tutor", "safety_negations")
STORY = (
    "The fox lived in the forest and the fox was happy there. On Monday 12 May she found a purple umbrella. "
    "The fox did not like the rain at all. The owl, who was very old, told her to go to the river."
)


def num_words(text: str) -> int:
    return len(text.split())


class WordScorer:
    """Finds a word likely when it has been there before; `asked` holds what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def score(self, text: str, *, before: str = "", model: str | None = None) -> tuple[ScoredToken, ...]:
        self.asked.append((text, before))
        seen = set(before.lower().split())
        tokens = []
        end = 0
        for word in text.split():
            start = text.index(word, end)
            tokens.append(ScoredToken(end, start + len(word), -0.1 if word.lower() in seen else -5.0))
            end = start + len(word)
            seen.add(word.lower())
        return tuple(tokens)

    async def text_counter(self, model: str | None = None):  # type: ignore[no-untyped-def]
        return num_words


def test_a_result_says_tokens_before_and_after_and_that_they_are_estimates() -> None:
    text = "Please note that in order to answer, you read."
    result = PromptCompressor().compress_system_prompt(text)
    assert result.original_tokens == len(text) // 4
    assert result.compressed_tokens == len(result.compressed_text) // 4
    assert result.compression_ratio == result.compressed_tokens / result.original_tokens
    assert result.tokens_saved == result.original_tokens - result.compressed_tokens > 0
    assert result.is_estimate


def test_a_given_tokenizer_counts() -> None:
    result = PromptCompressor(count_tokens=num_words).compress_system_prompt("Please note that it rains.")
    assert (result.original_tokens, result.compressed_tokens, result.compressed_text) == (5, 2, "It rains.")
    assert result.compression_ratio == 2 / 5
    assert not result.is_estimate


@pytest.mark.parametrize("text", ["", "   ", "Hi"])
def test_a_text_with_nothing_to_remove_has_ratio_one(text: str) -> None:
    assert PromptCompressor(count_tokens=num_words).compress_system_prompt(text).compression_ratio == 1.0


def test_prose_prompts_lose_a_quarter_of_their_tokens() -> None:
    results = [PromptCompressor().compress_system_prompt(PROMPTS[name]) for name in PROSE]
    before = sum(result.original_tokens for result in results)
    after = sum(result.compressed_tokens for result in results)
    assert after <= 0.75 * before


def test_articles_go_only_where_the_ratio_is_not_met_without() -> None:
    text = PROMPTS["tutor"]
    assert PromptCompressor(ratio=0.9).compress_system_prompt(text).compressed_text == shorten(text)
    assert PromptCompressor(ratio=0.5).compress_system_prompt(text).compressed_text == shorten(text, "telegraphic")


def test_the_same_prompt_becomes_the_same_bytes_in_every_process() -> None:
    code = (
        "import sys; from autobot_llm.universal.compression import PromptCompressor;"
        "sys.stdout.write(PromptCompressor().compress_system_prompt(sys.stdin.read()).compressed_text)"
    )
    text = "\n\n".join(PROMPTS.values())
    here = PromptCompressor().compress_system_prompt(text).compressed_text
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code],
            input=text, capture_output=True, encoding="utf-8", check=True, env={"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout == here


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match="ratio"):
        PromptCompressor(ratio=ratio)


def test_ready_prompts_have_at_most_fifteen_words() -> None:
    assert set(COMPRESSED_SYSTEM_PROMPTS) == {"default", "code_review", "documentation", "automation"}
    assert all(0 < num_words(prompt) <= 15 for prompt in COMPRESSED_SYSTEM_PROMPTS.values())


@pytest.mark.parametrize("ratio", [0.6, 0.8])
async def test_pruning_meets_its_ratio_and_keeps_numbers_and_negations(ratio: float) -> None:
    compressor = PromptCompressor(ratio=ratio, count_tokens=num_words)
    result = await compressor.compress_by_perplexity(STORY, WordScorer())
    assert ratio - 0.05 <= result.compression_ratio <= ratio
    assert "12" in result.compressed_text and "not" in result.compressed_text
    kept = iter(STORY.split())
    assert all(word in kept for word in result.compressed_text.split())  # what is left is in its order


async def test_what_a_model_can_predict_goes_first() -> None:
    result = await PromptCompressor(ratio=0.85, count_tokens=num_words).compress_by_perplexity(STORY, WordScorer())
    assert result.compressed_text.count("the ") < STORY.count("the ")
    assert "purple" in result.compressed_text


async def test_a_question_decides_which_sentences_stay() -> None:
    scorer = WordScorer()
    compressor = PromptCompressor(ratio=0.35, count_tokens=num_words)
    result = await compressor.compress_by_perplexity(STORY, scorer, question="What colour was the umbrella she found?")
    assert "purple" in result.compressed_text
    assert "owl" not in result.compressed_text
    assert ("What colour was the umbrella she found?", "") in scorer.asked


async def test_code_and_quotations_are_never_pruned() -> None:
    text = f'{STORY}\n\n```\nthe the the the\n```\n\nShe said "the the the" and "the  end", and went home.'
    result = await PromptCompressor(ratio=0.6, count_tokens=num_words).compress_by_perplexity(text, WordScorer())
    assert "```\nthe the the the\n```" in result.compressed_text
    assert '"the the the"' in result.compressed_text and '"the  end"' in result.compressed_text


async def test_a_text_that_is_all_data_stays_whatever_the_ratio() -> None:
    text = "```\nthe the\n```"
    result = await PromptCompressor(ratio=0.1, count_tokens=num_words).compress_by_perplexity(text, WordScorer())
    assert result.compressed_text == text


@settings(max_examples=60, deadline=None)
@given(document, st.floats(0.05, 1.0))
def test_pruning_any_document_keeps_what_is_not_prose_numbers_and_negations(
    parts: list[tuple[str, str]], ratio: float
) -> None:
    text = "".join(piece + ending for piece, ending in parts)
    compressor = PromptCompressor(ratio=ratio, count_tokens=num_words)
    result = asyncio.run(compressor.compress_by_perplexity(text, WordScorer()))
    assert appear_in_order([span.strip() for span in mask(text).spans], result.compressed_text)
    assert numbers(result.compressed_text) == numbers(text)
    assert negations(result.compressed_text) == negations(text)
    assert result.compressed_tokens <= result.original_tokens
