"""Keys and values of one byte a number: written, read and attended to as their twins in torch do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from paged_steps import PagedStep, device_batch, random_step, relative_error, with_trees
from test_decode_attention import TOLERANCE

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.kernels.gpu.decode_attention import DecodeWorkspace, paged_decode
from autobot_llm.engine.kernels.gpu.rotary import (
    rotate_and_store,
    rotate_and_store_reference,
)
from autobot_llm.engine.kv_cache.storage import (
    QUANTIZED_DTYPES,
    PagedStorage,
    bytes_per_block,
    numbers_and_scales,
    quantize_positions,
    take_blocks,
)
from autobot_llm.engine.models.config import load_config

CACHE_DTYPES = pytest.mark.parametrize("cache_dtype", QUANTIZED_DTYPES, ids=["int8", "fp8"])
ON_GPU = torch.cuda.is_available()
TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"


def quantized(cache_BKPD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A layer's keys or values in the layout of PagedStorage; what was NaN is the largest number there is."""
    num_blocks, num_heads = cache_BKPD.shape[:2]
    numbers, scales = quantize_positions(cache_BKPD.flatten(0, 2).nan_to_num(3e4).unsqueeze(1), dtype)
    row = cache_BKPD[0, 0].numel() + cache_BKPD.shape[2] * 2
    rows = torch.empty((num_blocks, num_heads, row), dtype=torch.int8, device=cache_BKPD.device)
    stored_numbers, stored_scales = numbers_and_scales(rows, cache_BKPD.shape[3])
    stored_numbers.copy_(numbers.view(torch.int8).view(cache_BKPD.shape))
    stored_scales.copy_(scales.view(stored_scales.shape))
    return rows.view(dtype)


def with_quantized_cache(step: PagedStep, dtype: torch.dtype) -> PagedStep:
    return dataclasses.replace(step, keys=quantized(step.keys, dtype), values=quantized(step.values, dtype))


def attend(step: PagedStep, *, window: int = 0, tree: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decode kernel gives, and its twin over the same rounded cache."""
    step = with_trees(step) if tree else step
    batch = device_batch(step, window=window)
    workspace = DecodeWorkspace.allocate(
        batch.items_I8.shape[0],
        max_queries=batch.max_queries,
        group_size=step.num_heads // step.num_kv_heads,
        num_kv_heads=step.num_kv_heads,
        head_size=step.q.shape[2],
        device=step.qkv.device,
    )
    out_THD = torch.full(step.q.shape, float("nan"), dtype=step.qkv.dtype, device=step.qkv.device)
    paged_decode(step.q, step.keys, step.values, batch, out_THD, workspace, window=window)
    return out_THD, step.expected(window=window)


@CACHE_DTYPES
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("case", ["one token", "several", "a tree", "a window"])
def test_decoding_attends_to_the_rounded_keys_and_values(
    case: str, head_size: int, cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [1, 16, 17, 63, 200] if not ON_GPU else [1, 16, 17, 63, 3000, 8000]
    queries = [1] * len(lengths) if case == "one token" else [1, 4, 7, 2, 16, 3][: len(lengths)]
    step = random_step(
        lengths, [min(q, n) for q, n in zip(queries, lengths, strict=True)],
        num_heads=4, num_kv_heads=2, head_size=head_size, dtype=dtype, device=device,
    )  # fmt: skip
    rounded = with_quantized_cache(step, cache_dtype)
    out_THD, expected_THD = attend(rounded, window=50 if case == "a window" else 0, tree=case == "a tree")
    assert relative_error(out_THD, expected_THD) < TOLERANCE[dtype]
    if case == "several":
        exact = relative_error(expected_THD.to(dtype), step.expected())
        # a float8 keeps three bits after the first: a sixteenth at worst, in the keys and in the values
        assert 1e-4 < exact < (0.02 if cache_dtype == torch.int8 else 0.12), "rounding changes little, and something"


@CACHE_DTYPES
def test_values_of_very_different_sizes_are_weighed_alike(
    cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """Weights become float16 by the largest scale so far, which here grows ten thousand times within a context."""
    step = random_step([200, 90], [1, 3], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** -(4 * torch.rand(step.values.shape[:3], generator=generator)).to(device)
    growing = step.batch.block_tables_SB[0, : -(-200 // BLOCK_SIZE)]
    sizes[growing] = torch.logspace(-4, 0, len(growing), device=device)[:, None, None]
    values = step.values.float() * sizes.unsqueeze(-1)
    rounded = dataclasses.replace(with_quantized_cache(step, cache_dtype), values=quantized(values, cache_dtype))
    out_THD, expected_THD = attend(rounded)
    for row in range(4):  # each by itself, because they differ in size
        assert relative_error(out_THD[row], expected_THD[row]) < TOLERANCE[dtype]


@CACHE_DTYPES
@pytest.mark.parametrize("window", [0, 40])
def test_a_prompt_after_a_cached_prefix_attends_to_the_rounded_prefix(
    window: int, cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    step = random_step([150, 260], [60, 33], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    rounded = with_quantized_cache(step, cache_dtype)
    attention = TritonPagedAttention(
        AttentionShape(4, 2, 64, (window,)), [rounded.keys], [rounded.values], max_sequences=4, reason="a test"
    )
    out_THD = torch.full(step.q.shape, float("nan"), dtype=dtype, device=device)
    metadata = attention.prepare(rounded.batch)
    assert metadata.prefixed is not None and metadata.fresh is None
    attention.attend(0, rounded.q, rounded.k, rounded.v, out_THD, metadata)
    assert relative_error(out_THD, rounded.expected(window=window)) < TOLERANCE[dtype]


@CACHE_DTYPES
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_what_is_written_is_what_the_twin_writes(
    num_tokens: int, cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    if cache_dtype == torch.float8_e4m3fn and not ON_GPU:
        pytest.skip("Triton's interpreter rounds to float8 wrongly: 127.6 becomes 64")
    config = load_config(TINY)
    num_heads, num_kv_heads, head_size = config.num_heads, config.num_kv_heads, config.head_size
    generator = torch.Generator().manual_seed(num_tokens)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size, generator=generator)
    qkv[0, -head_size:] = 0.0  # a head of zeros has a scale of zero
    slots = torch.randperm(6 * BLOCK_SIZE, generator=generator)[:num_tokens].to(torch.int32)
    if num_tokens > 2:
        slots[1] = -1
    positions = torch.arange(num_tokens, dtype=torch.int32)
    angles = torch.rand(64, head_size // 2, generator=generator) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(device)
    caches = []
    for write in (rotate_and_store, rotate_and_store_reference):
        storage = PagedStorage.allocate(config, 6, BLOCK_SIZE, cache_dtype, device)
        storage.cache_L2BK.fill_(77)
        write(
            qkv.to(dtype).to(device), positions.to(device), slots.to(device), cos_sin, storage.keys[0],
            storage.values[0], num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        )  # fmt: skip
        caches.append(storage)
    everything, stored = torch.arange(6, device=device), slots[slots >= 0].long().to(device)
    is_stored_BP = torch.zeros(6 * BLOCK_SIZE, dtype=torch.bool, device=device).index_fill(0, stored, True).view(6, -1)
    for got, want in ((caches[0].keys[0], caches[1].keys[0]), (caches[0].values[0], caches[1].values[0])):
        numbers, expected = (take_blocks(cache, everything, head_size).transpose(1, 2) for cache in (got, want))
        assert numbers[~is_stored_BP].equal(expected[~is_stored_BP])
        # the twin rotates in float64 and divides exactly: a scale may be the neighbour of the kernel's,
        # and a number beside a tie, which is an eighth of itself away in float8
        error = (numbers - expected)[is_stored_BP].norm(dim=-1)
        bound = 0.01 if cache_dtype == torch.int8 else 0.04
        assert (error <= bound * expected[is_stored_BP].norm(dim=-1)).all()


def test_rounded_keys_and_values_take_half_the_memory_and_their_scales() -> None:
    config = load_config(TINY)
    plain = bytes_per_block(config, BLOCK_SIZE, torch.bfloat16)
    for dtype in QUANTIZED_DTYPES:
        storage = PagedStorage.allocate(config, 5, BLOCK_SIZE, dtype, torch.device("cpu"))
        cache = storage.cache_L2BK
        assert cache.numel() * cache.element_size() == 5 * bytes_per_block(config, BLOCK_SIZE, dtype)
        assert bytes_per_block(config, BLOCK_SIZE, dtype) == plain * (config.head_size + 2) // (2 * config.head_size)
        assert (storage.num_blocks, storage.num_kv_heads, storage.block_size) == (5, config.num_kv_heads, BLOCK_SIZE)
