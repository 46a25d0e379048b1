"""A model's vocabulary as the grammar library reads it: each token's bytes. Knows tokens; knows nothing of grammars."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

from autobot_llm.engine.detokenizer import token_bytes
from autobot_llm.engine.tokenizer import Tokenizer

_NO_TOKEN = b"\xff<end>"


# V vocabulary
class Vocabulary:
    """`vocab_size` tokens, of which `end_ids` end an answer: they are allowed exactly where a grammar is satisfied.

    A token's bytes are what it adds to the text of an answer (detokenizer.token_bytes), so a grammar speaks of the text
    that the client reads. Special tokens stand for no text: only grammars that name them by number allow them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        special_ids = sorted(tokenizer.special_ids | end_ids)
        tokens = [token_bytes(tokenizer, token_id) for token_id in range(vocab_size)]
        # The library wants an end token, and not every model has one: the last entry stands for it and is never given.
        source = _Source([*tokens, _NO_TOKEN], [*special_ids, vocab_size], end_id=vocab_size, tokenizer=tokenizer)
        self.library_tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(source),
            n_vocab=vocab_size + 1,
            eos_token=[vocab_size, *sorted(end_ids)],
            slices=llguidance.LLTokenizer.json_slices(),
        )
        source.library_tokenizer = self.library_tokenizer


class _Source:
    """What the library asks of a tokenizer: its tokens, and how it would write a text that is forced."""

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], *, end_id: int, tokenizer: Tokenizer) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = end_id
        self.bos_token_id: int | None = None
        self.library_tokenizer: llguidance.LLTokenizer | None = None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> Sequence[int]:
        """Forced text in the model's own tokens where they spell exactly that, else in the longest ones that fit."""
        if self.library_tokenizer is None:  # the wrapper tries the call out before there is anything to encode for
            return []
        token_ids = self._tokenizer.encode(text.decode(), add_special_tokens=False)
        if b"".join(self.tokens[token_id] for token_id in token_ids) == text:
            return token_ids
        return self.library_tokenizer.greedy_tokenize(text.decode())
