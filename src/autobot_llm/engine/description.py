"""What an engine says of itself when it starts. Knows words and figures; knows nothing of how they come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from autobot_llm.engine.kv_cache.policy import CachePolicy

OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Hears (phase, done, in all) while an engine is made: bytes of "weights", and on a GPU then pieces of "kernels" and
"graphs"; 0 in all where nobody knows. Called on the thread that makes it."""


@dataclass(frozen=True, slots=True)
class CacheDescription:
    """What the KV cache holds of each token and of each sequence. Sizes are bytes of keys and values over all layers.

    `is_rounded`: `dtype` is coarser than what the model computes with, which would take `plain_bytes_per_token`.
    """

    policy: CachePolicy
    dtype: str
    is_rounded: bool
    bytes_per_token: int
    plain_bytes_per_token: int

    @property
    def is_lossy(self) -> bool:
        return self.is_rounded or self.policy.is_lossy

    def lines(self) -> Iterator[str]:
        """What makes the cache smaller, in words; nothing where nothing does."""
        if self.is_rounded:
            yield (
                f"keys and values are stored as {self.dtype}, {self.bytes_per_token:,} bytes a token instead of "
                f"{self.plain_bytes_per_token:,}, lossy, because AUTOBOT_KV_CACHE_DTYPE says so"
            )
        yield from self.policy.lines()

    def bytes_saved(self, num_tokens: int, num_evicted: int) -> int:
        """What sequences of so many tokens would take more without all that."""
        return num_tokens * self.plain_bytes_per_token - (num_tokens - num_evicted) * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class GpuDescription:
    """What runs on a GPU. `attention_reason` and `graphs_reason` say why; the latter is for graphs that are off.

    `num_graphs` were captured in `capture_seconds`, compilation included. `had_compiled_kernels`: the kernel cache
    was warm, so that nothing had to be compiled. `weights`: what they are stored as, where they are quantized;
    `weight_bytes` is what all of them take on the device.
    """

    device: str
    attention: str
    attention_reason: str
    num_graphs: int
    graphs_reason: str
    capture_seconds: float
    had_compiled_kernels: bool
    weights: str | None = None
    weight_bytes: int = 0

    def lines(self) -> Iterator[tuple[str, str]]:
        """Name and text of each line that a user reads at the start."""
        yield "device", self.device
        yield "attention", f"{self.attention} ({self.attention_reason})"
        if self.weights is not None:
            yield "weights", f"{self.weights}, {self.weight_bytes / 1e9:.2f} GB, lossy"
        yield "cuda_graphs", self.graphs

    @property
    def graphs(self) -> str:
        if not self.num_graphs:
            return f"none ({self.graphs_reason})"
        cache = "warm" if self.had_compiled_kernels else "cold"
        return f"{self.num_graphs} captured in {self.capture_seconds:.1f} s, kernel cache {cache}"


@runtime_checkable
class TellsQuantization(Protocol):
    """An executor that knows whether the weights it computes with are quantized."""

    @property
    def quantization(self) -> str | None:
        """The scheme in words; None where they are not."""
        ...


@runtime_checkable
class DescribedExecutor(Protocol):
    """An executor that can say what it runs on; it is asked once the engine is ready."""

    @property
    def description(self) -> GpuDescription: ...
