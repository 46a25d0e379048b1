"""`PromptCompressor`: every way to shorten a prompt, with tokens counted before and after. Knows strategies by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.base import TextScorer
from autobot_llm.universal.compression.context import Embed, best_sentences, select_relevant_context
from autobot_llm.universal.compression.perplexity import prune
from autobot_llm.universal.compression.result import CompressionResult, CountTokens, estimated_tokens, measured
from autobot_llm.universal.compression.rules import Depth, shorten
from autobot_llm.universal.compression.structure import SEPARATOR, paragraphs

DEFAULT_RATIO = 0.7
KEPT_PROMPTS = 256  # a system prompt comes with every request
LONGEST_KEPT = 50_000  # characters


class PromptCompressor:
    """Shortens prompts to about `ratio` of their tokens (0.7: 30 % fewer).

    `count_tokens` is the tokenizer of the model that will read them; without it a token is taken for four characters,
    and results say so. `embed` makes the vectors by which passages are compared, in place of their words. Raises
    ConfigurationError for a ratio outside of (0, 1].
    """

    def __init__(
        self,
        *,
        ratio: float = DEFAULT_RATIO,
        count_tokens: CountTokens | None = None,
        embed: Embed | None = None,
    ) -> None:
        if not 0 < ratio <= 1:
            raise ConfigurationError(f"ratio={ratio}: expected a number above 0 and at most 1")
        self.ratio = ratio
        self._count_tokens = count_tokens
        self._embed = embed

    def compress_system_prompt(self, text: str) -> CompressionResult:
        """Shorten an instruction by rules: the same text becomes the same bytes, always.

        Wordiness goes first; articles and the like only where the target is not met without. Code, data, tables,
        quotations, addresses, numbers and negations stay, so that a prompt with little to remove stays nearly as it
        is, whatever the ratio.
        """
        plain = measured(text, _shortened(text, "wordiness"), self._count_tokens)
        if plain.compression_ratio <= self.ratio:
            return plain
        return measured(text, _shortened(text, "telegraphic"), self._count_tokens)

    def select_relevant_context(
        self, query: str, contexts: Sequence[str], max_contexts: int = 3, *, max_tokens: int | None = None
    ) -> list[str]:
        """The passages that bear most on `query`, in their original order; see `context.select_relevant_context`."""
        return select_relevant_context(
            query, contexts, max_contexts, max_tokens=max_tokens, count_tokens=self._count_tokens, embed=self._embed
        )

    def compress_context(self, query: str, text: str) -> CompressionResult:
        """Keep of `text`, passages with empty lines between them, what bears most on `query`, within the ratio.

        Sentences are kept or dropped whole, and what is kept stays in its order. A text of which not one sentence fits
        stays whole.
        """
        count = self._count_tokens or estimated_tokens
        target = int(count(text) * self.ratio)
        passages = paragraphs(text)
        if len(passages) > 1:
            chosen = self.select_relevant_context(query, passages, len(passages), max_tokens=target)
            shorter = SEPARATOR.join(chosen)
        else:
            shorter = best_sentences(query, text, target, count)
        return measured(text, shorter or text, self._count_tokens)

    async def compress_by_perplexity(self, text: str, scorer: TextScorer, *, question: str = "") -> CompressionResult:
        """Drop the sentences that help `question` least, and the words that `scorer`'s model finds most predictable.

        The target is met within one word, unless what has to stay (numbers, negations, data) is more than that.
        """
        count = self._count_tokens or estimated_tokens
        target = int(count(text) * self.ratio)
        shorter = await prune(text, target, scorer=scorer, count_tokens=count, question=question)
        return measured(text, shorter, self._count_tokens)


def _shortened(text: str, depth: Depth) -> str:
    return _kept(text, depth) if len(text) <= LONGEST_KEPT else shorten(text, depth)


_kept = lru_cache(maxsize=KEPT_PROMPTS)(shorten)
