"""What runs a step on a device. Knows a step's arrays and logits; knows nothing of scheduling or sampling."""

from __future__ import annotations

from typing import Protocol

import torch

from autobot_llm.engine.batching.plan import StepBatch


# R rows whose logits are wanted, V vocabulary
class Executor(Protocol):
    """Computes a batch, writing its keys and values into the paged cache, and returns the wanted rows' logits."""

    name: str
    reason: str
    """Why this executor was chosen, for the start-up line and the report."""

    def execute(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 logits_RV, valid until the next call."""
        ...

    def discard(self, block_ids: list[int]) -> None:
        """See to it that nothing these blocks hold, be it NaN, reaches their next owner."""
        ...

    def close(self) -> None: ...
