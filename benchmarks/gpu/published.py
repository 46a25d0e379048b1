"""Figures of other engines, and the bars to meet. Constants, each with its source; nothing here is measured.

Source of the other engines' figures: this project's table of peers, taken on one NVIDIA H200 with random weights in the
Mistral-7B shape (7.24B parameters, 14.5 GB in bf16), greedy, prefix caching off. Same definitions as in latency.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SOURCE = "published in this project's table of peers, same GPU model; not measured in this run"
BARS_DEVICE = "NVIDIA H200"

# (batch, prompt tokens) -> ms to the first token of the whole batch, ms between tokens
VLLM_BF16: Mapping[tuple[int, int], tuple[float | None, float]] = {
    (1, 512): (15.5, 4.72),
    (1, 2048): (51.0, 4.77),
    (8, 512): (95.9, 4.96),
    (32, 512): (375.0, 5.48),
    (128, 512): (1495.0, 8.19),
    (1, 16384): (None, 5.23),
    (8, 16384): (None, 8.92),
}

# engine -> ms between tokens at batch 1, 8, 32, 128; ms to the first token at batch 1; seconds to start
OTHERS: Mapping[str, tuple[float | None, ...]] = {
    "vLLM 0.26, bf16": (4.72, 4.96, 5.48, 8.19, 15.5, 66.0),
    "vLLM 0.26, online fp8": (3.30, 3.55, 4.66, 6.83, 11.4, 65.0),
    "vLLM 0.26, int4 weights": (3.58, 3.81, 4.61, 8.25, 16.7, 67.0),
    "transformers 5.17, eager, sdpa": (22.9, 20.7, 21.1, None, 20.4, None),
    "transformers 5.17, compiled": (7.0, None, None, None, 28.4, None),
    "gpt-fast, int8 weights": (4.66, None, None, None, None, 60.0),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit on one figure of the JSON line. `path` leads to it; the figure must be at most, or at least, `limit`."""

    what: str
    path: tuple[str, ...]
    limit: float
    at_least: bool = False

    def figure(self, sections: Mapping[str, Any]) -> float | None:
        """The measured figure; None where its section did not run or did not get so far."""
        value: Any = sections
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else float(value)

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


BARS = (
    Bar("inter-token ms, batch 1", ("latency", "1x512", "inter_token_ms"), 3.8),
    Bar("inter-token ms, batch 8", ("latency", "8x512", "inter_token_ms"), 4.3),
    Bar("inter-token ms, batch 32", ("latency", "32x512", "inter_token_ms"), 4.9),
    Bar("inter-token ms, batch 32, no bound", ("latency", "32x512 unbounded", "inter_token_ms"), 4.9),
    Bar("inter-token ms, batch 128", ("latency", "128x512", "inter_token_ms"), 7.4),
    Bar("inter-token ms, batch 128, no bound", ("latency", "128x512 unbounded", "inter_token_ms"), 7.4),
    Bar("inter-token ms, batch 8, 16,384 tokens", ("latency", "8x16384", "inter_token_ms"), 7.9),
    Bar("inter-token ms, batch 8, 16,384 tokens, no bound", ("latency", "8x16384 unbounded", "inter_token_ms"), 7.9),
    Bar("first token ms, 512 tokens", ("latency", "1x512", "first_token_ms"), 13.0),
    Bar("first token ms, 2,048 tokens", ("latency", "1x2048", "first_token_ms"), 49.0),
    Bar("inter-token time saved by graphs, batch 1", ("graphs", "saved_by_graphs"), 0.40, at_least=True),
    Bar("host µs per token, batch 32", ("graphs", "32", "host_us_per_token"), 10.0),
    Bar("continuous over static batching", ("batching", "log_uniform", "continuous_over_static"), 1.7, at_least=True),
    Bar("first-token time saved by a 4,096-token prefix", ("prefix", "random", "saved"), 0.80, at_least=True),
    Bar("first-token time saved by 1,000 tokens of text", ("prefix", "text", "saved"), 0.80, at_least=True),
    Bar("start to first answer, s, cold kernel cache", ("start", "cold", "total"), 20.0),
    Bar("greedy tokens that differ beyond rounding", ("correctness", "num_beyond_rounding"), 0.0),
)
