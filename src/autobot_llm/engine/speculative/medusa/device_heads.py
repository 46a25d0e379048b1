"""Medusa's heads on a GPU: one graph from hidden states to the best tokens, and one copy to the host. Knows heads and a
stream; knows nothing of trees.

The heads' weights are what takes the time to read, so rows up to a graph's size cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.gpu.graphs import CUDAGraphManager
from autobot_llm.engine.speculative.guesses import NUM_CANDIDATES
from autobot_llm.engine.speculative.medusa.heads import StackedHeads

ROWS = (1, 2, 4, 8, 16)
"""Numbers of sequences with a graph of their own; more take several."""


# S sequences, K heads, R rows of a graph, E hidden size, C candidates
class DeviceHeads:
    """The heads' candidates for hidden states that were computed on `stream`, where the graphs run, too. Captures all
    of its graphs when it is made."""

    def __init__(self, heads: StackedHeads, hidden_size: int, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
        self.num_heads = heads.num_heads
        self._heads = heads
        self._stream = stream
        self._graphs: CUDAGraphManager[torch.Tensor] = CUDAGraphManager()
        self._arrived = torch.cuda.Event()
        shape = (2, self.num_heads, ROWS[-1], NUM_CANDIDATES)
        self._pinned = torch.zeros(shape, dtype=torch.int32, pin_memory=True)
        with torch.cuda.stream(stream), torch.no_grad():
            self._hidden_RE = torch.zeros((ROWS[-1], hidden_size), dtype=dtype, device=stream.device)
            self._inputs = {num_rows: self._hidden_RE[:num_rows] for num_rows in ROWS}
            for num_rows in reversed(ROWS):
                self._run(num_rows)
            stream.synchronize()

    def candidates(
        self, hidden_S: SequenceABC[torch.Tensor], num_heads: int, num_best: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As of StackedHeads; waits for the device."""
        assert num_best <= NUM_CANDIDATES
        parts = [self._part(part) for part in _parts(hidden_S)]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        ids_KSC, logits_KSC = found[:, :num_heads, :, :num_best]
        return ids_KSC.astype(np.int64), logits_KSC.view(np.float32)

    def close(self) -> None:
        self._graphs.clear()

    def _part(self, hidden_S: list[torch.Tensor]) -> npt.NDArray[np.int32]:
        """Ids, and the bits of their logits: int32 [2, K, S, C]."""
        number = len(hidden_S)
        num_rows = next(rows for rows in ROWS if rows >= number)
        with torch.cuda.stream(self._stream), torch.no_grad():
            torch.stack(hidden_S, out=self._hidden_RE[:number])
            found = self._run(num_rows)
            pinned = self._pinned.flatten()[: found.numel()].view(found.shape)
            pinned.copy_(found, non_blocking=True)
            self._arrived.record(self._stream)
        self._arrived.synchronize()
        return pinned.numpy()[:, :, :number].copy()

    def _run(self, num_rows: int) -> torch.Tensor:
        return self._graphs.capture(num_rows, self._guess, self._inputs[num_rows])

    def _guess(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        best = self._heads.logits(hidden_RE).float().topk(NUM_CANDIDATES, dim=-1)
        return torch.stack((best.indices.int(), best.values.view(torch.int32)))


def _parts(hidden_S: SequenceABC[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [list(hidden_S[start : start + ROWS[-1]]) for start in range(0, len(hidden_S), ROWS[-1])]
