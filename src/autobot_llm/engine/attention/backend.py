"""What a decoder asks of attention. Knows a step's layout in the paged cache; knows nothing of any one kernel.

A backend owns its cache, because the best memory layout differs from kernel to kernel.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from autobot_llm.engine.batching.plan import StepBatch


# T packed tokens, H query heads, K key/value heads, D head size
class AttentionBackend(Protocol):
    """Causal, paged, grouped-query attention."""

    name: str

    def prepare(self, batch: StepBatch) -> Any:
        """Build what every layer of this step shares (index tensors, masks): called once per step."""
        ...

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        """Write this layer's new keys and values to their slots, then attend. Returns out_THD."""
        ...

    def discard(self, block_ids: list[int]) -> None:
        """Make blocks harmless whose content is suspect: a masked position still enters as 0 * value."""
        ...
