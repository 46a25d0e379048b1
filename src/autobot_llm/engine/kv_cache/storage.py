"""The memory that cached keys and values live in. Knows shapes and bytes; knows nothing of who owns which block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from autobot_llm.engine.memory import kv_bytes_per_token
from autobot_llm.engine.models.config import ModelConfig

QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""What keys and values may be rounded to, one byte a number, with a scale for each position of each head."""

SCALE_DTYPE = torch.bfloat16


# N slots = num_blocks * block_size, L layers, K key/value heads, D head size, T new tokens
@dataclass(frozen=True, slots=True)
class SlotCache:
    """A layer's keys or values by slot; block b holds slots [b * block_size, (b + 1) * block_size).

    Numbers of `dtype`; those of one byte lie there as int8, whatever they are, with a scale for each head of a slot.
    """

    numbers_NKD: torch.Tensor
    scales_NK: torch.Tensor | None
    dtype: torch.dtype

    def write(self, slots_T: torch.Tensor, part_TKD: torch.Tensor) -> None:
        if self.scales_NK is None:
            self.numbers_NKD.index_copy_(0, slots_T, part_TKD)
            return
        numbers_TKD, scales_TK = quantize_positions(part_TKD, self.dtype)
        self.numbers_NKD.index_copy_(0, slots_T, numbers_TKD.view(torch.int8))
        self.scales_NK.index_copy_(0, slots_T, scales_TK)

    def row_of_slots(self, first: int, num_slots: int) -> torch.Tensor:
        """What these slots hold, a view where it is not rounded."""
        scales_NK = None if self.scales_NK is None else self.scales_NK.narrow(0, first, num_slots)
        return self._widened(self.numbers_NKD.narrow(0, first, num_slots), scales_NK)

    def slots(self, slots_L: torch.Tensor) -> torch.Tensor:
        """What these slots hold."""
        scales_LK = None if self.scales_NK is None else self.scales_NK.index_select(0, slots_L)
        return self._widened(self.numbers_NKD.index_select(0, slots_L), scales_LK)

    def slots_of_blocks(self, blocks: torch.Tensor, block_size: int) -> torch.Tensor:
        """What the slots of these blocks hold, one block after the other."""

        def gathered(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(-1, block_size * tensor[0].numel()).index_select(0, blocks).view(-1, *tensor.shape[1:])

        return self._widened(gathered(self.numbers_NKD), None if self.scales_NK is None else gathered(self.scales_NK))

    def _widened(self, numbers: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        return numbers if scales is None else numbers.view(self.dtype).float() * scales.float().unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class KVStorage:
    """Keys and values of all layers by slot; `attention_LNK`, if wanted, is what each slot's token was given so far.

    It starts as zeros, because a masked position still enters attention as 0 * value, which must not be 0 * NaN.
    On a CPU an unused block costs nothing: the system hands its pages out when they are first written.
    """

    numbers_2LNKD: torch.Tensor
    scales_2LNK: torch.Tensor | None
    attention_LNK: torch.Tensor | None
    dtype: torch.dtype
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        sums_attention: bool = False,
    ) -> KVStorage:
        shape = (config.num_layers, num_blocks * block_size, config.num_kv_heads)
        device, is_rounded = torch.device(device), dtype in QUANTIZED_DTYPES
        return cls(
            lazy_zeros((2, *shape, config.head_size), torch.int8 if is_rounded else dtype, device),
            lazy_zeros((2, *shape), SCALE_DTYPE, device) if is_rounded else None,
            lazy_zeros(shape, torch.float32, device) if sums_attention else None,
            dtype,
            num_blocks,
            block_size,
        )

    @property
    def keys(self) -> tuple[SlotCache, ...]:
        """Those of each layer."""
        return self._layers(0)

    @property
    def values(self) -> tuple[SlotCache, ...]:
        return self._layers(1)

    def _layers(self, which: int) -> tuple[SlotCache, ...]:
        numbers_LNKD, scales_2LNK = self.numbers_2LNKD[which], self.scales_2LNK
        scales = [None] * len(numbers_LNKD) if scales_2LNK is None else scales_2LNK[which]
        return tuple(SlotCache(*pair, self.dtype) for pair in zip(numbers_LNKD, scales, strict=True))


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory a CPU takes when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy leaves that to calloc
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


def quantize_positions(part_TKD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rounding cache stores: numbers TKD of a byte each, and bfloat16 scales TK, one for each head of a token.

    The twin of the GPU's cache write and of the compiled step's.
    """
    limit = 127.0 if dtype == torch.int8 else 448.0
    wide = part_TKD.float()
    scales_TK1 = (wide.abs().amax(-1, keepdim=True) / limit).to(SCALE_DTYPE)
    scaled = (wide * (1.0 / torch.where(scales_TK1 == 0, 1.0, scales_TK1.float()))).clamp(-limit, limit)
    if dtype == torch.int8:
        scaled = (scaled + torch.where(scaled >= 0, 0.5, -0.5)).trunc()
    return scaled.to(dtype), scales_TK1.squeeze(-1)


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
    lines. Quantized, a block is K P D numbers of one byte and then K P scales (`numbers_and_scales`), in one row of
    bytes: scales beside each head's numbers would move those of the next one off the lines of 128 bytes.
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
    """A layer's quantized keys or values seen as scales, the last K P of each block; else None."""
    return cache.view(SCALE_DTYPE) if cache.dtype in QUANTIZED_DTYPES else None


def numbers_and_scales(cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's quantized keys or values, contiguous in a block: numbers BKPD as int8, and scales BKP."""
    num_blocks, num_heads, row = cache.shape
    block_size = row // (head_size + SCALE_DTYPE.itemsize)
    blocks = cache.view(torch.int8).flatten(1)
    num_numbers = num_heads * block_size * head_size
    numbers = blocks[:, :num_numbers].view(num_blocks, num_heads, block_size, head_size)
    scales = blocks.view(SCALE_DTYPE)[:, num_numbers // 2 :].view(num_blocks, num_heads, block_size)
    return numbers, scales


def take_blocks(cache: torch.Tensor, blocks: torch.Tensor, head_size: int) -> torch.Tensor:
    """Keys or values of these blocks of a layer as numbers, [blocks, K, P, D]; float32 where they are quantized."""
    if cache.dtype not in QUANTIZED_DTYPES:
        return cache[blocks]
    numbers, scales = numbers_and_scales(cache, head_size)
    return numbers[blocks].view(cache.dtype).float() * scales[blocks].float().unsqueeze(-1)
