"""Mark the stable prefix of a request, so that Anthropic keeps it in its prompt cache. Knows bodies and lengths only.

Rules: https://platform.claude.com/docs/en/build-with-claude/prompt-caching. A prefix is tools, then system, then turns;
at most four places may be marked, and a prefix below the model's minimum is never cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from autobot_llm.dialects.anthropic.blocks import NOT_CACHEABLE

_MARK = {"type": "ephemeral"}
_BYTES_PER_TOKEN = 4  # an estimate: nobody but Anthropic has the tokenizer


def has_marks(body: dict[str, Any]) -> bool:
    """Whether the caller has placed marks himself: then the whole placing is his."""
    return "cache_control" in body or any("cache_control" in block for block in _blocks(body))


def place_marks(body: dict[str, Any], min_tokens: int) -> int:
    """Mark `body` where its prefix is stable and has, by estimate, `min_tokens`; returns how many marks were placed.

    The last tool and the last block of the system prompt, which other conversations share. In a conversation that has
    gone on before, and so is likely to go on, also the end of its last request, which is in the cache by now, and of
    this one, for the next. A first question is not marked: writing to the cache costs more than not to, and nothing
    tells that it will be read.
    """
    num_marks = 0
    num_bytes = 0
    for field in ("tools", "system"):
        blocks = body.get(field)
        if not blocks:
            continue
        num_bytes += _size(blocks)
        if num_bytes >= min_tokens * _BYTES_PER_TOKEN:
            body[field] = _marked(blocks)
            num_marks += 1
    turns = body["messages"]
    ends = _ends_of_requests(turns)[-2:]
    for i, turn in enumerate(turns):
        num_bytes += _size(turn["content"])
        if i in ends and num_bytes >= min_tokens * _BYTES_PER_TOKEN:
            turn["content"] = _marked(turn["content"])
            num_marks += 1
    return num_marks


def _ends_of_requests(turns: list[dict[str, Any]]) -> list[int]:
    """The turns with which requests of this conversation ended: those before an answer, and the last one."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        return []
    last = len(turns) - 1
    return [i - 1 for i in answers if i > 0] + ([] if last in answers else [last])


def _marked(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy whose last block that can be marked is."""
    last = max((i for i, block in enumerate(blocks) if block.get("type") not in NOT_CACHEABLE), default=None)
    return [block | {"cache_control": _MARK} if i == last else block for i, block in enumerate(blocks)]


def _size(blocks: list[dict[str, Any]]) -> int:
    """Bytes of text and JSON. Images are left out: their tokens have nothing to do with their bytes."""
    return sum(len(msgspec.json.encode(block)) for block in blocks if block.get("type") != "image")


def _blocks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from body.get("tools", ())
    yield from body.get("system", ())
    for turn in body["messages"]:
        for block in turn["content"]:
            yield block
            if isinstance(block.get("content"), list):
                yield from block["content"]
