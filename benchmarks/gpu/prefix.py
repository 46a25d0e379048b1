"""What a cached prefix saves of the time to the first token: random tokens at full cost, and real text."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.request import RequestStats
from gpu.batching import BATCH_SIZE
from gpu.bench import Bench, greedy_request, random_prompts, real_texts
from gpu.report import Clock, Report, Table

PREFIX_TOKENS = 4096
TEXT_TOKENS = 1000
TAIL_TOKENS = 16
REPEATS = 5


def prefix(bench: Bench, clock: Clock, report: Report) -> None:
    table = report.table(
        f"First token after a shared prefix, then {TAIL_TOKENS} other tokens (ms)",
        *("prefix", "model", "tokens", "cold", "hit", "saved", "tokens found", "repeats"),
    )
    rng = random.Random(0)
    if bench.has_widened_model:
        engine = bench.engine(bench.widened_model)
        texts = [engine.tokenizer.encode(text) for text in real_texts("long_prefix")]
        texts = [ids[:TEXT_TOKENS] for ids in texts if len(ids) >= TEXT_TOKENS]
        _compare(bench.widened_model, engine, "text", lambda i: texts[i % len(texts)], clock, report, table, until=0.5)
    else:
        table.notes.append("real text needs --widened DIR")
    engine = bench.engine(bench.random_model, max_num_seqs=BATCH_SIZE)  # last: section batching goes on with it
    longest = engine.scheduler.max_model_len - TAIL_TOKENS - 1
    num_tokens = min(PREFIX_TOKENS, longest)
    if num_tokens < PREFIX_TOKENS:
        table.notes.append(f"{num_tokens:,} tokens: more do not fit this model's context")

    def random_prefix(_: int) -> list[int]:
        return random_prompts(engine.config, 1, num_tokens, rng)[0]

    _compare(bench.random_model, engine, "random", random_prefix, clock, report, table, until=1.0)


def _compare(
    folder: Path,
    engine: Engine,
    name: str,
    make_prefix: Callable[[int], list[int]],
    clock: Clock,
    report: Report,
    table: Table,
    *,
    until: float,
) -> None:
    rng = random.Random(1)
    turn = 0

    def pair() -> tuple[float, float, int, int]:
        nonlocal turn
        shared, salt = make_prefix(turn), f"{name}-{turn}"  # salted, so that no text meets its own earlier cache
        turn += 1
        cold, found = time_to_first_token(engine, shared + _tail(engine, rng), salt)
        assert found == 0, "a new tenant finds nothing"
        hit, found = time_to_first_token(engine, shared + _tail(engine, rng), salt)
        return cold, hit, found, len(shared)

    pair()  # warm up
    results = clock.repeat(pair, REPEATS, until=until)
    cold, hit = (statistics.median(column) for column in zip(*(result[:2] for result in results), strict=True))
    found, num_tokens = min(result[2] for result in results), results[0][3]
    saved = 1 - hit / cold
    report.figures[name] = {
        "prefix_tokens": num_tokens,
        "cold_ms": cold * 1e3,
        "hit_ms": hit * 1e3,
        "saved": saved,
        "num_cached_tokens": found,
        "num_repeats": len(results),
    }
    table.add(name, folder.name, num_tokens, cold * 1e3, hit * 1e3, f"{saved:.1%}", found, len(results))


def _tail(engine: Engine, rng: random.Random) -> list[int]:
    return random_prompts(engine.config, 1, TAIL_TOKENS, rng)[0]


def time_to_first_token(engine: Engine, prompt_ids: list[int], salt: str) -> tuple[float, int]:
    """Seconds of a 1-token generation, and how many of the prompt's tokens were found in the cache."""
    stats = RequestStats()
    start = time.perf_counter()
    engine.add(0, greedy_request(prompt_ids, 1, salt=salt), stats)
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
    return time.perf_counter() - start, stats.num_cached_tokens
