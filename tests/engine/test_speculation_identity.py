"""The embedded model answers prompts of every category as it does without speculation: no token differs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from engines import BLOCK_BYTES, TINY, Driver, greedy, num_leaked_blocks
from grammars import compiled
from guessed_trees import TreeGuesser

from autobot_llm.engine.batching.draft_tree import MAX_TREE_TOKENS
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.grammar.compiler import GrammarCompiler
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.kernels.cpu import build
from autobot_llm.engine.kernels.cpu.compiled import CompiledExecutor
from autobot_llm.engine.load import load_draft_model, load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

PROMPTS = Path(__file__).parents[2] / "benchmarks" / "data" / "dev_prompts.jsonl"
CATEGORIES = ("chat", "code", "copy", "long_prefix", "story")
NUM_EACH = 8
NUM_NEW_TOKENS = 48
METHODS = ("ngram", "draft", "both", "auto", "trees")

MAX_DRAFT = MAX_TREE_TOKENS - 1
Outputs = dict[tuple[int, ...], list[int]]

COMPILED = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler; torch rounds by the batch")
ROUNDING = 1e-4  # torch's products round differently for different numbers of rows


def options(cache_dir: Path) -> EngineOptions:
    return EngineOptions(folder=TINY, cache_dir=cache_dir, device="cpu", compiled_step="on", cpu_threads=1)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine(cache_dir: Path) -> Iterator[Engine]:
    """Roomy; steps of 64 tokens cut the longer prompts into chunks."""
    made = load_engine(dataclasses.replace(options(cache_dir), max_num_batched_tokens=64, max_num_seqs=64))
    yield made
    made.speculator = None
    made.close()


@pytest.fixture(scope="module")
def draft(cache_dir: Path) -> Iterator[DraftModel]:
    made = load_draft_model(TINY, TINY.with_name("tiny-draft"), options(cache_dir))
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    by_category: dict[str, list[list[int]]] = {}
    for line in PROMPTS.read_text().splitlines():
        record = json.loads(line)
        chosen = by_category.setdefault(record["category"], [])
        if len(chosen) < NUM_EACH:
            text = record.get("prompt") or "".join(
                f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in record["messages"]
            )
            ids = engine.tokenizer.encode(text + ("" if "prompt" in record else "<|assistant|>\n"))
            chosen.append(ids[-200:])
    assert tuple(sorted(by_category)) == CATEGORIES
    return [ids for chosen in by_category.values() for ids in chosen]


def params(kind: str, i: int, engine: Engine) -> SamplingParams:
    stop_ids = engine.config.eos_token_ids
    if kind == "greedy":
        return greedy(NUM_NEW_TOKENS, stop_token_ids=stop_ids)
    if kind == "seeded":
        return SamplingParams(
            max_tokens=NUM_NEW_TOKENS,
            temperature=(0.6, 0.9)[i % 2],
            top_k=(0, 40)[i // 2 % 2],
            top_p=(1.0, 0.95)[i // 4 % 2],
            seed=i,
            stop_token_ids=stop_ids,
        )
    return SamplingParams(
        max_tokens=NUM_NEW_TOKENS,
        temperature=(0.0, 0.8)[i % 2],
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        min_tokens=8,
        seed=i,
        stop_token_ids=stop_ids,
    )


def requests(kind: str, prompts: list[list[int]], engine: Engine) -> list[EngineRequest]:
    stop = (" the", "and ") if kind == "stop strings" else ()
    return [
        EngineRequest(ids, (params("seeded" if stop else kind, i, engine),), stop=stop) for i, ids in enumerate(prompts)
    ]


def answers(
    engine: Engine, asked: list[EngineRequest], *, together: bool, outputs: Outputs | None = None
) -> list[tuple[str, int, str | None]]:
    """Text, tokens and end of each; `outputs` hears the token ids, by prompt."""
    driver = Driver(engine)
    sequences = {}
    for i, request in enumerate(asked):
        driver.add(i, request)
        sequences.update({choice.sequence.id: choice.sequence for choice in engine._choices.values()})
        if not together:
            driver.run()
    driver.run()
    assert num_leaked_blocks(engine) == 0
    if outputs is not None:
        outputs.update({tuple(s.token_ids[: s.num_prompt_tokens]): s.output_ids for s in sequences.values()})
    ends = [driver.ended[i, 0] for i in range(len(asked))]
    return [(driver.texts[i, 0], end.num_tokens, end.end) for i, end in enumerate(ends)]


def speculator(method: str, draft: DraftModel, outputs: Outputs) -> Speculator:
    if method == "trees":
        return guessing(outputs)
    return Speculator(
        4,
        make_free=None if method == "draft" else NgramProposer,
        costly=None if method == "ngram" else draft,
        policy=None if method == "auto" else Always(4),
    )


def guessing(outputs: Outputs, seed: int = 0) -> Speculator:
    """Trees of up to 63 tokens, lines and nothing; what comes is on some path of most of them."""
    guesser = TreeGuesser(outputs, seed, vocab_size=8000)
    return Speculator(MAX_DRAFT, make_free=lambda _: guesser, policy=Always(MAX_DRAFT))


@COMPILED
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["greedy", "seeded", "penalties", "stop strings"])
def test_every_method_gives_the_answers_without_it(
    kind: str, engine: Engine, draft: DraftModel, prompts: list[list[int]]
) -> None:
    """All together, and one prompt of each category alone."""
    asked = requests(kind, prompts, engine)
    engine.speculator = None
    outputs: Outputs = {}
    expected = answers(engine, asked, together=True, outputs=outputs)
    for method in METHODS:
        engine.speculator = speculator(method, draft, outputs)
        some = slice(None, None, 2 if method == "trees" else 1)  # they take the most time
        assert answers(engine, asked[some], together=True) == expected[some], method
        assert method == "auto" or engine.speculator.num_accepted > 0
        assert answers(engine, asked[::NUM_EACH], together=False) == expected[::NUM_EACH], method


@COMPILED
def test_a_cache_that_is_too_small_preempts_and_the_answers_stay(
    cache_dir: Path, engine: Engine, draft: DraftModel, prompts: list[list[int]]
) -> None:
    asked = requests("seeded", [ids[-30:] for ids in prompts[::2]], engine)
    engine.speculator = None
    outputs: Outputs = {}
    expected = answers(engine, asked, together=True, outputs=outputs)
    crowded = load_engine(
        dataclasses.replace(
            options(cache_dir),
            max_model_len=320,
            kv_cache_memory=22 * BLOCK_BYTES,
            max_num_batched_tokens=48,
            max_num_seqs=16,
        )
    )
    try:
        for method in ("trees", "both"):
            crowded.speculator = speculator(method, draft, outputs)
            assert answers(crowded, asked, together=True) == expected
            assert crowded.speculator.num_accepted > 0
        assert crowded.scheduler.num_preemptions > 0
    finally:
        crowded.speculator = None
        crowded.close()


@COMPILED
def test_answers_under_a_grammar_stay_and_drafts_are_cut_where_it_forbids_them(
    engine: Engine, draft: DraftModel
) -> None:
    compiler = GrammarCompiler.for_model(engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids)
    try:
        make = partial(compiled, compiler)
        specs = [
            GrammarSpec.regex(r"(red|green|blue)(, (red|green|blue)){3,8}", "response_format"),
            GrammarSpec.json_schema({"type": "array", "items": {"type": "integer"}, "maxItems": 20}, "response_format"),
        ]
        for temperature in (0.0, 0.9):
            asked = [
                EngineRequest(
                    engine.tokenizer.encode(f"<|user|>\n{i} red, green, blue, red, green, blue [1, 2, 1, 2]<|end|>\n"),
                    (
                        SamplingParams(
                            max_tokens=60,
                            temperature=temperature,
                            seed=7,
                            grammar=make(spec),
                            stop_token_ids=engine.config.eos_token_ids,
                        ),
                    ),
                )
                for i, spec in enumerate(specs)
            ]
            engine.speculator = None
            outputs: Outputs = {}
            expected = answers(engine, asked, together=True, outputs=outputs)
            for method in ("ngram", "draft", "both", "trees"):
                engine.speculator = speculator(method, draft, outputs)
                assert answers(engine, asked, together=True) == expected, method
                assert engine.speculator.num_accepted > 0, method
    finally:
        compiler.close()


@COMPILED
def test_what_trees_leave_in_the_prefix_cache_is_what_plain_steps_leave_there(
    cache_dir: Path, engine: Engine, prompts: list[list[int]]
) -> None:
    """The same blocks with the same bits: whoever finds one goes on as without trees."""
    asked = requests("seeded", prompts[::5], engine)
    found: list[dict[bytes, tuple[bytes, bytes]]] = []
    outputs: Outputs = {}
    for drafts in (False, True):
        fresh = load_engine(dataclasses.replace(options(cache_dir), max_num_batched_tokens=300))
        fresh.speculator = guessing(outputs, seed=1) if drafts else None
        answers(fresh, asked, together=True, outputs=outputs)
        executor, pool = fresh.executor, fresh.scheduler.block_pool
        assert isinstance(executor, CompiledExecutor)
        shape = (fresh.config.num_layers, pool.num_blocks, -1)
        cache = executor.cache
        keys, values = cache.keys_LBKDP.numpy().reshape(shape), cache.values_LBKPD.numpy().reshape(shape)
        found.append(
            {
                key: (keys[:, entry.block_id].tobytes(), values[:, entry.block_id].tobytes())
                for key, entry in pool._index.items()
            }
        )
        num_steps = fresh.num_steps
        fresh.speculator = None
        fresh.close()
    plain, drafted = found
    assert num_steps < NUM_NEW_TOKENS * 3 / 4
    assert len(plain) > len(asked) * 3
    # With drafts an answer's last token, guessed, is computed in the step that ends it, and may fill one more block.
    assert plain.items() <= drafted.items() and len(drafted) <= len(plain) + len(asked)


@COMPILED
def test_the_draft_model_drafts_the_same_in_company_and_after_its_cache_was_lost(
    cache_dir: Path, engine: Engine, prompts: list[list[int]]
) -> None:
    """A pool for one sequence of the dozen: blocks are taken from who is not drafted for, and computed again."""
    from autobot_llm.engine.kv_cache.block_pool import BlockPool

    roomy = load_draft_model(TINY, TINY.with_name("tiny-draft"), options(cache_dir))
    small = DraftModel(
        roomy.executor,
        BlockPool(16, 16, prefix_caching=True),
        vocab_size=engine.config.vocab_size,
        max_tokens=64,
        max_model_len=2048,
    )
    try:
        asked = requests("greedy", prompts[:3], engine)
        for model in (roomy, small):
            engine.speculator = None
            expected = answers(engine, asked, together=False)
            engine.speculator = Speculator(3, costly=model, policy=Always(3))
            assert answers(engine, asked, together=False) == expected
            assert answers(engine, asked, together=True) == expected
            assert model.pool.num_free == model.pool.num_blocks
    finally:
        roomy.close()


def test_in_torch_an_answer_differs_only_where_two_tokens_are_nearly_equal(tmp_path: Path) -> None:
    """A near tie is told from a fault by the log probabilities of the two best tokens at the first difference."""
    eager = load_engine(dataclasses.replace(options(tmp_path), compiled_step="off", max_model_len=512))
    text = "A fox and a dog sat by the river. The fox said to the dog: a dog and a fox sat by the river."
    asked = [
        EngineRequest(
            eager.tokenizer.encode(f"<|user|>\n{text}\n\n{task}<|end|>\n<|assistant|>\n"),
            (greedy(40, num_logprobs=2, stop_token_ids=eager.config.eos_token_ids),),
        )
        for task in ("Repeat this text.", "Tell me a story.", "Who sat by the river?")
    ]
    plain = Driver(eager)
    for i, request in enumerate(asked):
        plain.add(i, request)
    plain.run()
    outputs = {tuple(request.prompt_ids): plain.token_ids[i, 0] for i, request in enumerate(asked)}
    for method in (Speculator(5, make_free=NgramProposer, policy=Always(5)), guessing(outputs)):
        eager.speculator = method
        drafted = Driver(eager)
        for i, request in enumerate(asked):
            drafted.add(i, request)
        drafted.run()
        assert method.num_accepted >= 5
        for key, expected in plain.token_ids.items():
            pairs = zip(drafted.token_ids[key], expected, strict=False)
            place = next((i for i, (got, wanted) in enumerate(pairs) if got != wanted), None)
            assert place is None or plain.gaps[key][place] < ROUNDING
            assert place is not None or drafted.token_ids[key] == expected
    eager.speculator = None
    eager.close()
