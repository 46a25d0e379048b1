"""What a tree of drafts costs in the compiled step, beside a line of as many tokens: processor time, one thread, the
embedded model. The two take turns, so that what disturbs one disturbs the other. And what sampling its rows costs.

    python benchmarks/tree_steps_cpu.py
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.kernels.cpu.build import load_library
from autobot_llm.engine.kernels.cpu.compiled import CompiledExecutor
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.sequence import SamplingParams, Sequence

TINY = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
CACHE_DIR = Path.home() / ".cache" / "autobot_llm"
CONTEXTS = (100, 1000, 1900)
ROWS = (2, 8, 16, 32, 64)
BLOCK_SIZE, MOST_TOKENS = 16, 2048
SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
}


def item(context: int, rows: int, *, is_tree: bool) -> ScheduledSequence:
    """A sequence of that many tokens that gets `rows` rows: its last token and drafts. A tree has a random shape."""
    rng = random.Random(rows)
    sequence = Sequence(0, [rng.randrange(8000) for _ in range(context)], SamplingParams(max_tokens=rows))
    sequence.block_ids.extend(range(-(-MOST_TOKENS // BLOCK_SIZE)))
    sequence.draft_ids = [rng.randrange(8000) for _ in range(rows - 1)]
    if is_tree:
        sequence.draft_parents = [rng.randrange(-1, node) for node in range(rows - 1)]
    return ScheduledSequence(sequence, context - 1, rows, True, 0, rows - 1)


def milliseconds(times: int, *acts: Callable[[], Any]) -> list[float]:
    """The lower decile of each, as others only ever add."""
    seconds: list[list[float]] = [[] for _ in acts]
    for _ in range(times):
        for taken, act in zip(seconds, acts, strict=True):
            start = time.thread_time()
            act()
            taken.append(time.thread_time() - start)
    return [float(np.quantile(taken, 0.1)) * 1e3 for taken in seconds]


def sampling(times: int, vocab_size: int) -> dict[str, float]:
    """Milliseconds of the sampler for so many rows at once, by how they are sampled."""
    torch.set_num_threads(1)
    sampler, logits_RV = Sampler(vocab_size), 3 * torch.randn(max(ROWS), vocab_size)
    found = {}
    for number, (name, how) in enumerate(SAMPLING.items()):
        sequence = Sequence(number, [1, 2, 3], SamplingParams(max_tokens=1, **how))
        for rows in (1, 16, 64):
            rows_RV, sequences = logits_RV[:rows], [sequence] * rows
            (took,) = milliseconds(times, lambda rows_RV=rows_RV, asked=sequences: sampler.sample(rows_RV, asked))
            print(f"sampling {rows:2} rows, {name}: {took:.3f} ms")
            found[f"sampling {rows} rows, {name}, ms"] = took
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="steps of each size (30)")
    times = parser.parse_args().times
    config = load_config(TINY)
    executor = CompiledExecutor(
        config,
        load_weights(TINY, config, dtype=None, device="cpu"),
        load_library(CACHE_DIR),
        num_blocks=-(-MOST_TOKENS // BLOCK_SIZE),
        max_tokens=max(ROWS),
        max_model_len=MOST_TOKENS,
        num_threads=1,
    )
    found: dict[str, Any] = {}
    print(f"{'context':>8}{'rows':>6}{'line, ms':>10}{'tree, ms':>10}{'ratio':>7}")
    for context in CONTEXTS:
        for rows in ROWS:
            batches: list[StepBatch] = [
                build_batch([item(context, rows, is_tree=is_tree)], BLOCK_SIZE) for is_tree in (False, True)
            ]
            line, tree = milliseconds(times, *(lambda batch=batch: executor.execute(batch) for batch in batches))
            print(f"{context:8,}{rows:6}{line:10.3f}{tree:10.3f}{tree / line:7.3f}")
            found[f"{context} tokens, {rows} rows"] = {"line": round(line, 3), "tree": round(tree, 3)}
    slots = np.array([200, 203, 207, 211]), np.array([199, 200, 201, 202])
    line_item, tree_item = (item(100, 64, is_tree=is_tree) for is_tree in (False, True))
    moved, built_line, built_tree = milliseconds(
        10 * times,
        lambda: executor.move(*slots),
        lambda: build_batch([line_item], BLOCK_SIZE),
        lambda: build_batch([tree_item], BLOCK_SIZE),
    )
    print(f"four tokens moved into line {moved * 1e3:.0f} us; arrays of 64 rows, line {built_line * 1e3:.0f} us, "
          f"tree {built_tree * 1e3:.0f} us")  # fmt: skip
    found |= {
        "move of 4, ms": moved,
        "arrays of a line of 64, ms": built_line,
        "arrays of a tree of 64, ms": built_tree,
    }
    executor.close()
    found |= sampling(times, config.vocab_size)
    print(json.dumps({"machine": platform.processor() or platform.machine(), "result": found}))


if __name__ == "__main__":
    main()
