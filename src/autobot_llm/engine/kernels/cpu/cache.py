"""The compiled step's cache as tensors, in the layout of cache.h. Knows shapes; knows nothing of blocks' owners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autobot_llm.engine.kv_cache.heavy_hitters import keep_heavy_hitters
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.engine.kv_cache.storage import QUANTIZED_DTYPES, SCALE_DTYPE, lazy_zeros
from autobot_llm.engine.models.config import ModelConfig

STORED_AS = {torch.float32: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
"""What cache.h calls each type."""


# L layers, B blocks, K key/value heads, P positions of a block, D head size
@dataclass(frozen=True, slots=True)
class CompiledCache:
    """Keys, values, and where they are of one byte their scales; `attention_LBKP` is what each token was given so far.

    Pages that no block has used yet take no memory.
    """

    keys_LBKDP: torch.Tensor
    values_LBKPD: torch.Tensor
    key_scales_LBKP: torch.Tensor | None
    value_scales_LBKP: torch.Tensor | None
    attention_LBKP: torch.Tensor | None

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, dtype: torch.dtype, *, sums_attention: bool
    ) -> CompiledCache:
        places = (config.num_layers, num_blocks, config.num_kv_heads)
        is_rounded = dtype in QUANTIZED_DTYPES

        def zeros(*shape: int, dtype: torch.dtype, wanted: bool) -> torch.Tensor | None:
            return lazy_zeros((*places, *shape), dtype, torch.device("cpu")) if wanted else None

        keys = zeros(config.head_size, BLOCK_SIZE, dtype=dtype, wanted=True)
        values = zeros(BLOCK_SIZE, config.head_size, dtype=dtype, wanted=True)
        assert keys is not None and values is not None
        return cls(
            keys,
            values,
            zeros(BLOCK_SIZE, dtype=SCALE_DTYPE, wanted=is_rounded),
            zeros(BLOCK_SIZE, dtype=SCALE_DTYPE, wanted=is_rounded),
            zeros(BLOCK_SIZE, dtype=torch.float32, wanted=sums_attention),
        )

    def evict(self, block_ids: Sequence[int], num_kept: int, num_candidates: int) -> None:
        """See Evictor."""
        assert self.attention_LBKP is not None, "nobody knows what was attended to"
        parts = [self.keys_LBKDP.transpose(3, 4), self.values_LBKPD]
        if self.keys_LBKDP.dtype in QUANTIZED_DTYPES:
            parts = [part.view(torch.int8) for part in parts]  # torch moves no float8
        parts += [scales for scales in (self.key_scales_LBKP, self.value_scales_LBKP) if scales is not None]
        keep_heavy_hitters(parts, self.attention_LBKP, block_ids, num_kept, num_candidates)
