"""Windows on a CUDA device: blocks are given back, and every token is one that an engine without eviction would choose.
`make test-gpu`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from answers import OPTIONS, TINY, Answer
from reference import Reference

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.errors import ConfigurationError

pytestmark = pytest.mark.gpu

WINDOW = 72  # no whole number of blocks
NUM_PROMPT_TOKENS = (20, 120, 330)  # less than the window, more, and more than a chunk of a prompt may have
NUM_NEW_TOKENS = 160


@pytest.fixture(scope="module")
def reference_with_window() -> Reference:
    return Reference(window=WINDOW)


def continued(engine: Engine) -> tuple[list[Answer], int]:
    """Greedy answers to prompts of a real text, side by side, and the most blocks that one holds when it is far on."""
    ids = engine.tokenizer.encode((TINY / "MODEL_CARD.md").read_text(), add_special_tokens=False)
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, stop_token_ids=frozenset())
    for number, length in enumerate(NUM_PROMPT_TOKENS):
        engine.add(number, EngineRequest(ids[number * 50 :][:length], (params,)), RequestStats())
    pool, found, most_held = engine.scheduler.block_pool, dict[int, Sequence](), 0
    while engine.has_work:
        assert all(output.error is None for output in engine.step())
        found |= engine.scheduler._running
        far = (s for s in engine.scheduler._running.values() if s.num_computed_tokens > s.num_prompt_tokens + WINDOW)
        most_held = max(most_held, *(len(s.block_ids) for s in far), 0)
    assert pool.num_free == pool.num_blocks
    return [Answer(s.token_ids[: s.num_prompt_tokens], s.output_ids, params) for s in found.values()], most_held


@pytest.mark.parametrize(
    ("kv_cache_dtype", "drafts", "largest"),
    [("auto", False, 0.5), ("int8", False, 0.8), ("auto", True, 0.5)],
    ids=["plain", "int8", "drafts"],
)
def test_what_leaves_the_cache_is_what_no_layer_looks_back_to(
    reference: Reference, reference_with_window: Reference, kv_cache_dtype: str, drafts: bool, largest: float
) -> None:
    engine = load_engine(
        dataclasses.replace(OPTIONS, kv_sliding_window=WINDOW, kv_cache_dtype=kv_cache_dtype)  # type: ignore[arg-type]
    )
    if drafts:
        engine.speculator = Speculator(4, make_free=NgramProposer, policy=Always(4), clock=lambda: 0.0)
    try:
        found, most_held = continued(engine)
        num_evicted = engine.scheduler.num_evicted_blocks
    finally:
        engine.close()
    assert [len(one.prompt_ids) for one in found] == list(NUM_PROMPT_TOKENS)
    assert num_evicted > 30
    assert 0 < most_held <= 7, "72 tokens, the rest of a block and what a step brings"
    with_window = torch.cat([reference_with_window.gaps(one) for one in found])
    without = torch.cat([reference.gaps(one) for one in found])
    assert len(with_window) == len(found) * NUM_NEW_TOKENS
    assert with_window.max() < largest, "near-ties of bfloat16 alone may part"
    assert (with_window > 0).sum() < 0.1 * len(with_window)
    assert without.max() > 2 * with_window.max(), "the window changes what is said"


def test_a_window_that_a_tree_of_guesses_would_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="SLIDING_WINDOW=48: on a GPU expected 0, or at least the 64"):
        load_engine(dataclasses.replace(OPTIONS, kv_sliding_window=48))


def test_heavy_hitters_are_refused_with_what_there_is_instead() -> None:
    with pytest.raises(ConfigurationError, match=r"AUTOBOT_KV_HEAVY_HITTERS=0\.5: .*SLIDING_WINDOW.*int8.*DEVICE=cpu"):
        load_engine(dataclasses.replace(OPTIONS, kv_heavy_hitters=0.5))
