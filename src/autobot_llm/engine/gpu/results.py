"""Sampled tokens on their way to the host: page-locked rows, and what waits for them. Knows rows and events; knows
nothing of what was sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.executor import Features, SampledRows
from autobot_llm.engine.kernels.gpu.exchange import NUM_SLOTS

OnWaited = Callable[[float], None]
"""Hears how long the host has waited for the device, in seconds."""


class ResultRows:
    """A step's tokens and best logits in page-locked memory."""

    def __init__(self, tokens_R: torch.Tensor, bests_R: torch.Tensor) -> None:
        self.tokens_pinned, self.bests_pinned = tokens_R, bests_R
        self.tokens, self.bests = tokens_R.numpy(), bests_R.numpy()
        self.arrived = torch.cuda.Event(enable_timing=True)


class ResultRing:
    """Room for the results of as many steps as may be under way."""

    def __init__(self, max_rows: int) -> None:
        self.tokens_pinned = torch.zeros((NUM_SLOTS, max_rows), dtype=torch.int32, pin_memory=True)
        self.bests_pinned = torch.zeros((NUM_SLOTS, max_rows), dtype=torch.float32, pin_memory=True)
        self.slots = [ResultRows(*slot) for slot in zip(self.tokens_pinned, self.bests_pinned, strict=True)]


class LaunchedRows:
    """A queued step. `wait` reads its tokens from the rows that the device copies them to."""

    def __init__(self, rows: ResultRows, num_rows: int, features: Features, on_waited: OnWaited) -> None:
        self.features = features
        self._rows = rows
        self._num_rows = num_rows
        self._on_waited = on_waited

    def wait(self) -> SampledRows:
        _synchronize(self._rows, self._on_waited)
        num_rows = self._num_rows
        return SampledRows(self._rows.tokens[:num_rows].tolist(), self._rows.bests[:num_rows].tolist())


class LaunchedChainRows:
    """A queued chain, whose tokens lie in `places` of its rows, and from `first_row` on for the target. The device has
    `begun` with it, or with what it waited for."""

    features = Features()

    def __init__(
        self,
        result: ResultRows,
        begun: torch.cuda.Event,
        places: npt.NDArray[np.int64],
        first_row: int,
        on_waited: OnWaited,
    ) -> None:
        self.rows = first_row + places
        self.seconds = 0.0
        self._result = result
        self._begun = begun
        self._places = places
        self._on_waited = on_waited

    def wait(self) -> SampledRows:
        result, places = self._result, self._places
        _synchronize(result, self._on_waited)
        self.seconds = self._begun.elapsed_time(result.arrived) * 1e-3
        return SampledRows(result.tokens[places].tolist(), result.bests[places].tolist())


def _synchronize(rows: ResultRows, on_waited: OnWaited) -> None:
    start = time.perf_counter()
    rows.arrived.synchronize()
    on_waited(time.perf_counter() - start)
