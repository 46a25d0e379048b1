"""Bring a step's small arrays to the device together. Knows bytes and their layout; knows nothing of their meaning.

A step has a dozen arrays of a few hundred bytes. Each copy of its own would cost the host some 10 µs and the device a
gap; packed into one page-locked buffer they go together: by a copy, or by a kernel of the captured step itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.kernels.gpu.exchange import NUM_SLOTS, fetch

_ALIGNMENT = 16  # bytes: the widest load of a kernel

_TORCH_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


@dataclass(frozen=True)
class Layout:
    """Where arrays of fixed shapes and dtypes lie in one buffer: name -> (offset in bytes, shape, dtype)."""

    fields: tuple[tuple[str, int, tuple[int, ...], np.dtype[np.generic]], ...]
    num_bytes: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> Layout:
        """A layout for arrays of these shapes and dtypes, one after the other."""
        fields, offset = [], 0
        for name, (shape, dtype_like) in shapes.items():
            dtype = np.dtype(dtype_like)
            fields.append((name, offset, shape, dtype))
            num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(fields), max(offset, _ALIGNMENT))

    @classmethod
    def for_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Layout:
        return cls.of({name: (array.shape, array.dtype) for name, array in arrays.items()})

    def on_host(self, buffer: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """The arrays as views of a byte buffer."""
        return {name: buffer[a:b].view(dtype).reshape(shape) for name, a, b, shape, dtype in self._spans}

    def on_device(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same as tensors over a uint8 tensor of the device."""
        return {name: buffer[a:b].view(_TORCH_DTYPES[dtype]).view(shape) for name, a, b, shape, dtype in self._spans}

    @cached_property
    def _spans(self) -> list[tuple[str, int, int, tuple[int, ...], np.dtype[np.generic]]]:
        return [
            (name, offset, offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64)), shape, dtype)
            for name, offset, shape, dtype in self.fields
        ]


class Staging:
    """A device buffer of `capacity` bytes, and page-locked ones to fill it from.

    `upload` queues the copy on the stream that was current when this was made: kernels queued there after it see the
    new contents, those before it saw the old ones.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self.on_device = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._pinned = [torch.zeros(capacity, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_SLOTS)]
        self._on_host = [buffer.numpy() for buffer in self._pinned]
        self._copied = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
        self._turn = 0

    @property
    def capacity(self) -> int:
        return self.on_device.numel()

    def next_host_buffer(self) -> npt.NDArray[np.uint8]:
        """The buffer to fill for the next upload; waits where the device has not yet read its last contents."""
        self._copied[self._turn].synchronize()
        return self._on_host[self._turn]

    def upload(self, num_bytes: int) -> None:
        """Send the first bytes of the buffer that `next_host_buffer` returned."""
        self.on_device[:num_bytes].copy_(self._pinned[self._turn][:num_bytes], non_blocking=True)
        self._copied[self._turn].record(self._stream)
        self._turn = (self._turn + 1) % NUM_SLOTS


class FetchedStaging:
    """The same for captured steps: `fetch`, queued or captured, brings the slot that was filled for it.

    Every run of `fetch` needs one `next_slot` before it, filled, and one `mark_queued` after it. `device_turn` is the
    device's own count of slots, for kernels that follow a `fetch`.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        num_words = -(-capacity // 4)
        self._ring = torch.zeros((NUM_SLOTS, num_words), dtype=torch.int32, pin_memory=True)
        self.slots: list[npt.NDArray[np.uint8]] = [slot.view(torch.uint8).numpy() for slot in self._ring]
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self.device_turn = torch.zeros(2, dtype=torch.int32, device=device)
        self._read = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
        self._turn = 0
        self.on_device = self._words.view(torch.uint8)

    def next_slot(self) -> int:
        """Which of `slots` to fill for the next `fetch`; waits where the device has not yet read its last contents."""
        self._read[self._turn].synchronize()
        return self._turn

    def fetch(self, num_bytes: int) -> None:
        """Queue the kernel that reads the first bytes of the slot whose turn it is when it runs."""
        fetch(self._ring, self.device_turn, self._words, -(-num_bytes // 4))

    def mark_queued(self) -> None:
        """Say that the step which reads this slot is queued: the next slot's turn."""
        self._read[self._turn].record(self._stream)
        self._turn = (self._turn + 1) % NUM_SLOTS

    def fill_all(self, contents: npt.NDArray[np.uint8]) -> None:
        """Give every slot the same contents, for steps that run any number of times; `resume` when they have."""
        for slot in self.slots:
            slot[: len(contents)] = contents

    def resume(self) -> None:
        """Count on from where the device is; waits for it."""
        self._turn = int(self.device_turn[0])
