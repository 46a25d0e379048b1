from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_steps import PagedStep, random_step, relative_error

from autobot_llm.engine.kernels.gpu.prefill_attention import (
    LARGE_TILE,
    SMALL_TILE,
    PrefillTile,
    fresh_prefill,
    paged_prefill,
    plan_tiles,
)

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TINY_TILE = PrefillTile(block_m=32, block_n=32, num_warps=4, num_stages=2)


def attend(step: PagedStep, *, from_cache: bool, window: int = 0, tile: PrefillTile = TINY_TILE) -> torch.Tensor:
    """Run one variant on a poisoned output."""
    batch, group_size = step.batch, step.num_heads // step.num_kv_heads
    members = np.arange(batch.num_sequences, dtype=np.int32)
    tiles_W8 = plan_tiles(batch.query_starts, batch.context_lens, members, tile.block_m // group_size)
    tiles = torch.from_numpy(tiles_W8).to(step.qkv.device)
    out_THD = torch.full(step.q.shape, float("nan"), dtype=step.qkv.dtype, device=step.qkv.device)
    if from_cache:
        tables_SB = torch.from_numpy(batch.block_tables_SB).to(step.qkv.device)
        paged_prefill(step.q, step.keys, step.values, tables_SB, tiles, out_THD, tile=tile, window=window)
    else:
        fresh_prefill(step.q, step.k, step.v, tiles, out_THD, tile=tile, window=window)
    return out_THD


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)], ids=["own keys", "4 share", "7 share"])
@pytest.mark.parametrize("from_cache", [True, False], ids=["cache", "fresh"])
def test_fresh_prompts_equal_the_twin_from_either_place(
    from_cache: bool, heads: tuple[int, int], head_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [1, 17, 70, 32] if device.type == "cpu" else [1, 17, 64, 700, 2048, 129]
    step = random_step(
        lengths, lengths, num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, dtype=dtype, device=device
    )
    tile = TINY_TILE if device.type == "cpu" else LARGE_TILE
    out_THD = attend(step, from_cache=from_cache, tile=tile)
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


def test_a_chunk_sees_the_cached_prefix_before_it(dtype: torch.dtype, device: torch.device) -> None:
    step = random_step(
        [90, 200, 33, 64], [50, 8, 32, 64], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device
    )
    out_THD = attend(step, from_cache=True)
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 20, 64])
@pytest.mark.parametrize("from_cache", [True, False], ids=["cache", "fresh"])
def test_a_window_hides_what_lies_before_it(
    from_cache: bool, window: int, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [150, 40]
    step = random_step(
        lengths,
        [70, 40] if from_cache else lengths,
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        dtype=dtype,
        device=device,
    )
    out_THD = attend(step, from_cache=from_cache, window=window)
    assert relative_error(out_THD, step.expected(window=window)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "tile", [SMALL_TILE, LARGE_TILE, PrefillTile(128, 128, 8, 2), PrefillTile(16, 16, 4, 2)], ids=str
)
@pytest.mark.parametrize("from_cache", [True, False], ids=["cache", "fresh"])
def test_every_tile_gives_the_same_answer(
    tile: PrefillTile, from_cache: bool, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [260, 20]
    step = random_step(lengths, lengths, num_heads=4, num_kv_heads=1, head_size=128, dtype=dtype, device=device)
    out_THD = attend(step, from_cache=from_cache, tile=tile)
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


def test_one_sequences_nan_stays_its_own(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [20, 30, 17]
    step = random_step(lengths, lengths, num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    expected_THD = step.expected()
    step.qkv[20:50] = float("nan")
    out_THD = attend(step, from_cache=False)
    assert relative_error(out_THD[:20], expected_THD[:20]) < TOLERANCE[dtype]
    assert relative_error(out_THD[50:], expected_THD[50:]) < TOLERANCE[dtype]


def test_tiles_cover_each_query_row_once_and_the_longest_come_first() -> None:
    query_starts, context_lens = np.array([0, 5, 105, 106, 306], np.int32), np.array([5, 400, 9, 200], np.int32)
    tiles_W8 = plan_tiles(query_starts, context_lens, np.array([0, 1, 3], np.int32), 32)
    rows = [int(t[2]) + j for t in tiles_W8 for j in range(t[1], min(t[1] + 32, t[3]))]
    assert sorted(rows) == [*range(105), *range(106, 306)]
    first_positions = tiles_W8[:, 4] - tiles_W8[:, 3] + tiles_W8[:, 1]
    assert (np.diff(first_positions) <= 0).all()
