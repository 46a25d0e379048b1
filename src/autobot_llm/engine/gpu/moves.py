"""Bring the right path of a tree into line: keys and values of single slots to others. Knows the cache and a stream.

Queued on the stream that runs the steps: what moves is what the steps before left there.
"""

from __future__ import annotations

import numpy as np
import torch

from autobot_llm.engine.batching.plan import Int64Array
from autobot_llm.engine.gpu.staging import Layout, Staging
from autobot_llm.engine.kernels.gpu.slots import MOVES_PER_PROGRAM, move_slots
from autobot_llm.engine.kv_cache.storage import PagedStorage


class SlotMover:
    """TreeExecutor's `move` over a paged cache."""

    def __init__(self, storage: PagedStorage, head_size: int, stream: torch.cuda.Stream) -> None:
        self._storage = storage
        self._head_size = head_size
        self._stream = stream
        self._layout = Layout.of({"moves": ((MOVES_PER_PROGRAM, 2), np.int32)})
        with torch.cuda.stream(stream):
            self._staging = Staging(self._layout.num_bytes, storage.cache_L2BK.device)
        self._moves = self._layout.on_device(self._staging.on_device)["moves"]

    def move(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        """As of TreeExecutor. One launch for MOVES_PER_PROGRAM moves: those of one are all at once."""
        with torch.cuda.stream(self._stream):
            for start in range(0, len(slots_from_M), MOVES_PER_PROGRAM):
                part = slice(start, start + MOVES_PER_PROGRAM)
                self._launch(slots_from_M[part], slots_to_M[part])

    def rehearse(self) -> None:
        """Launch a move of nothing, so that its kernel is met."""
        with torch.cuda.stream(self._stream):
            none = np.zeros(0, np.int64)
            self._launch(none, none)

    def _launch(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        host_M2 = self._layout.on_host(self._staging.next_host_buffer())["moves"]
        num_moves = len(slots_from_M)
        host_M2[:num_moves, 0] = slots_from_M
        host_M2[:num_moves, 1] = slots_to_M
        host_M2[num_moves:] = -1
        self._staging.upload(self._layout.num_bytes)
        move_slots(self._storage, self._moves, self._head_size)
