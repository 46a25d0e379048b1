"""Bring a step's small arrays to the device in one copy. Knows bytes and their layout; knows nothing of their meaning.

A step has a dozen arrays of a few hundred bytes. Each copy of its own would cost the host some 10 µs and the device a
gap; packed into one page-locked buffer they go together, while the step before is still running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16  # bytes: the widest load of a kernel
_NUM_BUFFERS = 3  # one being filled, one on its way, one whose step may still be queued

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

    `upload` queues the copy on the current stream: kernels queued after it see the new contents, those before it saw
    the old ones.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.on_device = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._pinned = [torch.zeros(capacity, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_BUFFERS)]
        self._on_host = [buffer.numpy() for buffer in self._pinned]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)]
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
        self._copied[self._turn].record()
        self._turn = (self._turn + 1) % _NUM_BUFFERS
