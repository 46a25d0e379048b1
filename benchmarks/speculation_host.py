"""What the host does from the tokens of a step with drafts to the next launches, beside a device that costs nothing.

The real engine, scheduler, speculator, draft model, arrays of steps and of chains, and detokenizer (of the embedded
model), over executors that answer at once. A draft model guesses `--num-tokens` tokens of every sequence, three of
them right; with `--auto` the controller chooses between it and n-grams. Prints medians in microseconds from the moment
that a step's tokens are there to the launch of the drafts, where they were not launched before, to that of the step
that verifies them, and to the end of the call; and one JSON line.

    python benchmarks/speculation_host.py
    python benchmarks/speculation_host.py --batch 8 --auto --profile
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, full_load
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import Features, SampledRows, SamplingArrays, Unverified
from autobot_llm.engine.gpu.chains import ChainGraphs
from autobot_llm.engine.gpu.graph_sizes import MAX_ROWS
from autobot_llm.engine.gpu.options import GpuLimits
from autobot_llm.engine.gpu.step_graphs import StepGraphs
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.measurements import ON_GPU
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
TEXT = Path(__file__).parent / "data" / "dev_prompts.jsonl"
NUM_PROCESSORS = 132
MAX_MODEL_LEN = 4096
RIGHT = 3  # tokens of each draft


@dataclass
class Times:
    """When things of the step at hand happened."""

    tokens: float = 0.0
    gaps: dict[str, list[float]] = field(default_factory=lambda: {"drafts": [], "step": [], "call": []})

    def note(self, name: str) -> None:
        if self.tokens:
            self.gaps[name].append((time.perf_counter() - self.tokens) * 1e6)


@dataclass
class Answered:
    sampled: SampledRows
    times: Times | None = None
    features = Features()
    rows: Any = None
    seconds: float = 3e-4

    def wait(self) -> SampledRows:
        if self.times is not None:
            self.times.tokens = time.perf_counter()
        return self.sampled


class FreeDevice:
    """Of a model whose token at each position is that of a text; the arrays are filled as for a GPU."""

    name = "free"
    reason = "a benchmark of the host"

    def __init__(self, text_ids: list[int], num_heads: int, times: Times, longest: int) -> None:
        self.text_ids, self.times = np.array(text_ids), times
        shape = AttentionShape(num_heads, num_heads, 64, (0,))
        storage = [torch.zeros(1, num_heads, BLOCK_SIZE, 64, dtype=torch.float16)]
        attention = TritonPagedAttention(shape, storage, storage, max_sequences=64, reason="a benchmark")
        spare = full_load(num_heads, NUM_PROCESSORS)
        attention._spare_items = spare
        width = MAX_MODEL_LEN // BLOCK_SIZE
        limits = GpuLimits(64, 2048, MAX_MODEL_LEN, MAX_MODEL_LEN)
        self.steps = StepGraphs(
            limits,
            attention,
            table_width=width,
            num_spare_items=spare,
            num_spare_items_if_long=spare,
            window=0,
            takes_trees=False,
        )
        self.chains = ChainGraphs(
            attention, torch.zeros(2 * MAX_ROWS, dtype=torch.int32), MAX_ROWS, longest=longest, max_num_seqs=64,
            table_width=width, num_spare_items=spare,
        )  # fmt: skip
        num_bytes = max(self.steps.num_bytes, self.chains.num_bytes)
        on_device, slots = torch.zeros(num_bytes, dtype=torch.uint8), [np.zeros(num_bytes, np.uint8)]
        self.steps.bind(SimpleNamespace(on_device=on_device, slots=slots), torch.zeros(256, dtype=torch.int32))  # type: ignore[arg-type]
        self.chains.bind(slots, on_device)
        self.steps.is_captured = self.chains.is_captured = True

    def execute(self, batch: StepBatch) -> torch.Tensor:
        raise NotImplementedError("every request of this benchmark is sampled by the device")

    def discard(self, block_ids: list[int]) -> None:
        raise NotImplementedError("nothing fails here")

    def close(self) -> None:
        """Nothing to release."""

    def room_for_drafts(self, num_sequences: int) -> int:
        return 128 - num_sequences

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> Answered:
        graph = self.steps.find(batch)
        if graph is not None:
            self.steps.fill(graph, 0, batch)
        has_drafts = len(batch.logit_rows_R) > batch.num_sequences
        if has_drafts:
            self.times.note("step")
        tokens = self.text_ids[batch.positions_T[batch.logit_rows_R] + 1]
        return Answered(SampledRows(tokens.tolist(), [1.0] * len(tokens)), self.times if has_drafts else None)

    def takes_chain(self, num_missing: list[int], num_passes: int) -> bool:
        return self.chains.find(num_missing, num_passes, is_drawn=False) is not None

    def launch_chain(
        self,
        batch: StepBatch,
        sampling: SamplingArrays,
        num_passes: int,
        after: Unverified | None = None,
        before: SequenceABC[StepBatch] = (),
    ) -> Answered:
        for one in before:
            if (step := self.steps.find(one)) is not None:
                self.steps.fill(step, 0, one)
        chain = self.chains.find(np.diff(batch.query_starts).tolist(), num_passes, is_drawn=sampling.any_drawn)
        assert chain is not None
        self.chains.fill(chain, 0, batch, sampling, after)
        if after is None:
            self.times.note("drafts")
        num_right = 0 if after is None else min(RIGHT, after.draft_rows_SN.shape[1])
        tokens = self.text_ids[batch.context_lens + num_right + np.arange(num_passes)[:, None]]
        tokens[RIGHT:] += 1
        rows = chain.rows(batch.num_sequences)
        return Answered(SampledRows(tokens.ravel().tolist(), [1.0] * tokens.size), rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--num-tokens", type=int, default=5, help="of each draft")
    parser.add_argument("--auto", action="store_true", help="let the controller choose, with n-grams beside the draft")
    parser.add_argument("--ngram", action="store_true", help="n-grams alone, of a text that repeats itself")
    parser.add_argument("--drawn", action="store_true", help="temperature and top-p instead of greedy")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    config, tokenizer, times = load_config(MODEL), Tokenizer.from_folder(MODEL), Times()
    text_ids = tokenizer.encode(TEXT.read_text()[:60_000], add_special_tokens=False)
    assert len(text_ids) > MAX_MODEL_LEN
    if options.ngram:
        text_ids = text_ids[:100] * (MAX_MODEL_LEN // 50)
    target = FreeDevice(text_ids, 8, times, options.num_tokens)
    drafting = FreeDevice(text_ids, 12, times, options.num_tokens)
    costly = DraftModel(
        drafting, BlockPool(20_000, BLOCK_SIZE, prefix_caching=False), vocab_size=config.vocab_size, max_tokens=2048,
        max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip
    clock = time.perf_counter
    speculator = Speculator(
        options.num_tokens,
        make_free=NgramProposer if options.auto or options.ngram else None,
        costly=None if options.ngram else costly,
        policy=None if options.auto else Always(options.num_tokens),
        priors=ON_GPU,
        clock=clock,
    )
    scheduler = Scheduler(
        BlockPool(20_000, BLOCK_SIZE, prefix_caching=True),
        max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip
    engine = Engine(
        config, tokenizer, target, scheduler, Sampler(config.vocab_size), bytes_per_block=1, speculator=speculator
    )
    params = SamplingParams(max_tokens=1600, temperature=0.7 if options.drawn else 0.0, top_p=0.9)
    for i in range(options.batch):
        engine.add(i, EngineRequest(text_ids[: options.context], (params,)), RequestStats())
    profile = cProfile.Profile()
    while engine.has_work:
        times.tokens = 0.0
        if options.profile:
            profile.enable()
        engine.step()
        profile.disable()
        times.note("call")
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    medians = {name: round(statistics.median(found), 1) for name, found in times.gaps.items() if found}
    steps = speculator.num_steps
    print(f"{steps} steps with drafts, {engine.num_generated_tokens / max(1, engine.num_steps):.2f} tokens a step")
    for name, microseconds in medians.items():
        print(f"{name:>10} {microseconds:8.1f} us after the tokens ({len(times.gaps[name])})")
    print(json.dumps({"benchmark": "speculation_host", **vars(options), "us": medians}))


if __name__ == "__main__":
    main()
