"""Text into sequences that a quantizer reads. Knows texts and a tokenizer; knows nothing of models."""

from __future__ import annotations

import torch

from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError

CHARACTERS_PER_TOKEN = 8  # generous: a passage is cut to its length in tokens afterwards
MIN_TOKENS = 16


# B sequences, L tokens of each
def sequences_of(text: str, tokenizer: Tokenizer, *, num_sequences: int, length: int) -> torch.Tensor:
    """ids_BL of passages spread evenly over the text, one after the other where it is short.

    Fewer than `num_sequences` where there is not enough text, and shorter ones where there is less than one. Raises
    ConfigurationError for less than MIN_TOKENS tokens.
    """
    span = length * CHARACTERS_PER_TOKEN
    if num_sequences * span >= len(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < MIN_TOKENS:
            raise ConfigurationError(f"the calibration text has {len(ids)} tokens: expected {MIN_TOKENS} or more")
        length = min(length, len(ids))
        num_found = min(num_sequences, len(ids) // length)
        stride = (len(ids) - length) // max(1, num_found - 1) if num_found > 1 else 0
        return torch.tensor([ids[i * stride : i * stride + length] for i in range(num_found)])
    stride = (len(text) - span) // max(1, num_sequences - 1)
    passages = (text[i * stride : i * stride + span] for i in range(num_sequences))
    found = [ids[:length] for ids in (tokenizer.encode(p, add_special_tokens=False) for p in passages)]
    whole = [ids for ids in found if len(ids) == length]
    if not whole:
        raise ConfigurationError(f"the calibration text has no passage of {length} tokens in {span} characters")
    return torch.tensor(whole)
