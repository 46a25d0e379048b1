"""What Ollama's quantized tags weigh. Facts only."""

from __future__ import annotations

from collections.abc import Mapping

BITS_PER_WEIGHT: Mapping[str, float] = {"q8_0": 8.5, "q4_K_M": 4.85}
"""The variants that are offered, the most faithful first (GGUF's blocks: q8_0 has 34 bytes for 32 weights; q4_K_M mixes
blocks of 4.5 and 6.6 bits, measured on 7B and 8B models)."""
