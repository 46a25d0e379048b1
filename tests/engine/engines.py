"""Engines and requests for the tests, small enough to make many of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest, Output, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.settings.registry import user_cache_dir

TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"
MAX_MODEL_LEN = 320
KERNELS = user_cache_dir(os.environ) / "kernels"  # as in conftest.py: before a test has a cache folder of its own
BLOCK_BYTES = 2 * 8 * 2 * 64 * 16 * 4  # keys and values, layers, heads, head size, tokens, float32


def with_kernels(cache_dir: Path) -> Path:
    """The folder, where the compiled step is now found that is made once for all tests."""
    if not (link := cache_dir / "kernels").exists():
        KERNELS.mkdir(parents=True, exist_ok=True)
        link.symlink_to(KERNELS)
    return cache_dir


def tiny_engine(
    cache_dir: Path, *, compiled: bool, num_blocks: int = 400, prefix_caching: bool = True, **options: int
) -> Engine:
    """The embedded model with a context of 320 tokens and a cache of `num_blocks`."""
    return load_engine(
        dataclasses.replace(
            EngineOptions(
                folder=TINY,
                cache_dir=with_kernels(cache_dir),
                device="cpu",
                compiled_step="on" if compiled else "off",
                prefix_caching=prefix_caching,
                max_model_len=MAX_MODEL_LEN,
                kv_cache_memory=num_blocks * BLOCK_BYTES,
                cpu_threads=2,
            ),
            **options,
        )
    )


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    return dataclasses.replace(SamplingParams(max_tokens=max_tokens, temperature=0.0), **more)


def request(prompt_ids: list[int], *params: SamplingParams, salt: str = "") -> EngineRequest:
    return EngineRequest(prompt_ids=prompt_ids, params=params, salt=salt)


class Driver:
    """Steps an engine by hand and keeps what comes out, by request and choice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.texts: dict[tuple[int, int], str] = {}
        self.token_ids: dict[tuple[int, int], list[int]] = {}
        self.logprobs: dict[tuple[int, int], list[float]] = {}
        self.gaps: dict[tuple[int, int], list[float]] = {}
        self.ended: dict[tuple[int, int], Output] = {}

    def add(self, request_id: int, one: EngineRequest) -> RequestStats:
        stats = RequestStats()
        self.engine.add(request_id, one, stats)
        return stats

    def step(self) -> None:
        for output in self.engine.step():
            key = (output.request_id, output.index)
            self.texts[key] = self.texts.get(key, "") + output.text
            for info in output.logprobs:
                self.token_ids.setdefault(key, []).append(info.token_id)
                self.logprobs.setdefault(key, []).append(info.logprob)
                if len(info.top) > 1:
                    self.gaps.setdefault(key, []).append(info.top[0][1] - info.top[1][1])
            if output.end is not None or output.error is not None:
                self.ended[key] = output

    def run(self) -> None:
        while self.engine.has_work:
            self.step()


def num_leaked_blocks(engine: Engine) -> int:
    pool = engine.scheduler.block_pool
    return pool.num_blocks - pool.num_free
