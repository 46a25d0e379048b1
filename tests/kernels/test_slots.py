from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from autobot_llm.engine.kernels.gpu.slots import MOVES_PER_PROGRAM, move_slots
from autobot_llm.engine.kv_cache.storage import QUANTIZED_DTYPES, PagedStorage, take_blocks
from autobot_llm.engine.models.config import load_config

TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"


@pytest.mark.parametrize("cache_dtype", [torch.float16, *QUANTIZED_DTYPES], ids=["float16", "int8", "fp8"])
def test_moved_slots_hold_what_others_held_in_every_layer(cache_dtype: torch.dtype, device: torch.device) -> None:
    """Some are read and written by the same call; whatever is not moved to stays as it was, to the bit."""
    config, num_blocks, size = load_config(TINY), 5, 16
    storage = PagedStorage.allocate(config, num_blocks, size, cache_dtype, device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-100, 100, storage.cache_L2BK.shape, generator=generator)
    storage.cache_L2BK.copy_(noise.to(storage.cache_L2BK.dtype))
    before = storage.cache_L2BK.clone()
    rng = np.random.default_rng(0)
    slots_to = np.sort(rng.choice(num_blocks * size, MOVES_PER_PROGRAM - 3, replace=False))
    slots_from = rng.permutation(num_blocks * size)[: len(slots_to)]
    assert set(slots_to) & set(slots_from), "a slot is read and written"
    moves = np.concatenate((np.stack((slots_from, slots_to), 1), [[-1, -1]])).astype(np.int32)
    move_slots(storage, torch.from_numpy(moves).to(device), config.head_size)
    expected = numbers(before, cache_dtype, config.head_size)
    expected[:, :, slots_to] = expected[:, :, slots_from]
    torch.testing.assert_close(
        numbers(storage.cache_L2BK, cache_dtype, config.head_size), expected, rtol=0, atol=0, equal_nan=True
    )


def numbers(cache_L2BK: torch.Tensor, dtype: torch.dtype, head_size: int) -> torch.Tensor:
    """The cache as numbers [L, 2, slots, K, D]."""
    blocks = torch.arange(cache_L2BK.shape[2])
    layers = [torch.stack([take_blocks(half.view(dtype), blocks, head_size) for half in layer]) for layer in cache_L2BK]
    return torch.stack(layers).transpose(3, 4).flatten(2, 3)
