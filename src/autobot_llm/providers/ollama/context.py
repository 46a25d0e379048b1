"""Choose the context a model is loaded with, and keep to it: another one would load the model anew, for everybody.

Knows sizes in tokens; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

SMALLEST = 4096
ANSWER = 1024  # tokens left for an answer without max_tokens
BYTES_PER_TOKEN = 3.0  # an estimate on the safe side: English has 4 and more, code about 3
PER_MESSAGE = 8  # tokens that a chat template puts around a message
PER_IMAGE = 1024  # what current vision models make of a picture, roughly
TELLING_BYTES = 1000  # a shorter prompt says more about its template than about its text


def step(num_tokens: int) -> int:
    """The next power of two, so that a conversation that grows loads its model a few times and not at every turn."""
    return max(SMALLEST, 1 << (num_tokens - 1).bit_length())


@dataclass(slots=True)
class Pin:
    """The context of one model. `limit` is the most that it was trained for, or that the settings allow."""

    limit: int | None = None
    num_ctx: int = 0
    num_in_flight: int = 0
    num_growths: int = 0
    tokens_per_byte: float = 1 / BYTES_PER_TOKEN

    def choose(self, num_tokens: int, *, loaded: int = 0) -> int:
        """The context for a request of `num_tokens`, prompt and answer. `loaded` is what the model has now, 0: nothing.

        What is loaded and large enough is taken as it is, whoever loaded it; while answers are under way, our own
        choice stands, because the model may be on its way to it. It never shrinks.
        """
        if loaded and (not self.num_in_flight or loaded > self.num_ctx):
            fits = loaded >= min(num_tokens, self.limit or num_tokens)
            self.num_ctx = loaded if fits else max(self.num_ctx, loaded)
        if num_tokens > self.num_ctx:
            grown = step(num_tokens)
            if self.limit is not None:
                grown = max(min(grown, self.limit), self.num_ctx)
            self.num_growths += self.num_ctx not in (0, grown)
            self.num_ctx = grown
        return self.num_ctx

    def estimate(self, body: Mapping[str, Any], max_tokens: int | None) -> int:
        """About how many tokens a request's prompt and answer take, rather too many than too few."""
        texts, num_images, num_messages = _size(body)
        prompt = texts * self.tokens_per_byte + num_images * PER_IMAGE + num_messages * PER_MESSAGE
        return int(prompt) + (ANSWER if max_tokens is None else max_tokens)

    def learn(self, body: Mapping[str, Any], num_prompt_tokens: int) -> None:
        """Correct the estimate where a prompt had more tokens to the byte; fewer teach nothing, for safety."""
        texts, num_images, num_messages = _size(body)
        if texts >= TELLING_BYTES and not num_images:
            seen = (num_prompt_tokens - num_messages * PER_MESSAGE) / texts
            self.tokens_per_byte = min(1.0, max(self.tokens_per_byte, seen))


def _size(body: Mapping[str, Any]) -> tuple[int, int, int]:
    """Bytes of text, images and messages of a request's body."""
    messages = body.get("messages") or [{"content": body.get("prompt", "") + body.get("suffix", "")}]
    num_bytes = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    num_images = sum(len(message.get("images", ())) for message in messages)
    others = [body["tools"]] if "tools" in body else []
    others += [message["tool_calls"] for message in messages if "tool_calls" in message]
    num_bytes += sum(len(msgspec.json.encode(other)) for other in others)
    return num_bytes, num_images, len(messages)
