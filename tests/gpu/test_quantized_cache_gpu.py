"""An engine whose keys and values take one byte a number: what it answers, and what that costs. `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.scoring import PromptScoring
from autobot_llm.engine.sequence import SamplingParams

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TINY = ROOT / "src" / "autobot_llm" / "assets" / "tiny"
CACHE_MEMORY = 64 * 2**20


def engine_of(tmp_path: Path, kv_cache_dtype: str) -> Engine:
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    return load_engine(
        EngineOptions(
            folder=TINY,
            cache_dir=tmp_path,
            device="cuda",
            kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
            kv_cache_memory=CACHE_MEMORY,
        )
    )


def answer(engine: Engine, prompt_ids: list[int]) -> str:
    engine.add(0, EngineRequest(prompt_ids, (SamplingParams(max_tokens=200, temperature=0.0),)), RequestStats())
    text = ""
    while engine.has_work:
        text += "".join(output.text for output in engine.step())
    return text


def mean_logprob(engine: Engine, token_ids: list[int]) -> float:
    scoring = PromptScoring(token_ids)
    while not scoring.advance(engine):
        pass
    scoring.release(engine)
    return sum(scoring.logprobs) / len(scoring.logprobs)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_rounded_keys_and_values_hold_twice_as_much_and_change_a_texts_likelihood_little(
    tmp_path: Path, kv_cache_dtype: str
) -> None:
    plain, rounded = engine_of(tmp_path, "auto"), engine_of(tmp_path, kv_cache_dtype)
    assert rounded.scheduler.block_pool.num_blocks > 1.9 * plain.scheduler.block_pool.num_blocks
    text = answer(plain, plain.tokenizer.encode("Once upon a time", add_special_tokens=False)) * 4
    token_ids = plain.tokenizer.encode(text, add_special_tokens=False)[:700]
    expected, got = mean_logprob(plain, token_ids), mean_logprob(rounded, token_ids)
    assert abs(got - expected) < 0.03 and got != expected


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_rounded_cache_answers_and_finds_prefixes_again(tmp_path: Path, kv_cache_dtype: str) -> None:
    engine = engine_of(tmp_path, kv_cache_dtype)
    prompt_ids = engine.tokenizer.encode("Once upon a time there was a little girl. " * 6, add_special_tokens=False)
    first, again = answer(engine, prompt_ids), answer(engine, prompt_ids)
    assert len(first) > 100 and again[:20] == first[:20]  # a found prefix is read back rounded, a computed one is not
    pool = engine.scheduler.block_pool
    assert pool.num_free == pool.num_blocks
