"""A sequence that lets go of what no layer looks back to: the same answers, in as few blocks as its window allows."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections.abc import Sequence as SequenceABC
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import TINY, Driver, greedy, num_leaked_blocks, request, tiny_engine, with_kernels
from fake_device import FakeDevice, FakePipelinedDevice
from guessed_trees import TreeGuesser
from model_folders import write_random_model
from schedules import CONFIG, SIZE, TOKENIZER, VOCAB_SIZE, Arrival

from autobot_llm.engine.batching.preemption import SwapSpace
from autobot_llm.engine.batching.retention import SlidingWindow
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.embedding import TextEmbedding
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.kv_cache.policy import CachePolicy, choose_policy
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.scoring import PromptScoring
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.errors import ConfigurationError

WINDOW = 7


def engine_with(
    device: FakeDevice, num_blocks: int, *, frees: bool, num_swap_blocks: int = 0, prefix_caching: bool = True
) -> Engine:
    """The model of fake_device.py looking back WINDOW tokens, with a context of 64."""
    pool = BlockPool(num_blocks, SIZE, prefix_caching=prefix_caching)
    device.pool, device.window = pool, WINDOW
    scheduler = Scheduler(
        pool,
        max_num_seqs=4,
        max_num_batched_tokens=10,
        max_model_len=64,
        scheduling_policy="priority",
        swap_space=SwapSpace(device, max_bytes=num_swap_blocks * 8, bytes_per_block=8) if num_swap_blocks else None,
        retention=SlidingWindow(CachePolicy(window=WINDOW, block_size=SIZE)) if frees else None,
    )
    return Engine(CONFIG, TOKENIZER, device, scheduler, Sampler(VOCAB_SIZE), bytes_per_block=8)


def answers(engine: Engine, arrivals: SequenceABC[Arrival], when: SequenceABC[int]) -> tuple[dict[object, object], int]:
    """What each choice got, and the most blocks that were held at once."""
    driver, most = Driver(engine), 0
    waiting = list(zip(when, range(len(arrivals)), strict=True))
    for step in range(2000):
        while waiting and waiting[0][0] <= step:
            _, number = waiting.pop(0)
            driver.add(number, arrivals[number].request())
        if not waiting and not engine.has_work:
            break
        driver.step()
        most = max(most, num_leaked_blocks(engine))
    assert not engine.has_work
    assert num_leaked_blocks(engine) == 0
    return {key: (driver.texts[key], end.num_tokens, end.end) for key, end in driver.ended.items()}, most


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_any_schedule_gives_the_answers_of_an_engine_that_keeps_everything(is_pipelined: bool) -> None:
    num_evicted = num_preemptions = num_swaps = num_hits = 0
    for seed in range(40):
        rng = random.Random(seed)
        arrivals = [
            Arrival(
                prefix=rng.randint(0, 1),
                num_shared=rng.randint(0, 30),
                own=tuple(rng.randint(20, 25) for _ in range(rng.randint(1, 5))),
                max_tokens=rng.randint(1, 25),
                num_choices=rng.choice([1, 1, 2]),
                temperature=rng.choice([0.0, 0.8]),
                priority=rng.randint(-1, 1),
            )
            for _ in range(6)
        ]
        when = sorted(rng.randint(0, 30) for _ in arrivals)
        prefix_caching = rng.random() < 0.7
        whole = engine_with(FakeDevice(400, SIZE), 400, frees=False, prefix_caching=False)
        num_blocks = rng.randint(5, 10)
        device = FakePipelinedDevice(num_blocks, SIZE) if is_pipelined else FakeDevice(num_blocks, SIZE)
        engine = engine_with(
            device, num_blocks, frees=True, num_swap_blocks=rng.choice([0, 30]), prefix_caching=prefix_caching
        )
        assert answers(engine, arrivals, when)[0] == answers(whole, arrivals, when)[0], seed
        if isinstance(device, FakePipelinedDevice):
            device.drain()
        for entry in engine.scheduler.block_pool._index.values():
            assert device.cache[device.slots(entry.block_id)] == array("q", entry.tokens).tolist()
        num_evicted += engine.scheduler.num_evicted_blocks
        num_preemptions += engine.scheduler.num_preemptions
        num_swaps += 0 if engine.scheduler.swap_space is None else engine.scheduler.swap_space.num_swaps
        num_hits += engine.scheduler.block_pool.num_hit_tokens
    assert num_evicted > 500 and num_preemptions > 20 and num_swaps > 5 and num_hits > 100


def test_a_long_sequence_holds_no_more_blocks_than_its_window_and_a_step_need() -> None:
    engine = engine_with(FakeDevice(6, SIZE), 6, frees=True)
    found, most = answers(engine, [Arrival(num_shared=40, max_tokens=20)], [0])
    assert found[0, 0][1] == 20  # type: ignore[index]
    assert most <= -(-(WINDOW - 1 + SIZE - 1 + 10) // SIZE)
    with pytest.raises(ConfigurationError, match="max_model_len=64 needs 5 KV cache blocks and there are 4"):
        engine_with(FakeDevice(4, SIZE), 4, frees=True)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_with_a_window_answers_as_transformers_does_beyond_it(tmp_path: Path, compiled: bool) -> None:
    """Five times the window, in a cache that holds less than two of it and a chunk."""
    theirs = write_random_model(tmp_path, "mistral", sliding_window=40)
    prompt = np.random.default_rng(0).integers(5, 8000, 180).tolist()
    engine = load_engine(small_options(tmp_path, compiled=compiled))
    driver = Driver(engine)
    driver.add(0, request(prompt, greedy(20, num_logprobs=0)))
    driver.run()
    assert engine.scheduler.num_evicted_blocks >= 9
    assert engine.scheduler.block_pool.num_blocks == -(-(40 - 1 + 15 + 32) // 16)
    with torch.inference_mode():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert driver.token_ids[0, 0] == expected[0, 180:].tolist()[: len(driver.token_ids[0, 0])]
    assert len(driver.token_ids[0, 0]) >= 10
    engine.close()


def small_options(folder: Path, *, compiled: bool) -> EngineOptions:
    """A cache of one sequence of full length, as it lets go: keys and values of 16 tokens are 12,288 bytes."""
    return EngineOptions(
        folder=folder,
        cache_dir=with_kernels(folder),
        device="cpu",
        compiled_step="on" if compiled else "off",
        max_num_batched_tokens=32,
        max_num_seqs=2,
        kv_cache_memory=6 * 16 * 2 * 3 * 2 * 16 * 4,
        cpu_threads=1,
    )


@pytest.mark.parametrize("compiled", [True, False])
def test_a_window_that_was_asked_for_frees_blocks_and_changes_nothing_else(tmp_path: Path, compiled: bool) -> None:
    """Beside an engine whose cache is as large as ever, with speculation and prefixes found again."""
    prompt = list(np.random.default_rng(1).integers(5, 8000, 40)) * 6
    options = {"kv_sliding_window": 64, "max_num_batched_tokens": 48, "max_num_seqs": 4}
    num_new = 24 if compiled else 8
    frees = tiny_engine(tmp_path, compiled=compiled, num_blocks=16, **options)
    keeps = tiny_engine(tmp_path, compiled=compiled, **options)
    keeps.scheduler.retention = Scheduler(
        BlockPool(4), max_num_seqs=1, max_num_batched_tokens=1, max_model_len=1
    ).retention
    found = []
    for engine in (frees, keeps):
        driver = Driver(engine)
        for number in range(3 if compiled else 1):
            driver.add(number, request(prompt[number:], greedy(num_new, num_logprobs=0)))
            driver.run()
        driver.add(3, request(prompt, greedy(num_new, num_logprobs=0)))
        driver.run()
        found.append((driver.token_ids, driver.texts))
        assert num_leaked_blocks(engine) == 0
        engine.close()
    assert found[0] == found[1]
    assert frees.scheduler.num_evicted_blocks > (30 if compiled else 10)
    assert keeps.scheduler.num_evicted_blocks == 0


def test_a_text_is_scored_and_embedded_in_a_cache_that_holds_a_part_of_it(tmp_path: Path) -> None:
    token_ids = np.random.default_rng(2).integers(5, 8000, 310).tolist()
    found = []
    for num_blocks in (21, 60):
        engine = tiny_engine(tmp_path, compiled=True, num_blocks=num_blocks, kv_sliding_window=32)
        scoring, embedding = PromptScoring(token_ids), TextEmbedding([token_ids])
        while not scoring.advance(engine):
            pass
        scoring.release(engine)
        while not embedding.advance(engine):
            pass
        assert num_leaked_blocks(engine) == 0
        found.append((scoring.logprobs, embedding.vectors[0].tolist()))
        engine.close()
    assert found[0] == found[1]


def test_a_window_no_narrower_than_the_context_is_none() -> None:
    config = load_config(TINY)
    for window in (320, 5000):
        changed, policy = choose_policy(config, sliding_window=window, heavy_hitters=0, max_model_len=320)
        assert policy == CachePolicy() and not policy.is_lossy
    changed, policy = choose_policy(config, sliding_window=64, heavy_hitters=0, max_model_len=320)
    assert set(changed.sliding_windows) == {64} and policy.window == 64 and policy.is_lossy
    assert list(policy.lines()) == ["a window of 64 tokens, lossy, because AUTOBOT_KV_SLIDING_WINDOW says so"]


def test_windows_of_some_layers_alone_free_nothing_and_lose_nothing() -> None:
    config = dataclasses.replace(load_config(TINY), sliding_windows=(0, 32) * 4)
    assert choose_policy(config, sliding_window=5000, heavy_hitters=0, max_model_len=320) == (config, CachePolicy())
    assert choose_policy(config, sliding_window=0, heavy_hitters=0, max_model_len=320) == (config, CachePolicy())
    config = dataclasses.replace(config, sliding_windows=(64, 32) * 4)
    _, policy = choose_policy(config, sliding_window=0, heavy_hitters=0, max_model_len=320)
    assert policy.window == 64 and not policy.is_lossy
    _, policy = choose_policy(config, sliding_window=48, heavy_hitters=0, max_model_len=320)
    assert policy.window == 48 and policy.is_lossy


@pytest.mark.parametrize("window", [1, 15])
def test_a_window_smaller_than_a_block_is_refused_with_what_is_accepted(window: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"AUTOBOT_KV_SLIDING_WINDOW={window}: expected 0 .* at least the 16"):
        choose_policy(load_config(TINY), sliding_window=window, heavy_hitters=0, max_model_len=320)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_trees_of_guesses_under_a_window_change_no_answer(tmp_path: Path, compiled: bool, kv_cache_dtype: str) -> None:
    """A tree's tokens lie behind what was let go, see as far back as their path does, and read what was rounded."""
    prompt = np.random.default_rng(6).integers(5, 8000, 150).tolist()
    options = {"kv_sliding_window": 32, "max_num_batched_tokens": 128, "kv_cache_dtype": kv_cache_dtype}
    engine = tiny_engine(tmp_path, compiled=compiled, **options, speculation=SpeculationOptions(method="none"))
    num_new = 60 if compiled else 30
    driver = Driver(engine)
    driver.add(0, request(prompt, greedy(num_new, num_logprobs=0)))
    driver.run()
    guesser = TreeGuesser({tuple(prompt): driver.token_ids[0, 0]}, 3, engine.config.vocab_size)
    engine.speculator = Speculator(63, make_free=lambda _: guesser, policy=Always(63), clock=lambda: 0.0)
    num_steps = engine.num_steps
    driver.add(1, request(prompt, greedy(num_new)))
    driver.run()
    assert driver.texts[1, 0] == driver.texts[0, 0]
    assert guesser.num_trees > 2 and engine.num_steps - num_steps < num_steps
    assert engine.scheduler.num_evicted_blocks > 8
    assert num_leaked_blocks(engine) == 0
    engine.close()
