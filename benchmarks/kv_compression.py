"""A smaller KV cache on a CPU: what it costs in quality and in time, and how small it is.

The embedded model, contexts of 1,500 tokens, passages spread over texts that it was not trained on. Each variant reads
the same ones as the plain cache; what leaves the cache does not depend on the steps. Perplexity is of all tokens, and
of those after the 1,000th, where a small cache has let most go; KL is in nats, from the plain cache's distribution. The
cache is the most that a sequence of 1,500 tokens holds when it grows by one token a step. Seconds are of CPU time, on
one thread, for a decoding step behind 1,400 tokens; variants take turns. Two variants are for comparison alone: heavy
hitters that are the same for all heads, and whole blocks of them.

    python benchmarks/kv_compression.py TEXT [TEXT ...]            # the figures of docs/results/kv_compression.md
    python benchmarks/kv_compression.py TEXT --passages 2 --rounds 1 --steps 8
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.batching.retention import HeavyHitters, give_blocks_back, take_blocks_beside_the_schedule
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kernels.cpu.cache import CompiledCache
from autobot_llm.engine.kv_cache.policy import EVICTION_INTERVAL
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.calibration import sequences_of
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.sequence import Sequence as EngineSequence
from autobot_llm.engine.speculative.build import SpeculationOptions

TINY = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
LENGTH, LATE = 1500, 1000
CHUNK = 128
BUDGETS = {0.2: 288, 0.5: 736, 0.8: 1184}  # shares of LENGTH, in whole pairs of blocks
Scores = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """`scores` makes of a sequence's sums, LBKP, those that choose what stays; None: each head's own."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = None


def same_for_all_heads(sums_LBKP: torch.Tensor) -> torch.Tensor:
    return sums_LBKP.mean((0, 2), keepdim=True).expand_as(sums_LBKP)


def whole_blocks(sums_LBKP: torch.Tensor) -> torch.Tensor:
    return sums_LBKP.mean((0, 2, 3), keepdim=True).expand_as(sums_LBKP)


def variants() -> Iterator[Variant]:
    yield Variant("plain")
    yield Variant("int8", {"kv_cache_dtype": "int8"})
    yield Variant("fp8", {"kv_cache_dtype": "fp8"})
    for share, budget in BUDGETS.items():
        yield Variant(f"heavy hitters {share:.0%}", {"kv_heavy_hitters": budget})
        yield Variant(f"window {share:.0%}", {"kv_sliding_window": budget})
    half = {"kv_heavy_hitters": BUDGETS[0.5]}
    fifth = {"kv_heavy_hitters": BUDGETS[0.2]}
    yield Variant("heavy hitters 50%, int8", {**half, "kv_cache_dtype": "int8"})
    yield Variant("heavy hitters 20%, the same for all heads", fifth, scores=same_for_all_heads)
    yield Variant("heavy hitters 20%, whole blocks", fifth, scores=whole_blocks)


class Choosing:
    """Evictor that has a cache choose by other scores than each head's own."""

    def __init__(self, cache: CompiledCache, scores: Scores) -> None:
        self._cache, self._scores = cache, scores

    def evict(self, block_ids: Sequence[int], num_kept: int, num_candidates: int) -> None:
        assert self._cache.attention_LBKP is not None
        blocks = list(block_ids[: num_candidates // 16])
        self._cache.attention_LBKP[:, blocks] = self._scores(self._cache.attention_LBKP[:, blocks])
        self._cache.evict(block_ids, num_kept, num_candidates)


def make_engine(variant: Variant, cache_dir: Path) -> Engine:
    options = EngineOptions(
        folder=TINY, cache_dir=cache_dir, device="cpu", compiled_step="on", cpu_threads=1, prefix_caching=False,
        max_num_seqs=4, speculation=SpeculationOptions(method="none"), kv_cache_memory=64 * 2**20,
    )  # fmt: skip
    engine = load_engine(replace(options, **variant.options))
    if variant.scores is not None:
        policy = engine.scheduler.retention.policy
        engine.scheduler.retention = HeavyHitters(policy, Choosing(engine.executor.cache, variant.scores))  # type: ignore[attr-defined]
    return engine


# R rows whose logits are wanted, V vocabulary
def read(engine: Engine, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """The first position of each step, and the log probabilities RV after its tokens."""
    scheduler, start = engine.scheduler, 0
    sequence = EngineSequence(-2, list(ids), SamplingParams(max_tokens=1))
    while start < len(ids) - 1:
        has_room = take_blocks_beside_the_schedule(sequence, start, CHUNK, scheduler.retention, scheduler.block_pool)
        assert has_room, "an idle engine has room for a sequence"
        num_tokens = min(scheduler.retention.policy.longest_step(start, CHUNK), len(ids) - 1 - start)
        batch = build_batch([ScheduledSequence(sequence, start, num_tokens, samples=True)], 16)
        batch = replace(batch, logit_rows_R=np.arange(num_tokens, dtype=np.int64))
        yield start, engine.executor.execute(batch).float().log_softmax(-1)
        start += num_tokens
    give_blocks_back(sequence, scheduler.block_pool)


def compare(engine: Engine, plain: Engine, passages: torch.Tensor, variant: Variant) -> dict[str, Any]:
    """Sums over tokens of negative log likelihoods (all, late), KL and equal best tokens."""
    nll, late, kl, agreed = 0.0, 0.0, 0.0, 0
    for ids in track(passages.tolist(), description=f"{variant.name:<42}", transient=True):
        whole_RV = torch.cat([logprobs for _, logprobs in read(plain, ids)])
        for start, ours_RV in read(engine, ids):
            theirs_RV = whole_RV[start : start + len(ours_RV)]
            targets_R = torch.tensor(ids[start + 1 : start + 1 + len(ours_RV)])
            lost_R = -ours_RV.gather(1, targets_R[:, None])[:, 0]
            nll += float(lost_R.sum())
            late += float(lost_R[max(0, LATE - start) :].sum())
            kl += float((theirs_RV.exp() * (theirs_RV - ours_RV)).sum())
            agreed += int((ours_RV.argmax(-1) == theirs_RV.argmax(-1)).sum())
    count, num_late = len(passages) * (LENGTH - 1), len(passages) * (LENGTH - 1 - LATE)
    policy = engine.scheduler.retention.policy
    most = policy.most_tokens(LENGTH, EVICTION_INTERVAL if policy.heavy_hitters else 1)
    return {
        "variant": variant.name,
        "num_tokens": count,
        "perplexity": math.exp(nll / count),
        "late_perplexity": math.exp(late / num_late),
        "kl": kl / count,
        "top1_agreement": agreed / count,
        "cache_bytes": -(-most // 16) * engine.bytes_per_block,
    }


def decode_seconds(engine: Engine, prompt: list[int], num_steps: int) -> float:
    params = SamplingParams(max_tokens=num_steps + 1, min_tokens=num_steps + 1, temperature=0.0)
    engine.add(0, EngineRequest(prompt_ids=prompt, params=(params,)), RequestStats())
    while not engine.step():
        pass
    start = time.process_time()
    while engine.has_work:
        engine.step()
    return (time.process_time() - start) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--passages", type=int, default=12, help="of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="decoded in each round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        engines = {variant: make_engine(variant, Path(temporary)) for variant in variants()}
        plain = next(iter(engines.values()))
        passages = torch.cat([
            sequences_of(text.read_text(), plain.tokenizer, num_sequences=arguments.passages, length=LENGTH)
            for text in arguments.texts
        ])  # fmt: skip
        rows = [compare(engine, plain, passages, variant) for variant, engine in engines.items()]
        seconds = dict.fromkeys(engines, math.inf)
        for _ in track(range(arguments.rounds), description="decoding", transient=True):
            for variant, engine in engines.items():
                took = decode_seconds(engine, passages[0, :1400].tolist(), arguments.steps)
                seconds[variant] = min(seconds[variant], took)
    print(f"{'cache':<42} perplexity  change  after 1,000  change      KL  top-1     MB  share  ms/step  speed-up")
    first = rows[0]
    for variant, row in zip(engines, rows, strict=True):
        row["seconds_per_step"] = seconds[variant]
        change, late = (row[name] / first[name] - 1 for name in ("perplexity", "late_perplexity"))
        print(
            f"{row['variant']:<42} {row['perplexity']:10.3f} {change:+7.2%} "
            f"{row['late_perplexity']:12.3f} {late:+7.2%} "
            f"{row['kl']:7.4f} {row['top1_agreement']:6.1%} {row['cache_bytes'] / 1e6:6.2f} "
            f"{row['cache_bytes'] / first['cache_bytes']:6.1%} {1e3 * seconds[variant]:8.3f} "
            f"{first['seconds_per_step'] / seconds[variant]:9.2f}"
        )
    print(json.dumps({"benchmark": "kv_compression", "rows": rows}))


if __name__ == "__main__":
    main()
