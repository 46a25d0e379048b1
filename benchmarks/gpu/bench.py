"""What the sections share: the engine under test, prompts, and one timed generation. Knows the engine's interface."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.providers.native.provider import engine_options
from autobot_llm.settings import load_settings

EMBEDDED = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"
PROMPTS = Path(__file__).parents[1] / "data" / "dev_prompts.jsonl"


class MissingModelError(Exception):
    """A section needs a model folder that the command line does not name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """One batch from its first request to its last token. `peak_cache_bytes` counts the blocks in use."""

    seconds: float
    num_tokens: int
    num_preemptions: int
    peak_cache_bytes: int


class Bench:
    """The command line's choices and at most one engine at a time: two models of 14 GB with their caches do not fit."""

    def __init__(
        self,
        *,
        random_model: Path | None,
        widened_model: Path | None,
        device: str,
        quick: bool,
        kv_cache_dtype: str = "auto",
        quantizations: Sequence[str] = (),
    ) -> None:
        self.quick = quick
        self.quantizations = quantizations
        self.device = device
        self._kv_cache_dtype = kv_cache_dtype
        self._cache_dir = load_settings(env_file=None).cache_dir
        self._random_model = random_model
        self._widened_model = widened_model
        self._engine: Engine | None = None
        self._engine_options: EngineOptions | None = None

    @property
    def random_model(self) -> Path:
        if self._random_model is None:
            raise MissingModelError("needs --random DIR (made by benchmarks/random_model.py)")
        return self._random_model

    @property
    def widened_model(self) -> Path:
        if self._widened_model is None:
            raise MissingModelError("needs --widened DIR (made by benchmarks/widen.py)")
        return self._widened_model

    @property
    def has_widened_model(self) -> bool:
        return self._widened_model is not None

    @cached_property
    def is_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    @cached_property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.is_cuda else "CPU"

    @cached_property
    def read_bandwidth(self) -> float | None:
        """Bytes per second that the device reads, measured now: asked for before an engine takes the memory. None for
        a CPU."""
        if not self.is_cuda:
            return None
        from gpu.bandwidth import measured_read_bandwidth

        bandwidth = measured_read_bandwidth(torch.device("cuda"))
        self.free_device_memory()
        return bandwidth

    def options(self, folder: Path, *, quantization: str = "none", **settings: object) -> EngineOptions:
        """The engine's options as `serve` would set them where no AUTOBOT_ variable is, with some settings changed."""
        overrides = {
            "device": self.device,
            "cache_dir": self._cache_dir,
            "kv_cache_dtype": self._kv_cache_dtype,
            **settings,
        }
        options = engine_options(load_settings(environ={}, env_file=None, overrides=overrides), folder)
        return dataclasses.replace(options, quantization=QuantizationType.from_setting(quantization))

    def engine(self, folder: Path, *, quantization: str = "none", **settings: object) -> Engine:
        """An engine of the options; the one in use, if it has them, else a new one in its place."""
        options = self.options(folder, quantization=quantization, **settings)
        if self._engine is None or self._engine_options != options:
            self.release()
            self._engine, self._engine_options = load_engine(options), options
            gc.collect()
            gc.freeze()  # as `serve` does
        return self._engine

    def release(self) -> None:
        """Free the engine in use and the device's memory."""
        if self._engine is not None:
            self._engine.executor.close()
        self._engine = self._engine_options = None
        gc.unfreeze()
        self.free_device_memory()

    def free_device_memory(self) -> None:
        """Return what no object holds any more, and begin to count the peak anew."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory_needed(self, engine: Engine, peak_cache_bytes: int) -> float | None:
        """Peak bytes on the device, with the cache counted as used and not as reserved."""
        if not self.is_cuda:
            return None
        pool = engine.scheduler.block_pool
        return torch.cuda.max_memory_allocated() - pool.num_blocks * engine.bytes_per_block + peak_cache_bytes


def random_prompts(config: ModelConfig, count: int, num_tokens: int, rng: random.Random) -> list[list[int]]:
    """Prompts that share nothing."""
    return [rng.choices(range(config.vocab_size), k=num_tokens) for _ in range(count)]


def greedy_request(prompt_ids: list[int], num_tokens: int, *, salt: str = "") -> EngineRequest:
    """A request for exactly so many tokens: without stop tokens, end-of-sequence ends nothing."""
    return EngineRequest(
        prompt_ids=prompt_ids, params=(SamplingParams(max_tokens=num_tokens, temperature=0.0),), salt=salt
    )


def generate(
    engine: Engine, prompts: Sequence[list[int]], num_tokens: int | Sequence[int], salt: str = ""
) -> Generation:
    """Time a batch, all of it added at once, until its last token is there. Raises what ended a request early."""
    lengths = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    requests = [greedy_request(*pair, salt=salt) for pair in zip(prompts, lengths, strict=True)]
    stats = [RequestStats() for _ in requests]
    num_generated, num_ended, peak_cache_bytes = 0, 0, 0
    start = time.perf_counter()
    for i, request in enumerate(requests):
        engine.add(i, request, stats[i])
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            if output.end is not None:
                num_ended += 1
                num_generated += output.num_tokens
        peak_cache_bytes = max(peak_cache_bytes, engine.kv_cache_bytes)
    seconds = time.perf_counter() - start
    if num_ended != len(requests) or num_generated != sum(lengths):
        raise RuntimeError(f"{num_generated} tokens in {num_ended} answers: expected {sum(lengths)} in {len(requests)}")
    return Generation(seconds, num_generated, sum(one.num_preemptions for one in stats), peak_cache_bytes)


def stored_weight_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor in a model folder, from the headers of its safetensors files."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                sizes[name] = stop - start
    if not sizes:
        raise FileNotFoundError(f"{folder}: no safetensors file")
    return sizes


def weight_bytes_read_per_step(folder: Path) -> int:
    """Every weight once, but of the input embedding only a row per token, unless it is the output head as well."""
    sizes = stored_weight_bytes(folder)
    tied = load_config(folder).tie_word_embeddings
    return sum(size for name, size in sizes.items() if tied or "embed_tokens" not in name)


def real_texts(category: str) -> list[str]:
    """The prompts of one category of benchmarks/data/dev_prompts.jsonl, messages joined."""
    records = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return [
        record["prompt"] if "prompt" in record else "\n".join(message["content"] for message in record["messages"])
        for record in records
        if record["category"] == category
    ]
