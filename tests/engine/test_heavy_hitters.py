"""What was attended to most stays, for each head: chosen right, moved right, in both steps, within the budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import TINY, Driver, greedy, num_leaked_blocks, request, tiny_engine, with_kernels
from model_folders import write_random_model

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kernels.cpu import build
from autobot_llm.engine.kernels.cpu.cache import CompiledCache
from autobot_llm.engine.kv_cache.heavy_hitters import keep_heavy_hitters
from autobot_llm.engine.kv_cache.policy import EVICTION_INTERVAL, CachePolicy, choose_policy
from autobot_llm.engine.kv_cache.prefix_cache import PrefixCacheManager
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.scoring import PromptScoring
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.errors import ConfigurationError

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")
BUDGET = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    write_random_model(
        path, "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.1
    )
    return path


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_kernels(tmp_path_factory.mktemp("cache"))


def engine_of(folder: Path, kernels: Path, *, compiled: bool = True, **options: object) -> Engine:
    return load_engine(
        dataclasses.replace(
            EngineOptions(
                folder=folder, cache_dir=kernels, device="cpu", compiled_step="on" if compiled else "off",
                max_num_seqs=3, max_num_batched_tokens=48, cpu_threads=2,
            ),
            **options,  # type: ignore[arg-type]
        )
    )  # fmt: skip


def test_each_head_keeps_its_most_attended_tokens_and_nothing_else_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    num_layers, num_blocks, num_heads, size = 2, 9, 3, 4
    attention = torch.rand((num_layers, num_blocks, num_heads, size), generator=generator)
    # what each place holds is told by a number of its own, in two layouts of memory
    plain = torch.arange(attention.numel()).view(attention.shape)
    turned = plain.float().transpose(2, 3).contiguous().transpose(2, 3)
    before, sums = plain.clone(), attention.clone()
    table, num_kept, num_candidates = [5, 0, 8, 3, 2], 2 * size, 4 * size
    keep_heavy_hitters([plain, turned], attention, table, num_kept, num_candidates)
    for layer in range(num_layers):
        for head in range(num_heads):
            scores = sums[layer, table[:4], head].flatten()
            expected = before[layer, table[:4], head].flatten()[scores.topk(num_kept).indices]
            kept = plain[layer, table[:2], head].flatten()
            assert sorted(kept.tolist()) == sorted(expected.tolist())
            assert torch.equal(turned[layer, table[:2], head].flatten().long(), kept)
            score_of = dict(zip(before[layer, table[:4], head].flatten().tolist(), scores.tolist(), strict=True))
            assert attention[layer, table[:2], head].flatten().tolist() == [
                score_of[number] for number in kept.tolist()
            ]
    untouched = [block for block in range(num_blocks) if block not in table[:4]]
    assert torch.equal(plain[:, untouched], before[:, untouched])
    assert torch.equal(attention[:, untouched], sums[:, untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_numbers_and_scales_of_the_compiled_cache_move_together(dtype: torch.dtype) -> None:
    cache = CompiledCache.allocate(load_config(TINY), 8, dtype, sums_attention=True)
    assert cache.attention_LBKP is not None
    generator = torch.Generator().manual_seed(1)
    cache.attention_LBKP.copy_(torch.rand(cache.attention_LBKP.shape, generator=generator))
    parts = [cache.keys_LBKDP.transpose(3, 4), cache.values_LBKPD]
    for part in parts:
        part.copy_(torch.randint(-8, 8, part.shape, generator=generator).to(dtype))
    scales = [part for part in (cache.key_scales_LBKP, cache.value_scales_LBKP) if part is not None]
    for part in scales:
        part.copy_(torch.rand(part.shape, generator=generator))
    before = [part.float() for part in (*parts, *scales)]
    table = [6, 1, 4]
    chosen_LKC = cache.attention_LBKP[:, table].transpose(1, 2).flatten(2).topk(16, dim=2).indices
    cache.evict(table, 16, 48)
    for old, part in zip(before, (*parts, *scales), strict=True):
        for layer, head in ((0, 0), (3, 1), (7, 0)):
            places = chosen_LKC[layer, head].tolist()
            expected = [old[layer, table[place // 16], head, place % 16].tolist() for place in places]
            kept = part[layer, table[0], head].float().tolist()
            assert sorted(map(str, kept)) == sorted(map(str, expected))


@needs_compiler
def test_a_budget_as_large_as_the_context_changes_no_bit(folder: Path, kernels: Path) -> None:
    """With 464 of the 512 tokens attention is summed up, and nothing has to leave."""
    prompt = np.random.default_rng(0).integers(5, 8000, 400).tolist()
    found = []
    for options in ({}, {"kv_heavy_hitters": 1.0}, {"kv_heavy_hitters": 480}):
        engine = engine_of(folder, kernels, **options)
        driver = Driver(engine)
        driver.add(0, request(prompt, greedy(20, num_logprobs=0)))
        driver.run()
        assert engine.scheduler.num_evicted_blocks == 0
        found.append((driver.token_ids, driver.logprobs))
        engine.close()
    assert found[1] == found[0] and found[2] == found[0]


@needs_compiler
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_both_steps_keep_the_same_and_hold_no_more_than_the_budget(
    folder: Path, kernels: Path, kv_cache_dtype: str
) -> None:
    prompts = [np.random.default_rng(seed).integers(5, 8000, length).tolist() for seed, length in ((1, 130), (2, 70))]
    found, most = [], 0
    for compiled in (True, False):
        engine = engine_of(
            folder, kernels, compiled=compiled, kv_heavy_hitters=BUDGET, kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory=2**21,
        )  # fmt: skip
        driver = Driver(engine)
        for number, prompt in enumerate(prompts):
            driver.add(number, request(prompt, greedy(16, min_tokens=16, num_logprobs=0)))
        while engine.has_work:
            driver.step()
            most = max(most, num_leaked_blocks(engine))
        assert num_leaked_blocks(engine) == 0
        assert engine.scheduler.num_evicted_blocks >= 8
        found.append(driver)
        engine.close()
    assert most <= len(prompts) * (BUDGET + EVICTION_INTERVAL) // 16
    first, second = found
    assert first.token_ids == second.token_ids
    tolerance = 1e-4 if kv_cache_dtype == "auto" else 0.05  # numbers next to a tie are rounded either way
    for key, logprobs in first.logprobs.items():
        assert np.abs(np.subtract(logprobs, second.logprobs[key])).max() < tolerance


@needs_compiler
def test_an_answer_is_the_same_bits_alone_and_in_company(folder: Path, kernels: Path) -> None:
    """Others cut a long prompt into other chunks, and preempt it; what it keeps is the same."""
    prompt = np.random.default_rng(5).integers(5, 8000, 200).tolist()
    found = []
    for num_others in (0, 4):
        engine = engine_of(
            folder, kernels, kv_heavy_hitters=BUDGET, max_num_batched_tokens=40, scheduling_policy="priority"
        )
        driver = Driver(engine)
        driver.add(0, request(prompt, greedy(60, min_tokens=60, num_logprobs=0)))
        for number in range(1, num_others + 1):
            for _ in range(4):
                driver.step()
            other = request(prompt[number : 20 * number], greedy(30, min_tokens=30))
            driver.add(number, dataclasses.replace(other, priority=-1))
        driver.run()
        found.append((driver.token_ids[0, 0], driver.logprobs[0, 0]))
        num_preemptions = engine.scheduler.num_preemptions
        engine.close()
    assert found[0] == found[1]
    assert num_preemptions > 0


@needs_compiler
def test_what_is_kept_does_not_depend_on_the_number_of_threads(folder: Path, kernels: Path) -> None:
    prompt = np.random.default_rng(4).integers(5, 8000, 300).tolist()
    found = []
    for cpu_threads in (1, 2):
        engine = engine_of(folder, kernels, kv_heavy_hitters=BUDGET, cpu_threads=cpu_threads)
        scoring = PromptScoring(prompt)
        while not scoring.advance(engine):
            pass
        scoring.release(engine)
        assert num_leaked_blocks(engine) == 0
        found.append(scoring.logprobs)
        engine.close()
    assert found[0] == found[1]


def test_heavy_hitters_run_without_prefixes_and_guesses_and_say_so(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False, kv_heavy_hitters=0.5)
    assert not engine.scheduler.block_pool.prefix_caching
    assert engine.speculator is None
    assert engine.speculation_reason.startswith("AUTOBOT_KV_HEAVY_HITTERS counts what every token attended to")
    assert engine.cache is not None and engine.cache.is_lossy
    assert list(engine.cache.lines()) == [
        "160 tokens of a sequence, half of them the most attended ones, lossy, because AUTOBOT_KV_HEAVY_HITTERS says so"
    ]
    with pytest.raises(ConfigurationError, match="names 1 prefixes and AUTOBOT_KV_HEAVY_HITTERS is set: expected 0"):
        PrefixCacheManager(engine, ["You are a librarian."])
    engine.close()
    with pytest.raises(ConfigurationError, match=r"AUTOBOT_SPECULATION_METHOD='ngram': .* expected auto or none"):
        tiny_engine(tmp_path, compiled=False, kv_heavy_hitters=64, speculation=SpeculationOptions(method="ngram"))  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [1.5, 31, 0.05, -1])
def test_a_budget_that_cannot_be_is_refused_with_what_is_accepted(budget: float) -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected 0 \(off\), a whole number of at least 32 tokens, or a share"
    ):
        choose_policy(load_config(TINY), sliding_window=0, heavy_hitters=budget, max_model_len=320)


def test_heavy_hitters_beside_windows_are_refused() -> None:
    config = load_config(TINY)
    with pytest.raises(ConfigurationError, match="expected one of them to be 0"):
        choose_policy(config, sliding_window=64, heavy_hitters=64, max_model_len=320)
    windowed = dataclasses.replace(config, sliding_windows=(64,) * 8)
    with pytest.raises(ConfigurationError, match="layers of this model have a sliding window of their own"):
        choose_policy(windowed, sliding_window=0, heavy_hitters=64, max_model_len=320)
    assert choose_policy(config, sliding_window=0, heavy_hitters=1, max_model_len=320) == (config, CachePolicy())
