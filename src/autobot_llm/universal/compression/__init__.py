"""Prompts in fewer tokens: by rules, by choosing passages, by a small model's judgement. Lossy, and off by default.

What the answer to a compressed request depends on, and what a response cache's key must therefore hold (its check comes
before compression): AUTOBOT_PROMPT_COMPRESSION_ENABLED, AUTOBOT_PROMPT_COMPRESSION_RATIO, and the request's own
`compression` in `extra_body`.
"""

from __future__ import annotations

from autobot_llm.universal.compression.compressor import PromptCompressor
from autobot_llm.universal.compression.context import select_relevant_context
from autobot_llm.universal.compression.prompts import COMPRESSED_SYSTEM_PROMPTS
from autobot_llm.universal.compression.result import CompressionResult

__all__ = ["COMPRESSED_SYSTEM_PROMPTS", "CompressionResult", "PromptCompressor", "select_relevant_context"]
