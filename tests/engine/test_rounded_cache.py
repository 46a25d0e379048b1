"""Keys and values of one byte a number on a CPU: as the twin in torch rounds them, and attended to as such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import tiny_engine, with_kernels
from model_folders import write_random_model

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.kernels.cpu import build
from autobot_llm.engine.kernels.cpu.build import load_library
from autobot_llm.engine.kernels.cpu.compiled import CompiledExecutor
from autobot_llm.engine.kv_cache.storage import quantize_positions
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sequence import SamplingParams, Sequence

NUM_BLOCKS, TABLE = 12, [7, 2, 9, 4]
DTYPES = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    write_random_model(
        path, "llama", hidden_size=80, num_attention_heads=10, num_key_value_heads=2, initializer_range=0.1
    )
    return path


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_kernels(tmp_path_factory.mktemp("cache"))


def compiled(folder: Path, kernels: Path, dtype: torch.dtype) -> CompiledExecutor:
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=None, device="cpu")
    return CompiledExecutor(
        config, weights, load_library(kernels), num_blocks=NUM_BLOCKS, max_tokens=64, max_model_len=64, num_threads=2,
        cache_dtype=dtype,
    )  # fmt: skip


def eager(folder: Path, dtype: torch.dtype) -> tuple[EagerExecutor, SdpaAttention, ModelConfig]:
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device="cpu")
    attention = SdpaAttention(
        config, num_blocks=NUM_BLOCKS, block_size=16, dtype=torch.float32, device="cpu", cache_dtype=dtype
    )
    return EagerExecutor(Decoder(config, weights), attention, reason="the slow twin"), attention, config


def steps() -> list[StepBatch]:
    """A prompt of 40 tokens beside a short one, then a token of each, then one alone."""
    rng = np.random.default_rng(3)
    long, short = (
        Sequence(i, rng.integers(5, 8000, n).tolist(), SamplingParams(max_tokens=1)) for i, n in ((0, 42), (1, 6))
    )
    long.block_ids.extend(TABLE[:3])
    short.block_ids.extend(TABLE[3:])
    parts = [[(long, 0, 40), (short, 0, 5)], [(long, 40, 41), (short, 5, 6)], [(long, 41, 42)]]
    return [build_batch([ScheduledSequence(s, a, b - a, True) for s, a, b in part], 16) for part in parts]


@needs_compiler
@DTYPES
def test_the_compiled_step_stores_what_its_twin_rounds(folder: Path, kernels: Path, dtype: torch.dtype) -> None:
    """The first layer's keys and values do not depend on how the cache stores them."""
    exact, rounded = compiled(folder, kernels, torch.float32), compiled(folder, kernels, dtype)
    for executor in (exact, rounded):
        executor.execute(steps()[0])
    ours, plain = rounded.cache, exact.cache
    assert ours.key_scales_LBKP is not None and ours.value_scales_LBKP is not None
    for numbers, scales, wide in (
        (ours.keys_LBKDP.transpose(3, 4), ours.key_scales_LBKP, plain.keys_LBKDP.transpose(3, 4)),
        (ours.values_LBKPD, ours.value_scales_LBKP, plain.values_LBKPD),
    ):
        expected, expected_scales = quantize_positions(wide[0].contiguous(), dtype)
        assert torch.equal(numbers[0].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales[0], expected_scales)
        assert expected[TABLE[0]].view(torch.uint8).any()
    exact.close()
    rounded.close()


@needs_compiler
@DTYPES
def test_both_steps_attend_to_the_rounded_numbers(folder: Path, kernels: Path, dtype: torch.dtype) -> None:
    """After one layer's rounding the twins' numbers part where one is next to a tie, so the rest is a tolerance."""
    fast, (slow, _, _), exact = compiled(folder, kernels, dtype), eager(folder, dtype), eager(folder, torch.float32)[0]
    for batch in steps():
        ours, theirs, plain = (executor.execute(batch).clone() for executor in (fast, slow, exact))
        error, rounding = (ours - theirs).abs().mean(), (theirs - plain).abs().mean()
        assert error < 0.2 * rounding
        assert 0 < rounding < 0.1 * plain.std()
    fast.close()


@DTYPES
def test_rounded_blocks_come_back_from_host_memory_as_they_were(folder: Path, dtype: torch.dtype) -> None:
    executor, attention, _ = eager(folder, dtype)
    first, second, third = steps()
    executor.execute(first)
    executor.execute(second)
    expected = executor.execute(third)
    swapped = executor.copy_out(TABLE[:3])
    executor.discard(TABLE[:3])
    assert not torch.equal(executor.execute(third), expected)
    executor.copy_in(swapped, TABLE[:3])
    assert torch.equal(executor.execute(third), expected)
    assert attention.storage.numbers_2LNKD.dtype == torch.int8


@pytest.mark.parametrize(("name", "num_bytes"), [("auto", 8192), ("int8", 2112), ("fp8", 2112)])
def test_the_same_memory_holds_so_many_more_tokens(tmp_path: Path, name: str, num_bytes: int) -> None:
    """Of the embedded model: 8 layers, 2 heads, 64 numbers, keys and values, and a scale of 2 bytes."""
    engine = tiny_engine(tmp_path, compiled=False, num_blocks=100, kv_cache_dtype=name)
    assert engine.bytes_per_block == 16 * num_bytes
    assert engine.scheduler.block_pool.num_blocks == 100 * 8192 // num_bytes
    assert engine.cache is not None
    assert list(engine.cache.lines()) == (
        []
        if name == "auto"
        else [
            f"keys and values are stored as {'int8' if name == 'int8' else 'float8_e4m3fn'}, 2,112 bytes a token "
            "instead of 8,192, lossy, because AUTOBOT_KV_CACHE_DTYPE says so"
        ]
    )
    engine.close()
