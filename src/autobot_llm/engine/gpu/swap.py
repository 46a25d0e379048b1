"""Move blocks of the cache to host memory and back. Knows the cache's tensor and a stream; knows nothing of who waits.

Everything is queued on the stream that runs the steps, so a block's content is what the steps before left there, and
the steps after see it restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autobot_llm.engine.batching.preemption import SwappedBlocks
from autobot_llm.engine.kv_cache.storage import PagedStorage


@dataclass(frozen=True, slots=True)
class HostBlocks:
    """Blocks in page-locked memory, as in the cache."""

    content: torch.Tensor


class BlockSwapper:
    """BlockCopier over a paged cache."""

    def __init__(self, storage: PagedStorage, stream: torch.cuda.Stream) -> None:
        self._cache = storage.cache_L2BK
        self._stream = stream

    def copy_out(self, block_ids: Sequence[int]) -> SwappedBlocks:
        with torch.cuda.stream(self._stream):
            gathered = self._cache.index_select(2, self._on_device(block_ids))
            content = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
            content.copy_(gathered, non_blocking=True)
        return HostBlocks(content)

    def copy_in(self, swapped: SwappedBlocks, block_ids: Sequence[int]) -> None:
        assert isinstance(swapped, HostBlocks), "blocks come back to the executor that gave them"
        with torch.cuda.stream(self._stream):
            content = swapped.content[:, :, : len(block_ids)].to(self._cache.device, non_blocking=True)
            self._cache.index_copy_(2, self._on_device(block_ids), content)

    def _on_device(self, block_ids: Sequence[int]) -> torch.Tensor:
        blocks = torch.tensor(list(block_ids), dtype=torch.int64).pin_memory()
        return blocks.to(self._cache.device, non_blocking=True)
