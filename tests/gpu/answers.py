"""What the tests ask of engines on a GPU, and what they get: tokens, to be judged by reference.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceABC
from pathlib import Path
from typing import NamedTuple

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence

TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"
OPTIONS = EngineOptions(folder=TINY, cache_dir=Path("unused"), device="cuda", max_model_len=512)
GREEDY = SamplingParams(max_tokens=48, temperature=0.0)
DRAWN = SamplingParams(max_tokens=48, temperature=0.8, top_p=0.9)
TEXTS = (
    "Once upon a time there was a small fox",
    "The capital of France is",
    "def add(a, b):",
    "Dear Sir, I write to you because",
    "In the beginning of the year the weather was",
)


class Answer(NamedTuple):
    """What was generated after a prompt, and how it was to be chosen."""

    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams


def answers(
    engine: Engine,
    params: SamplingParams,
    *,
    together: bool = True,
    repeat: int = 1,
    texts: SequenceABC[str] = TEXTS,
) -> list[Answer]:
    """Those to all prompts, in one batch or one after the other; every block is free afterwards."""
    sequences: list[Sequence] = []

    def drain() -> None:
        while engine.has_work:
            assert all(output.error is None for output in engine.step())

    for i, text in enumerate(texts):
        prompt_ids = (engine.tokenizer.encode(text, add_special_tokens=False) * repeat)[:400]
        one = dataclasses.replace(params, seed=i)
        engine.add(i, EngineRequest(prompt_ids, (one,), salt=f"{together}{repeat}"), RequestStats())
        sequences.append(engine._requests[i][0].sequence)
        if not together:
            drain()
    drain()
    pool = engine.scheduler.block_pool
    assert pool.num_free == pool.num_blocks
    return [Answer(s.token_ids[: s.num_prompt_tokens], s.output_ids[: params.max_tokens], s.params) for s in sequences]
