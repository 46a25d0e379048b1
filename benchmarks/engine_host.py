"""What the host does for each generated token, beside a device that costs nothing.

The real scheduler, batch building, sampling arrays, detokenizer (of the embedded model) and service threads, over an
executor that answers at once with tokens of a text. Everybody decodes: `--batch` sequences, each after `--context`
tokens. Prints microseconds of processor time per token by part, and one JSON line at the end. None of it delays a
token while a device's step takes longer than the host's.

    python benchmarks/engine_host.py
    python benchmarks/engine_host.py --batch 32 --context 16000 --drawn
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autobot_llm.engine.batching.plan import BatchBuilder, StepBatch, StepPlan
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import SampledRows, SamplingArrays
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sampler import Sampler, SamplingArraysBuilder
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.service import EngineService
from autobot_llm.engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
TEXT = Path(__file__).parent / "data" / "dev_prompts.jsonl"
NUM_STEPS = 160  # of one measurement: ten new blocks for each sequence
PARTS = ("plan", "batch", "sampling arrays", "advance", "resolve")


class FreeStep(NamedTuple):
    rows: SampledRows

    def wait(self) -> SampledRows:
        return self.rows


class FreeDevice:
    """PipelinedExecutor that takes no time. The tokens of a step are neighbours in a text."""

    name = "free"
    reason = "a benchmark of the host"

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._start = 0

    def execute(self, batch: StepBatch) -> torch.Tensor:
        raise NotImplementedError("every request of this benchmark is sampled by the device")

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> FreeStep:
        num_rows = len(batch.logit_rows_R)
        self._start = (self._start + 1) % (len(self._token_ids) - num_rows)
        return FreeStep(SampledRows(self._token_ids[self._start : self._start + num_rows], [1.0] * num_rows))

    def discard(self, block_ids: list[int]) -> None:
        raise NotImplementedError("nothing fails here")

    def close(self) -> None:
        """Nothing to release."""


class HostBenchmark:
    def __init__(self, *, batch: int, context: int, is_drawn: bool) -> None:
        self.batch, self.context, self.is_drawn = batch, context, is_drawn
        self.config = load_config(MODEL)
        self.tokenizer = Tokenizer.from_folder(MODEL)
        self.text_ids = self.tokenizer.encode(TEXT.read_text()[:40_000], add_special_tokens=False)

    def scheduler(self) -> Scheduler:
        max_model_len = self.context + 4 * NUM_STEPS
        return Scheduler(
            BlockPool(self.batch * (max_model_len // BLOCK_SIZE + 2), BLOCK_SIZE),
            max_num_seqs=self.batch,
            max_num_batched_tokens=self.batch * self.context,
            max_model_len=max_model_len,
        )

    def engine(self) -> Engine:
        vocab_size = self.config.vocab_size
        device = FreeDevice(self.text_ids)
        return Engine(self.config, self.tokenizer, device, self.scheduler(), Sampler(vocab_size), bytes_per_block=1)

    def params(self, seed: int, max_tokens: int) -> SamplingParams:
        if self.is_drawn:
            return SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.7, top_p=0.9)
        return SamplingParams(max_tokens=max_tokens, temperature=0.0)

    def prompt(self, i: int) -> list[int]:
        return [5 + i % 200] * self.context

    def parts_us(self) -> dict[str, float]:
        """Each part of a step on its own, in the engine's order, one step under way."""
        scheduler, arrays = self.scheduler(), SamplingArraysBuilder(self.config.vocab_size)
        batches = BatchBuilder(BLOCK_SIZE)
        for i in range(self.batch):
            scheduler.add(Sequence(i, self.prompt(i), self.params(i, 4 * NUM_STEPS)))
        device, clock = FreeDevice(self.text_ids), time.thread_time
        previous: tuple[StepPlan, FreeStep] | None = None
        spent = dict.fromkeys(PARTS, 0.0)
        for i in range(NUM_STEPS + 3):
            start = clock()
            plan = scheduler.plan()
            planned = clock()
            assert plan is not None
            batch = batches.build(plan)
            built = clock()
            sampling = arrays.build([item.sequence for item in plan.scheduled if item.samples])
            described = clock()
            launched = device.launch(batch, sampling)
            at_launch = clock()
            scheduler.advance(plan)
            advanced = clock()
            if previous is not None:
                scheduler.resolve(previous[0], previous[1].wait().tokens)
            resolved = clock()
            previous = (plan, launched)
            if i >= 3:  # they decode
                times = (planned - start, built - planned, described - built, advanced - at_launch, resolved - advanced)
                for name, seconds in zip(PARTS, times, strict=True):
                    spent[name] += seconds
        return {name: seconds * 1e6 / NUM_STEPS / self.batch for name, seconds in spent.items()}

    def engine_us(self) -> float:
        """A whole step of the engine, text included."""
        engine = self.engine()
        for i in range(self.batch):
            engine.add(i, EngineRequest(self.prompt(i), (self.params(i, 4 * NUM_STEPS),)), RequestStats())
        for _ in range(3):
            engine.step()
        start = time.thread_time()
        for _ in range(NUM_STEPS):
            engine.step()
        return (time.thread_time() - start) * 1e6 / NUM_STEPS / self.batch

    def served_us(self) -> float:
        """The same through the service: the device thread, the event loop, and a reader for each request."""
        return asyncio.run(self._serve(3 * NUM_STEPS)) * 1e6 / (3 * NUM_STEPS) / self.batch

    async def _serve(self, max_tokens: int) -> float:
        """Processor seconds of the whole process from the first token to the last; all prompts are one step."""
        service = EngineService(self.engine, max_queued_requests=self.batch)
        await service.start()
        start_times: list[float] = []

        async def read(i: int) -> None:
            with service.submit(EngineRequest(self.prompt(i), (self.params(i, max_tokens),))) as handle:
                await handle.next_outputs()
                start_times.append(time.process_time())
                while handle.is_open:
                    await handle.next_outputs()

        await asyncio.gather(*(read(i) for i in range(self.batch)))
        seconds = time.process_time() - max(start_times)
        await service.close()
        return seconds

    def run(self, rounds: int) -> dict[str, float]:
        """The median of some rounds, by part."""
        parts = [self.parts_us() for _ in range(rounds)]
        figures = {name: statistics.median(part[name] for part in parts) for name in PARTS}
        in_step = _median(self.engine_us, rounds)
        served = _median(self.served_us, rounds)
        figures["text and outputs"] = in_step - sum(figures.values())
        figures["delivery and reading"] = served - in_step
        return figures | {"total": served}


def _median(measure: Callable[[], float], rounds: int) -> float:
    return statistics.median(measure() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="sequences that decode")
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--drawn", action="store_true", help="temperature and top-p instead of greedy")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures = HostBenchmark(batch=options.batch, context=options.context, is_drawn=options.drawn).run(options.rounds)
    for name, microseconds in figures.items():
        print(f"{name:>22} {microseconds:7.2f} us/token")
    result: dict[str, Any] = {
        "benchmark": "engine_host",
        "batch": options.batch,
        "context": options.context,
        "drawn": options.drawn,
        "us_per_token": {name: round(value, 2) for name, value in figures.items()},
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
