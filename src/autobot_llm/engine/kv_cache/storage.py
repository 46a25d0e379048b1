"""The memory that cached keys and values live in. Knows shapes and bytes; knows nothing of who owns which block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from autobot_llm.engine.memory import kv_bytes_per_token
from autobot_llm.engine.models.config import ModelConfig


# N slots = num_blocks * block_size, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class KVStorage:
    """One tensor of keys and one of values for each layer; block b holds slots [b * block_size, (b + 1) * block_size).

    It starts as zeros, because a masked position still enters attention as 0 * value, which must not be 0 * NaN.
    On a CPU an unused block costs nothing: the system hands its pages out when they are first written.
    """

    keys_NKD: tuple[torch.Tensor, ...]
    values_NKD: tuple[torch.Tensor, ...]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVStorage:
        shape = (num_blocks * block_size, config.num_kv_heads, config.head_size)

        def tensors() -> tuple[torch.Tensor, ...]:
            return tuple(_zeros(shape, dtype, torch.device(device)) for _ in range(config.num_layers))

        return cls(keys_NKD=tensors(), values_NKD=tensors(), num_blocks=num_blocks, block_size=block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy leaves that to calloc
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""What keys and values may be rounded to, one byte a number, with a scale for each position of each head."""

SCALE_DTYPE = torch.bfloat16


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory that one block takes over all layers, keys and values, in bytes."""
    num_bytes = kv_bytes_per_token(config, dtype.itemsize)
    if dtype in QUANTIZED_DTYPES:
        num_bytes += 2 * config.num_layers * config.num_kv_heads * SCALE_DTYPE.itemsize
    return block_size * num_bytes


# L layers, B blocks, K key/value heads, P positions of a block, D head size
@dataclass(frozen=True, slots=True)
class PagedStorage:
    """Keys and values of all layers in one tensor L2BK..., the second index being 0 for keys and 1 for values.

    The positions of one head lie together within a block, PD, so that a kernel that works on one head reads whole
    lines. Quantized, a block's head is P D numbers of one byte and then P scales (`scales_of`), in one row of bytes.
    """

    cache_L2BK: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    block_size: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> PagedStorage:
        """All zeros, because some kernels let a masked position enter attention as 0 * value."""
        shape: tuple[int, ...] = (config.num_layers, 2, num_blocks, config.num_kv_heads)
        if dtype not in QUANTIZED_DTYPES:
            cache = layers = torch.zeros((*shape, block_size, config.head_size), dtype=dtype, device=device)
        else:
            row = block_size * (config.head_size + SCALE_DTYPE.itemsize)
            cache = torch.zeros((*shape, row), dtype=torch.int8, device=device)  # torch moves no blocks of float8
            layers = cache.view(dtype)
        return cls(cache, tuple(layer[0] for layer in layers), tuple(layer[1] for layer in layers), block_size)

    @property
    def num_blocks(self) -> int:
        return self.cache_L2BK.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.cache_L2BK.shape[3]


def scales_of(cache: torch.Tensor) -> torch.Tensor | None:
    """A layer's quantized keys or values seen as scales, the last P of each row [B, K, P (D + 2) / 2]; else None."""
    return cache.view(SCALE_DTYPE) if cache.dtype in QUANTIZED_DTYPES else None


def take_blocks(cache: torch.Tensor, blocks: torch.Tensor, head_size: int) -> torch.Tensor:
    """Keys or values of these blocks of a layer as numbers, [blocks, K, P, D]; float32 where they are quantized."""
    if cache.dtype not in QUANTIZED_DTYPES:
        return cache[blocks]
    rows = cache.view(torch.int8)[blocks]
    block_size = rows.shape[-1] // (head_size + SCALE_DTYPE.itemsize)
    numbers = rows[..., : block_size * head_size].contiguous().view(cache.dtype).float()
    scales: torch.Tensor = rows.view(SCALE_DTYPE)[..., -block_size:].float()
    return numbers.view(*scales.shape, head_size) * scales.unsqueeze(-1)
