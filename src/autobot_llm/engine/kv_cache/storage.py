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


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory that one block takes over all layers, keys and values, in bytes."""
    return block_size * kv_bytes_per_token(config, dtype.itemsize)


# L layers, B blocks, K key/value heads, P positions of a block, D head size
@dataclass(frozen=True, slots=True)
class PagedStorage:
    """Keys and values of all layers in one tensor LxBKPD, x being 0 for keys and 1 for values.

    The positions of one head lie together within a block, so that a kernel that works on one head reads whole lines.
    """

    cache_L2BKPD: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> PagedStorage:
        """All zeros, because some kernels let a masked position enter attention as 0 * value."""
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_size)
        cache = torch.zeros(shape, dtype=dtype, device=device)
        return cls(cache, tuple(layer[0] for layer in cache), tuple(layer[1] for layer in cache))

    @property
    def num_blocks(self) -> int:
        return self.cache_L2BKPD.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.cache_L2BKPD.shape[3]

    @property
    def block_size(self) -> int:
        return self.cache_L2BKPD.shape[4]
