"""Two grammar libraries side by side: what a mask costs for each token, and what a grammar costs once.

Both walk the same documents, token by token, under the same schemas, with the embedded model's tokenizer (8,192
entries) and with one of 32,000 that is trained here on Python's own library. At a batch of 32, as many sequences stand
at different places of the documents; each library fills the rows one after the other on one thread, and once with its
own threads. At last, the engine's own steps with the embedded model, with a grammar and without. xgrammar is no
dependency of the package: without it the table has llguidance alone. Prints medians and one JSON line at the end.

    python benchmarks/grammar.py
    pip install xgrammar && python benchmarks/grammar.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import llguidance
import llguidance.numpy
import numpy as np
import tokenizers

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.grammar.compiler import GrammarCompiler
from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.grammar.vocabulary import Vocabulary
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
BATCH = 32
SMALL_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LARGE_SCHEMA = {
    "type": "object",
    "properties": {
        f"part_{number}": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["red fox", "brown hen", "old bear", "small owl"]},
                "weight": {"type": "number"},
                "note": {"type": "string", "maxLength": 200},
                "codes": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}},
            },
            "required": ["kind", "weight", "note", "codes"],
            "additionalProperties": False,
        }
        for number in range(40)
    },
    "required": [f"part_{number}" for number in range(40)],
    "additionalProperties": False,
}
SMALL = {"name": "The fox of the hill, called 'Red'", "age": 41, "tags": ["quick", "brown and grey", "é, ü, 火"]}
LARGE = {
    f"part_{number}": {"kind": "old bear", "weight": 12.5, "note": "It sat on the hay.", "codes": ["AB-123", "CD-456"]}
    for number in range(40)
}
CASES = {"small": (SMALL_SCHEMA, SMALL), "large": (LARGE_SCHEMA, LARGE), "any object": ({"type": "object"}, SMALL)}


class Walker(Protocol):
    """One sequence under a grammar."""

    def fill(self, masks: Any, row: int) -> None: ...

    def advance(self, token_id: int) -> bool: ...


class Library(Protocol):
    name: str

    def compile(self, schema: dict[str, Any]) -> Callable[[], Walker]: ...

    def allocate(self, num_rows: int) -> Any: ...

    def fill_all(self, walkers: list[Any], masks: Any) -> None: ...


class LlGuidance:
    name = "llguidance"

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_size, frozenset({end_id}))
        self._vocab_size = vocab_size
        self._threads = llguidance.LLExecutor()

    def compile(self, schema: dict[str, Any]) -> Callable[[], LlGuidanceWalker]:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(self._vocabulary.library_tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        return lambda: LlGuidanceWalker(matcher.deep_copy())

    def allocate(self, num_rows: int) -> Any:
        return llguidance.numpy.allocate_token_bitmask(num_rows, self._vocab_size + 1)

    def fill_all(self, walkers: list[LlGuidanceWalker], masks: Any) -> None:
        pairs = [(walker.matcher, row) for row, walker in enumerate(walkers)]
        llguidance.numpy.fill_next_token_bitmask_par(self._threads, pairs, masks)


class LlGuidanceWalker(NamedTuple):
    matcher: llguidance.LLMatcher

    def fill(self, masks: Any, row: int) -> None:
        llguidance.numpy.fill_next_token_bitmask(self.matcher, masks, row)

    def advance(self, token_id: int) -> bool:
        return self.matcher.consume_token(token_id)


class XGrammar:
    name = "xgrammar"

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        import xgrammar

        self._library = xgrammar
        pieces = [tokenizer.piece(token_id) or "" for token_id in range(vocab_size)]
        info = xgrammar.TokenizerInfo(
            pieces, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=[end_id]
        )
        self._compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
        self._vocab_size = vocab_size
        self._batch = xgrammar.BatchGrammarMatcher()

    def compile(self, schema: dict[str, Any]) -> Callable[[], XGrammarWalker]:
        grammar = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=True)
        return lambda: XGrammarWalker(self._library.GrammarMatcher(grammar))

    def allocate(self, num_rows: int) -> Any:
        return self._library.allocate_token_bitmask(num_rows, self._vocab_size)

    def fill_all(self, walkers: list[XGrammarWalker], masks: Any) -> None:
        self._batch.batch_fill_next_token_bitmask([walker.matcher for walker in walkers], masks)


class XGrammarWalker(NamedTuple):
    matcher: Any

    def fill(self, masks: Any, row: int) -> None:
        self.matcher.fill_next_token_bitmask(masks, row)

    def advance(self, token_id: int) -> bool:
        return bool(self.matcher.accept_token(token_id))


def tokenizer_of_32k(folder: Path) -> Tokenizer:
    """A byte-level tokenizer of 32,000 entries, trained on Python's own library."""
    trained = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((path.read_text(encoding="utf-8", errors="replace") for path in files), trainer)
    trained.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def microseconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1e6


def walk(library: Library, start: Callable[[], Walker], token_ids: list[int]) -> Iterator[tuple[float, float]]:
    """(mask, advance) of each token of one document, in microseconds."""
    masks, walker = library.allocate(1), start()
    for token_id in token_ids:
        mask = microseconds(lambda walker=walker: walker.fill(masks, 0))  # type: ignore[misc]
        advance = microseconds(lambda walker=walker, token_id=token_id: walker.advance(token_id))  # type: ignore[misc]
        yield mask, advance


def batch_steps(library: Library, start: Callable[[], Walker], token_ids: list[int]) -> Iterator[tuple[float, float]]:
    """Steps of 32 sequences at different places: (rows one after the other, the library's own threads)."""
    masks = library.allocate(BATCH)
    walkers = [start() for _ in range(BATCH)]
    for row, walker in enumerate(walkers):
        for token_id in token_ids[: row * len(token_ids) // (2 * BATCH)]:
            walker.fill(masks, row)  # as in decoding: a mask before every token
            assert walker.advance(token_id)
    places = [row * len(token_ids) // (2 * BATCH) for row in range(BATCH)]
    for _ in range(len(token_ids) // 2):
        together = microseconds(lambda: library.fill_all(walkers, masks))
        one_by_one = microseconds(lambda: [walker.fill(masks, row) for row, walker in enumerate(walkers)])
        yield one_by_one, together
        for row, walker in enumerate(walkers):
            assert walker.advance(token_ids[places[row]])
            places[row] += 1


def measure(library: Library, tokenizer: Tokenizer, schema: dict[str, Any], document: Any) -> dict[str, float]:
    token_ids = tokenizer.encode(json.dumps(document, ensure_ascii=False), add_special_tokens=False)
    compile_times = []
    for _ in range(5):
        begin = time.perf_counter()
        start = library.compile(schema)
        library_mask = library.allocate(1)
        start().fill(library_mask, 0)
        compile_times.append((time.perf_counter() - begin) * 1e3)
    cold = list(walk(library, start, token_ids))
    warm = list(walk(library, start, token_ids))
    steps = list(batch_steps(library, start, token_ids))
    masks = [mask for mask, _ in warm]
    return {
        "num_tokens": len(token_ids),
        "compile_ms": statistics.median(compile_times),
        "first_walk_us": statistics.median(mask for mask, _ in cold),
        "mask_us": statistics.median(masks),
        "mask_us_p99": float(np.percentile(masks, 99)),
        "advance_us": statistics.median(advance for _, advance in warm),
        "batch32_us_per_step": statistics.median(one for one, _ in steps),
        "batch32_threads_us_per_step": statistics.median(together for _, together in steps),
    }


def step_milliseconds(engine: Engine, batch: int, grammar: Grammar | None) -> float:
    """The median step of `batch` sequences that decode, all under the grammar or none."""
    prompt_ids = engine.tokenizer.encode("Tell me a story about a fox.")
    params = SamplingParams(max_tokens=48, temperature=0.0, grammar=grammar)
    for number in range(batch):
        engine.add(number, EngineRequest(prompt_ids=prompt_ids, params=(params,)), RequestStats())
    times = []
    while engine.has_work:
        times.append(microseconds(engine.step) / 1e3)
    return statistics.median(times[1:])  # the first one computes the prompts


def measure_engine() -> dict[str, float]:
    """What grammars add to the embedded model's steps; with and without take turns, the best of nine rounds counts."""
    with tempfile.TemporaryDirectory() as folder:
        engine = load_engine(EngineOptions(folder=TINY, cache_dir=Path(folder), device="cpu", max_num_seqs=BATCH))
        compiler = GrammarCompiler.for_model(engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids)
        schema = {"type": "object", "properties": {"text": {"type": "string", "minLength": 400}}, "required": ["text"]}
        grammar = asyncio.run(compiler.compile(GrammarSpec.json_schema(schema, "schema"), "schema"))
        compiler.close()
        figures = {}
        for batch in (1, BATCH):
            rounds = [[step_milliseconds(engine, batch, used) for used in (None, grammar)] for _ in range(9)]
            free, bound = (min(times) for times in zip(*rounds, strict=True))
            figures |= {f"step_ms_{batch}_free": free, f"step_ms_{batch}_grammar": bound}
        engine.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    report: dict[str, Any] = {"machine": platform.machine(), "python": platform.python_version(), "rows": []}
    columns = "compile_ms", "first_walk_us", "mask_us", "mask_us_p99", "advance_us", "batch32_us_per_step"
    columns = (*columns, "batch32_threads_us_per_step")
    print(f"{'':38}" + "".join(f"{column.replace('_per_step', '').replace('batch', 'x'):>16}" for column in columns))
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in (Tokenizer.from_folder(TINY), tokenizer_of_32k(Path(folder))):
            vocab_size = tokenizer.vocab_size
            end_id = 4 if vocab_size == 8192 else 0
            for kind in (LlGuidance, XGrammar):
                try:
                    begin = time.perf_counter()
                    library: Library = kind(tokenizer, vocab_size, end_id)
                    seconds = time.perf_counter() - begin
                    report[f"{kind.name}"] = version(kind.name)
                except (ImportError, PackageNotFoundError) as error:
                    print(f"{kind.name}: not here ({error})")
                    continue
                report[f"{kind.name}_{vocab_size}_vocabulary_ms"] = seconds * 1e3
                for case, (schema, document) in CASES.items():
                    row = measure(library, tokenizer, schema, document)
                    report["rows"].append({"library": kind.name, "vocabulary": vocab_size, "schema": case, **row})
                    name = f"{kind.name}, {vocab_size}, {case}"
                    print(f"{name:38}" + "".join(f"{row[column]:16.1f}" for column in columns))
                print(f"{kind.name}, {vocab_size}: vocabulary read in {seconds * 1e3:.0f} ms")
    report["engine"] = measure_engine()
    print("embedded model, ms a step: " + ", ".join(f"{name} {value:.2f}" for name, value in report["engine"].items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
