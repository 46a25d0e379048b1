"""What the semantic cache would have answered wrongly, what it answers, and what it and kept vectors cost.

    python benchmarks/semantic_cache.py [--threshold 0.95 --threshold 0.8]

The pairs are tests/data/semantic_pairs.jsonl: texts that look alike and differ in meaning, by kind of difference, and
paraphrases. Those that are held out were written when the rules were done, and no rule was changed for them. Each pair
goes through an interface's own chain: the first text is asked, then the second one, with the embedded model's vectors;
a scripted provider answers. A false hit is a hit on a pair that differs. "Similarity alone" counts the pairs whose
vectors are similar enough, whatever the words say: what a semantic cache without our comparison of words would have
done. Times are processor time, medians over repeated requests. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import CacheControl, ChatMessage, EmbeddingRequest, EmbeddingResponse, LLMRequest

PAIRS = Path(__file__).parents[1] / "tests" / "data" / "semantic_pairs.jsonl"
NUM_TIMED = 200
QUESTION, REWORDED = "How do I boil an egg?", "Can you tell me how to boil an egg?"


class Answering(ScriptedProvider):
    """Answers from a script, and embeds with the embedded model."""

    def __init__(self, embedder: NativeProvider) -> None:
        super().__init__(["an ", "answer"], name="native", models=("tiny",))
        self._embedder = embedder

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        return await self._embedder.embed(request)


async def hits(pairs: list[dict[str, Any]], embedder: NativeProvider, threshold: float) -> list[bool]:
    """Whether the second text of each pair gets the first one's answer."""
    found = []
    for pair in pairs:
        with tempfile.TemporaryDirectory() as folder:
            async with interface(embedder, Path(folder), threshold) as llm:
                for text in (pair["a"], pair["b"]):
                    answer = await ask(llm, text)
                found.append(answer.cached)
    return found


def interface(embedder: NativeProvider, folder: Path, threshold: float | None) -> LLMInterface:
    settings = Settings(cache_dir=folder, semantic_cache_threshold=threshold)
    return LLMInterface(settings, providers={"native": Answering(embedder)})


async def ask(llm: LLMInterface, text: str, cache: CacheControl | None = None) -> Any:
    messages = [ChatMessage(role="user", content=text)]
    return await llm.chat_completion(LLMRequest(messages=messages, temperature=0, cache=cache))


async def ask_for_eggs(llm: LLMInterface, number: int) -> None:
    await ask(llm, f"How do I boil {number} eggs?")


async def cpu_us(work: Callable[[int], Awaitable[object]]) -> float:
    """The median of some requests' processor time, in microseconds."""
    took = []
    for number in range(NUM_TIMED):
        began = time.process_time()
        await work(number)
        took.append((time.process_time() - began) * 1e6)
    return statistics.median(took)


async def costs(embedder: NativeProvider) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, float] = {}
        for name, threshold in (("off", None), ("on", 0.8)):
            async with interface(embedder, Path(folder) / name, threshold) as llm:
                await ask(llm, "warm")
                figures[f"miss_{name}_us"] = await cpu_us(partial(ask_for_eggs, llm))
                if threshold is not None:
                    await ask(llm, QUESTION)
                    figures["hit_us"] = await cpu_us(lambda _, llm=llm: ask(llm, REWORDED))
        async with interface(embedder, Path(folder) / "vectors", None) as llm:
            text = "Once upon a time there was a little fox who lived in a big forest. " * 4
            await llm.embed(text)
            bypass = CacheControl(mode="bypass")
            figures["embed_us"] = await cpu_us(lambda _: llm.embed(EmbeddingRequest(inputs=[text], cache=bypass)))
            figures["embed_kept_us"] = await cpu_us(lambda _: llm.embed(text))
    return figures


def table(rows: list[tuple[object, ...]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


async def main(thresholds: list[float]) -> None:
    pairs = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    kinds = Counter(pair["kind"] for pair in pairs)
    num_different = sum(not pair["same"] for pair in pairs)
    with tempfile.TemporaryDirectory() as folder:
        embedder = NativeProvider(Settings(cache_dir=Path(folder)))
        await embedder.start()
        try:
            texts: list[str | list[int]] = [text for pair in pairs for text in (pair["a"], pair["b"])]
            vectors = (await embedder.embed(EmbeddingRequest(inputs=texts))).vectors
            similarities = [sum(map(mul, *vectors[place : place + 2])) for place in range(0, len(vectors), 2)]
            report: dict[str, Any] = {"benchmark": "semantic_cache", "python": platform.python_version()}
            for threshold in thresholds:
                found = await hits(pairs, embedder, threshold)
                alone = [similarity >= threshold for similarity in similarities]
                told: dict[str, list[int]] = {kind: [0, 0] for kind in kinds}
                for pair, hit, near in zip(pairs, found, alone, strict=True):
                    told[pair["kind"]][0] += near
                    told[pair["kind"]][1] += hit
                rows: list[tuple[object, ...]] = [
                    (f"threshold {threshold:g}", "pairs", "similarity alone", "semantic cache"),
                    ("---",) * 4,
                ]
                rows += [(kind, kinds[kind], *counts) for kind, counts in told.items()]
                false, right = (
                    [
                        sum(counts[place] for kind, counts in told.items() if ("paraphrase" in kind) == same)
                        for place in (0, 1)
                    ]
                    for same in (False, True)
                )
                rows.append(("**false hits in all**", num_different, *false))
                rows.append(("**paraphrases found in all**", len(pairs) - num_different, *right))
                print(table(rows), end="\n\n")
                report[f"at_{threshold:g}"] = {
                    "false_hits": false[1], "false_hits_by_similarity_alone": false[0], "paraphrases_found": right[1],
                }  # fmt: skip
            report |= {"num_different": num_different, "num_paraphrases": len(pairs) - num_different}
            report |= {name: round(value, 1) for name, value in (await costs(embedder)).items()}
        finally:
            await embedder.close()
    print(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threshold", type=float, action="append", help="by default 0.95, 0.9, 0.8 and 0.6")
    asyncio.run(main(parser.parse_args().threshold or [0.95, 0.9, 0.8, 0.6]))
