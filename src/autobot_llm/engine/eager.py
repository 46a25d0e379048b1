"""Run steps in plain torch. Knows arrays and tensors; knows nothing of scheduling or sampling.

The slow twin of every faster executor, and what runs where none of them can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from autobot_llm.engine.attention.sdpa import HostBlocks, SdpaAttention
from autobot_llm.engine.attention.summing import SummingAttention
from autobot_llm.engine.batching.plan import Int64Array, StepBatch
from autobot_llm.engine.batching.preemption import SwappedBlocks
from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.models.decoder import Decoder

Computed = TypeVar("Computed")


class EagerExecutor:
    """SwappingExecutor and TreeExecutor over a decoder and attention on the same device. `reason` says why it was
    chosen."""

    name = "eager"

    def __init__(
        self, decoder: Decoder, attention: SdpaAttention, *, reason: str, quantization: str | None = None
    ) -> None:
        self.reason = reason
        self.quantization = quantization
        self._decoder = decoder
        self._attention = attention
        self._device = decoder.device

    # R rows whose logits are wanted, V vocabulary, E hidden size
    def execute(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 logits_RV, a new tensor each time."""
        return self._run(self._decoder.forward, batch)

    def hidden(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 hidden_RE, a new tensor each time."""
        return self._run(self._decoder.hidden, batch)

    def execute_with_features(self, batch: StepBatch, wanted: FeatureKinds) -> tuple[torch.Tensor, Features]:
        return self._run(partial(self._decoder.forward_with_features, wanted=wanted), batch)

    def _run(self, compute: Callable[..., Computed], batch: StepBatch) -> Computed:
        return compute(
            torch.from_numpy(batch.ids_T).to(self._device),
            torch.from_numpy(batch.positions_T).to(self._device),
            torch.from_numpy(batch.logit_rows_R).to(self._device),
            self._attention,
            self._attention.prepare(batch),
        )

    def discard(self, block_ids: list[int]) -> None:
        self._attention.discard(block_ids)

    def move(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        self._attention.move(slots_from_M, slots_to_M)

    def copy_out(self, block_ids: Sequence[int]) -> SwappedBlocks:
        return self._attention.copy_out(block_ids)

    def copy_in(self, swapped: SwappedBlocks, block_ids: Sequence[int]) -> None:
        assert isinstance(swapped, HostBlocks), "blocks come back to the executor that gave them"
        self._attention.copy_in(swapped, block_ids)

    def evict(self, block_ids: Sequence[int], num_kept: int, num_candidates: int) -> None:
        assert isinstance(self._attention, SummingAttention), "nobody knows what was attended to"
        self._attention.evict(block_ids, num_kept, num_candidates)

    def close(self) -> None:
        """Nothing to release: the cache goes with the attention backend."""
