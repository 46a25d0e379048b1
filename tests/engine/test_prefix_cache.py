"""Warmed prefixes: found by whom they were warmed for, kept while others are overwritten, and never too many."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import MAX_MODEL_LEN, Driver, greedy, num_leaked_blocks, request, tiny_engine

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import Executor
from autobot_llm.engine.kv_cache.prefix_cache import CACHED_PREFIXES, PrefixCacheManager, prefix_ids
from autobot_llm.errors import ConfigurationError, EngineError

SYSTEM = "You are a patient storyteller. You tell short stories about animals, and every story ends well. " * 2
OTHER = "You answer questions about the history of science, in one sentence, and name the year. " * 2


@pytest.fixture
def make_engine(tmp_path: Path) -> Callable[..., Engine]:
    def make(num_blocks: int = 100, **options: bool) -> Engine:
        return tiny_engine(tmp_path, compiled=False, num_blocks=num_blocks, **options)

    return make


class Turn:
    """A message of a conversation."""

    def __init__(self, role: str, content: str) -> None:
        self.role, self.content = role, content
        self.name = self.tool_calls = self.tool_call_id = self.reasoning_content = None


def conversation(engine: Engine, system: str, question: str) -> list[int]:
    return engine.tokenizer.encode_chat([Turn("system", system), Turn("user", question)])


def num_cached_tokens(engine: Engine, token_ids: list[int], salt: str = "", max_tokens: int = 2) -> int:
    driver = Driver(engine)
    stats = driver.add(1, request(token_ids, greedy(max_tokens), salt=salt))
    driver.run()
    return stats.num_cached_tokens


def fill_the_cache(engine: Engine) -> None:
    """Take every block that can be had, as long prompts of others would, and give it back."""
    pool = engine.scheduler.block_pool
    block_ids = pool.allocate(pool.num_free)
    assert block_ids is not None
    pool.free(block_ids)


def test_there_is_no_default_prefix(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    assert PrefixCacheManager.CACHED_PREFIXES == CACHED_PREFIXES == ()
    assert PrefixCacheManager(engine).warm() == 0
    assert engine.num_steps == 0


def test_the_first_conversation_with_a_warmed_prompt_finds_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    num_warmed = PrefixCacheManager(engine, [SYSTEM]).warm()
    assert num_warmed == len(prefix_ids(engine.tokenizer, SYSTEM)) // 16 * 16 > 32
    for question in ("What is a fox?", "1 + 1?", "\n\nTell me a story", "Ä"):
        assert num_cached_tokens(engine, conversation(engine, SYSTEM, question)) >= num_warmed


def test_an_answer_after_warming_is_the_answer_without_it(make_engine: Callable[..., Engine]) -> None:
    texts = []
    for prefixes in ([SYSTEM], []):
        engine = make_engine()
        PrefixCacheManager(engine, prefixes).warm()
        driver = Driver(engine)
        driver.add(1, request(conversation(engine, SYSTEM, "Tell me about a fox."), greedy(12)))
        driver.run()
        texts.append(driver.texts[1, 0])
    assert texts[0] == texts[1] != ""


def test_a_warmed_prefix_outlives_the_use_of_the_whole_cache_until_it_is_unpinned(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    manager = PrefixCacheManager(engine, [SYSTEM, OTHER])
    manager.warm()
    fill_the_cache(engine)
    for text in (SYSTEM, OTHER):
        assert num_cached_tokens(engine, conversation(engine, text, "Who?")) > 0
    manager.unpin(OTHER)
    fill_the_cache(engine)
    assert num_cached_tokens(engine, conversation(engine, OTHER, "Who?")) == 0
    assert num_cached_tokens(engine, conversation(engine, SYSTEM, "Who?")) > 0
    manager.unpin()
    assert num_leaked_blocks(engine) == 0
    fill_the_cache(engine)
    assert num_cached_tokens(engine, conversation(engine, SYSTEM, "Who?")) == 0


def test_a_tenant_finds_only_what_was_warmed_for_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    manager = PrefixCacheManager(engine, [SYSTEM])
    num_warmed = manager.warm(["alice", "bob"])
    prompt = conversation(engine, SYSTEM, "Who?")
    assert num_cached_tokens(engine, prompt, "alice") == num_cached_tokens(engine, prompt, "bob") == num_warmed // 2
    assert num_cached_tokens(engine, prompt, "carol") == 0
    assert {prefix.salt for prefix in manager.get_prefix_cache_config().warmed} == {"alice", "bob"}


def test_prefixes_with_the_same_beginning_share_its_blocks(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    both = PrefixCacheManager(engine, [SYSTEM, SYSTEM + OTHER])
    num_warmed = both.warm()
    num_tokens = len(prefix_ids(engine.tokenizer, SYSTEM + OTHER)) // 16 * 16
    assert num_warmed <= num_tokens + 16, "they differ in the block where the shorter one ends"
    both.unpin(SYSTEM)
    fill_the_cache(engine)
    assert num_cached_tokens(engine, conversation(engine, SYSTEM + OTHER, "Who?")) == num_tokens


def test_warming_again_computes_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    manager = PrefixCacheManager(engine, [SYSTEM])
    assert manager.warm() > 0
    num_steps, num_leaked = engine.num_steps, num_leaked_blocks(engine)
    assert manager.warm() == 0
    assert (engine.num_steps, num_leaked_blocks(engine)) == (num_steps, num_leaked)


def test_warming_is_no_hit_and_no_miss(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    PrefixCacheManager(engine, [SYSTEM, SYSTEM + OTHER]).warm()
    pool = engine.scheduler.block_pool
    assert (pool.num_query_tokens, pool.num_hit_tokens) == (0, 0)


def test_more_than_half_of_the_cache_is_refused_before_anything_is_computed(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(num_blocks=60)
    texts = [f"{i}. {SYSTEM}" for i in range(12)]
    manager = PrefixCacheManager(engine, texts)
    with pytest.raises(ConfigurationError, match=r"of its 960 at most 480 may: name fewer .* AUTOBOT_KV_CACHE_MEMORY"):
        manager.warm()
    assert (engine.num_steps, num_leaked_blocks(engine)) == (0, 0)
    two = PrefixCacheManager(engine, texts[:2])
    two.warm(["a", "b"])
    with pytest.raises(ConfigurationError, match="each of 10 tenants has its own copy"):
        two.warm(map(str, range(10)))


def test_a_sequence_of_full_length_always_fits_beside_what_is_pinned(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(num_blocks=24)  # 20 of them for a sequence of full length
    manager = PrefixCacheManager(engine, [SYSTEM + OTHER])
    assert manager.max_pinned_blocks == 4
    with pytest.raises(ConfigurationError, match="at most 64 may"):
        manager.warm()
    assert 0 < PrefixCacheManager(engine, [SYSTEM]).warm() <= 64
    driver = Driver(engine)
    driver.add(1, request([7] * (MAX_MODEL_LEN - 20), greedy(20), salt="stranger"))
    driver.run()
    assert driver.ended[1, 0].num_tokens == 20
    assert num_cached_tokens(engine, conversation(engine, SYSTEM, "Who?")) > 0


def test_a_prefix_longer_than_the_context_is_refused_by_its_beginning(make_engine: Callable[..., Engine]) -> None:
    manager = PrefixCacheManager(make_engine(), ["A long text. " * 200])
    with pytest.raises(ConfigurationError, match=r"'A long text\. .*\.\.\.' has [\d,]+ tokens: expected fewer than"):
        manager.warm()


def test_prefixes_without_prefix_caching_are_refused(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigurationError, match="AUTOBOT_PREFIX_CACHING is false"):
        PrefixCacheManager(make_engine(prefix_caching=False), [SYSTEM])


def test_the_configuration_tells_what_is_pinned(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    manager = PrefixCacheManager(engine, [SYSTEM])
    cold = manager.get_prefix_cache_config()
    assert (cold.enabled, cold.is_salted, cold.block_size, cold.num_cache_tokens) == (True, True, 16, 1600)
    assert (cold.max_pinned_tokens, cold.num_pinned_tokens, cold.warmed) == (800, 0, ())
    num_warmed = manager.warm()
    num_cached_tokens(engine, conversation(engine, SYSTEM, "Who?"))
    warm = manager.get_prefix_cache_config()
    assert warm.num_pinned_tokens == num_warmed
    assert [(one.text, one.salt, one.num_tokens) for one in warm.warmed] == [(SYSTEM, "", num_warmed)]
    assert 0.5 < warm.hit_rate < 1


class FaultyExecutor:
    """Runs the real steps; `spoil` may change their logits."""

    def __init__(self, inner: Executor, spoil: Callable[[torch.Tensor], None]) -> None:
        self._inner, self._spoil = inner, spoil
        self.name, self.reason = inner.name, inner.reason

    def execute(self, batch: StepBatch) -> torch.Tensor:
        logits_RV = self._inner.execute(batch)
        self._spoil(logits_RV)
        return logits_RV

    def discard(self, block_ids: list[int]) -> None:
        self._inner.discard(block_ids)

    def close(self) -> None:
        self._inner.close()


def test_what_a_broken_answer_made_suspect_is_not_kept_and_can_be_warmed_again(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    manager = PrefixCacheManager(engine, [SYSTEM])
    num_warmed = manager.warm()
    broken = threading.Event()
    engine.executor = FaultyExecutor(
        engine.executor, lambda logits_RV: logits_RV.fill_(float("nan")) if broken.is_set() else None
    )
    broken.set()
    driver = Driver(engine)
    driver.add(1, request(conversation(engine, SYSTEM, "Who?"), greedy(5)))
    driver.run()
    assert isinstance(driver.ended[1, 0].error, EngineError)
    config = manager.get_prefix_cache_config()
    assert config.num_pinned_tokens == sum(one.num_tokens for one in config.warmed) == 0
    assert num_leaked_blocks(engine) == 0
    with pytest.raises(EngineError):
        manager.warm()
    assert num_leaked_blocks(engine) == 0 and not engine.has_work
    broken.clear()
    assert manager.warm() == num_warmed
    assert num_cached_tokens(engine, conversation(engine, SYSTEM, "Who?")) >= num_warmed
