"""What launches of products with few rows have in common: how inputs are split, and what is fetched ahead. Knows sizes
and devices; knows no kernels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

ALIGNMENT = 16  # bytes of one load
_HOPPER = (9, 0)
_MAX_PARTIAL_SUMS = 4 << 20  # float32: 16 MiB for each device
_MAX_SPLIT_TILES = 8192


def split_inputs(num_splits: int, step: int, num_tiles: int, num_inputs: int, num_sums: int) -> tuple[int, int]:
    """How many stretches of whole steps the inputs are split into, none of them empty, and the shortest one's inputs.

    Fewer than `num_splits` where the sums of one split, `num_sums`, do not fit into the device's memory for them.
    """
    num_steps = triton.cdiv(num_inputs, step)
    fitting = _MAX_PARTIAL_SUMS // num_sums if num_tiles <= _MAX_SPLIT_TILES else 1
    steps_each = triton.cdiv(num_steps, max(min(num_splits, fitting), 1))
    num_splits = triton.cdiv(num_steps, steps_each)
    return num_splits, num_inputs - (num_splits - 1) * steps_each * step


def prefetchable(weight: torch.Tensor, num_bytes: int, num_inputs_left: int) -> int:
    """The bytes of each row that may be asked for: whole multiples of 16, and none outside the weight."""
    if weight.data_ptr() % ALIGNMENT:
        return 0
    return max(min(num_bytes, num_inputs_left * weight.element_size()), 0) // ALIGNMENT * ALIGNMENT


@lru_cache
def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for partial sums and for counting arrivals. It never moves, because captured graphs hold its address."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the memory for split products would belong to a CUDA graph: run a step before capturing")
    return (
        torch.empty(_MAX_PARTIAL_SUMS, dtype=torch.float32, device=device),
        torch.zeros(_MAX_SPLIT_TILES, dtype=torch.int32, device=device),
    )


@lru_cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The interpreter on the CPU plays the device that the tables are for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _HOPPER
