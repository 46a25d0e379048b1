"""The embedded model with its Medusa heads and its EAGLE-3 draft: the answers stay, and the guesses are those that the
heads make of what the training computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import BLOCK_BYTES, TINY, Driver, greedy, num_leaked_blocks

from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import FeatureExecutor, FeatureKinds, Features
from autobot_llm.engine.kernels.cpu import build
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.eagle.drafting import EagleDrafter
from autobot_llm.engine.speculative.eagle.proposer import EagleProposer
from autobot_llm.engine.speculative.heads import find_heads, make_eagle, make_medusa
from autobot_llm.engine.speculative.medusa.proposer import MedusaProposer
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.proposer import Computed, CostlyProposer
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.training.forward import Model

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler; torch rounds by the batch")

PROMPTS = Path(__file__).parents[2] / "benchmarks" / "data" / "dev_prompts.jsonl"
CONFIG = load_config(TINY)
BLOCK_SIZE = 16
NUM_EACH = 2
LEAST_TOKENS_PER_STEP = {"medusa": 1.35, "medusa in breadth": 1.6, "eagle3": 1.7, "eagle3 in breadth": 2.1}
METHODS = tuple(LEAST_TOKENS_PER_STEP)
BREADTH = 3


def proposer(method: str) -> CostlyProposer:
    name, breadth = method.split()[0], BREADTH if "breadth" in method else 1
    folder = find_heads(TINY, name)
    assert folder is not None
    if name == "eagle3":
        return make_eagle(folder, TINY, CONFIG, 2048, breadth=breadth)
    return make_medusa(folder, TINY, CONFIG, breadth=breadth)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def heads() -> dict[str, CostlyProposer]:
    return {method: proposer(method) for method in METHODS}


def make_engine(cache_dir: Path, **more: object) -> Engine:
    """Steps of 64 tokens cut the longer prompts into chunks."""
    options = EngineOptions(
        folder=TINY,
        cache_dir=cache_dir,
        device="cpu",
        compiled_step="on",
        cpu_threads=1,
        max_num_batched_tokens=64,
        max_num_seqs=16,
    )
    return load_engine(dataclasses.replace(options, **more))


@pytest.fixture(scope="module")
def engine(cache_dir: Path) -> Iterator[Engine]:
    made = make_engine(cache_dir)
    yield made
    made.speculator = None
    made.close()


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    found: dict[str, list[list[int]]] = {}
    for line in PROMPTS.read_text().splitlines():
        record = json.loads(line)
        chosen = found.setdefault(record["category"], [])
        if len(chosen) < NUM_EACH:
            text = record.get("prompt") or "".join(
                f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in record["messages"]
            )
            chosen.append(engine.tokenizer.encode(text + ("" if "prompt" in record else "<|assistant|>\n"))[-150:])
    return [ids for chosen in found.values() for ids in chosen]


def features_batch(sequences: list[Sequence]) -> StepBatch:
    """A token that decodes with two drafts, a chunk in the middle of a prompt, and a prompt that samples."""
    return build_batch(
        [
            ScheduledSequence(sequences[2], 2, 3, True, num_draft=2),
            ScheduledSequence(sequences[0], 3, 4, False),
            ScheduledSequence(sequences[1], 0, 5, True),
        ],
        BLOCK_SIZE,
    )


@pytest.mark.parametrize("compiled_step", ["on", "off"])
def test_a_step_keeps_what_the_training_forward_computes(compiled_step: str, cache_dir: Path) -> None:
    model = Model.load(TINY, dtype=torch.float32, device="cpu")
    ids, draft = [[2, 90, 300, 8, 77, 1200, 45, 6], [3, 3, 4000, 21, 9], [7, 8191, 12]], [5, 6]
    runner = make_engine(cache_dir, compiled_step=compiled_step, max_model_len=64).executor
    assert isinstance(runner, FeatureExecutor)
    sequences = [Sequence(i, each, SamplingParams(max_tokens=4)) for i, each in enumerate(ids)]
    for i, sequence in enumerate(sequences):
        sequence.block_ids.append(i)
    sequences[2].draft_ids = draft
    chunks = [ScheduledSequence(sequences[0], 0, 3, False), ScheduledSequence(sequences[2], 0, 2, False)]
    runner.execute(build_batch(chunks, BLOCK_SIZE))
    batch = features_batch(sequences)
    expected_RV = runner.execute(batch)
    for layers in ((2, 5, 8), (0, 4)):
        logits_RV, features = runner.execute_with_features(batch, FeatureKinds(hidden=True, layers=layers))
        whole = [model.hidden(torch.tensor([each]), feature_layers=layers) for each in (*ids[:2], [*ids[2], *draft])]
        streams = [torch.cat(each.features, dim=-1)[0] for each in whole]
        for found, expected in (
            (features.hidden_RE, torch.cat((whole[2].normed_BSE[0, 2:], whole[1].normed_BSE[0, 4:]))),
            (features.streams_TF, torch.cat((streams[2][2:], streams[0][3:7], streams[1]))),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        if compiled_step == "on":  # torch rounds by the number of rows
            assert torch.equal(logits_RV, expected_RV)
            only, nothing = runner.execute_with_features(batch, FeatureKinds(hidden=True))[1]
            assert nothing is None and torch.equal(only, features.hidden_RE)
        else:
            torch.testing.assert_close(logits_RV, expected_RV, rtol=1e-3, atol=1e-3)
    runner.close()


def asked_of(prompts: list[list[int]], engine: Engine) -> list[EngineRequest]:
    """Greedy, seeded, with penalties, with a stop string, short: all of them in one batch."""
    ends = {"stop_token_ids": engine.config.eos_token_ids}
    kinds = (
        (greedy(40, **ends), ()),
        (SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=3, **ends), ()),
        (
            SamplingParams(
                max_tokens=30, temperature=0.7, top_k=20, min_p=0.02, repetition_penalty=1.1, seed=4, **ends
            ),
            (),
        ),
        (SamplingParams(max_tokens=40, temperature=0.5, seed=5, **ends), (" the", "and ")),
        (greedy(7), ()),
    )
    return [EngineRequest(ids, (kinds[i % 5][0],), stop=kinds[i % 5][1]) for i, ids in enumerate(prompts)]


def answers(engine: Engine, asked: list[EngineRequest], *, together: bool = True) -> list[tuple[str, int, str | None]]:
    driver = Driver(engine)
    for i, request in enumerate(asked):
        driver.add(i, request)
        if not together:
            driver.run()
    driver.run()
    assert num_leaked_blocks(engine) == 0
    ends = [driver.ended[i, 0] for i in range(len(asked))]
    return [(driver.texts[i, 0], end.num_tokens, end.end) for i, end in enumerate(ends)]


def always(costly: CostlyProposer, num_tokens: int = 4) -> Speculator:
    return Speculator(num_tokens, costly=costly, policy=Always(num_tokens))


@pytest.mark.timeout(300)
def test_the_answers_are_those_without_heads_alone_together_and_after_prefix_hits(
    engine: Engine, heads: dict[str, CostlyProposer], prompts: list[list[int]]
) -> None:
    asked = asked_of([*prompts, prompts[0]], engine)
    engine.speculator = None
    expected = answers(engine, asked)
    for method in ("medusa in breadth", "eagle3 in breadth"):
        costly = heads[method]
        engine.scheduler.block_pool.reset()
        engine.speculator = always(costly)
        assert answers(engine, asked) == expected, method
        assert engine.speculator.num_accepted > 0
        num_hits = engine.scheduler.block_pool.num_hit_tokens
        assert answers(engine, asked[:2], together=False) == expected[:2], method
        assert engine.scheduler.block_pool.num_hit_tokens > num_hits, "every prompt is found in the cache"
    engine.speculator = Speculator(4, make_free=NgramProposer, costly=heads["eagle3"])
    assert answers(engine, asked[:4]) == expected[:4], "with prompt lookup, by measured costs"
    eagle = heads["eagle3"]
    assert isinstance(eagle, EagleProposer) and eagle.num_bytes == 0, "who left holds nothing"


def test_a_cache_that_is_too_small_preempts_and_the_answers_stay(
    cache_dir: Path, engine: Engine, heads: dict[str, CostlyProposer], prompts: list[list[int]]
) -> None:
    params = SamplingParams(max_tokens=48, temperature=0.8, seed=1)
    asked = [EngineRequest(ids[-30:], (params,)) for ids in prompts[1:]]
    engine.speculator = None
    expected = answers(engine, asked)
    crowded = make_engine(cache_dir, max_model_len=320, kv_cache_memory=20 * BLOCK_BYTES, prefix_caching=False)
    for method in ("medusa", "eagle3"):
        num_before = crowded.scheduler.num_preemptions
        crowded.speculator = always(heads[method])
        assert answers(crowded, asked) == expected, method
        assert crowded.scheduler.num_preemptions > num_before
    crowded.close()


@pytest.fixture(scope="module")
def greedy_requests(engine: Engine, prompts: list[list[int]]) -> list[EngineRequest]:
    return [EngineRequest(ids, (greedy(32, stop_token_ids=engine.config.eos_token_ids),)) for ids in prompts]


@pytest.fixture(scope="module")
def greedy_answers(engine: Engine, greedy_requests: list[EngineRequest]) -> list[tuple[str, int, str | None]]:
    engine.speculator = None
    return answers(engine, greedy_requests)


@pytest.mark.parametrize("method", METHODS)
def test_enough_guesses_are_right(
    method: str,
    engine: Engine,
    heads: dict[str, CostlyProposer],
    greedy_requests: list[EngineRequest],
    greedy_answers: list[tuple[str, int, str | None]],
) -> None:
    """Tokens of a verification over all categories. A position that is off by one would leave next to none."""
    engine.scheduler.block_pool.reset()
    engine.speculator = always(heads[method])
    assert answers(engine, greedy_requests) == greedy_answers
    figures = engine.speculator.figures[method.split()[0]]
    assert 1 + figures.num_accepted / figures.num_drafts > LEAST_TOKENS_PER_STEP[method]


class Watched:
    """A CostlyProposer that passes everything on, and keeps what was drafted after which tokens."""

    def __init__(self, costly: CostlyProposer) -> None:
        self._costly = costly
        self.name, self.wanted = costly.name, costly.wanted
        self.drafts: list[tuple[list[int], list[int]]] = []

    def observe(self, computed: list[Computed], features: Features) -> None:
        self._costly.observe(computed, features)

    def lag(self, sequence: Sequence) -> int:
        return self._costly.lag(sequence)

    def propose(self, sequences: list[Sequence], num_tokens: int) -> list:
        drafts = self._costly.propose(sequences, num_tokens)
        for sequence, draft in zip(sequences, drafts, strict=True):
            if draft is not None:
                self.drafts.append((list(sequence.token_ids), draft.token_ids))
        return drafts

    def num_passes(self, num_tokens: int) -> int:
        return self._costly.num_passes(num_tokens)

    def forget(self, sequence: Sequence) -> None:
        self._costly.forget(sequence)

    def close(self) -> None:
        pass


def watched_drafts(engine: Engine, costly: CostlyProposer, ids: list[int], num_tokens: int) -> list:
    """Every draft of two sequences at once, the prompt computed in chunks."""
    engine.scheduler.block_pool.reset()
    watched = Watched(costly)
    engine.speculator = always(watched, num_tokens)
    answers(engine, [EngineRequest(ids, (greedy(16),)), EngineRequest(ids[5:], (greedy(16),))])
    assert len(watched.drafts) > 10
    return watched.drafts


def test_medusa_drafts_what_the_heads_say_of_the_training_forwards_hidden_states(
    engine: Engine, heads: dict[str, CostlyProposer], prompts: list[list[int]]
) -> None:
    model = Model.load(TINY, dtype=torch.float32, device="cpu")
    costly = heads["medusa in breadth"]
    assert isinstance(costly, MedusaProposer)
    for token_ids, drafted in watched_drafts(engine, costly, prompts[0], 3):
        hidden_1E = model.hidden(torch.tensor([token_ids])).normed_BSE[0, -2:-1]
        best_KN = costly.heads.candidates([hidden_1E[0]], costly.heads.num_heads, 10)[0][:, 0].tolist()
        (shape,) = [tree for depth in (1, 2, 3) if (tree := costly.tree(depth, 1)).num_nodes == 1 + len(drafted)]
        wanted = [best_KN[depth - 1][rank] for depth, rank in zip(shape.depths[1:], shape.ranks[1:], strict=True)]
        assert drafted == wanted


def test_eagle_drafts_what_its_slow_twin_drafts_from_the_training_forwards_features(
    engine: Engine, heads: dict[str, CostlyProposer], prompts: list[list[int]]
) -> None:
    model = Model.load(TINY, dtype=torch.float32, device="cpu")
    num_same = num_all = 0
    for method, breadth in (("eagle3", 1), ("eagle3 in breadth", BREADTH)):
        costly = heads[method]
        assert isinstance(costly, EagleProposer) and costly.wanted is not None
        for token_ids, drafted in watched_drafts(engine, costly, prompts[0], 4):
            hidden = model.hidden(torch.tensor([token_ids]), feature_layers=costly.wanted.layers)
            twin = EagleDrafter(costly.draft, model.weights.embed_VE, max_context=256)
            twin.extend(torch.cat(hidden.features, dim=-1)[0, :-1], torch.tensor(token_ids[1:]))
            tree = twin.tree(1 + 4 * breadth, max_depth=4, top_k=breadth)
            num_same += tree.tokens_N.tolist()[1:] == drafted and (breadth > 1 or twin.chain(4) == drafted)
            num_all += 1
    assert num_same >= num_all - 2, "features differ in their last bits, so a near tie may fall the other way"


def test_eagle_holds_no_more_than_it_may_and_goes_on_after_it_lost_a_sequence(
    engine: Engine, prompts: list[list[int]]
) -> None:
    costly = proposer("eagle3")
    assert isinstance(costly, EagleProposer)
    small = EagleProposer(costly.draft, costly.embed_VE, (2, 5, 8), max_model_len=2048, max_bytes=300_000)
    asked = [EngineRequest(ids, (greedy(24),)) for ids in prompts[:6]]
    engine.speculator = None
    expected = answers(engine, asked)
    engine.scheduler.block_pool.reset()
    engine.speculator = always(small)
    driver = Driver(engine)
    for i, request in enumerate(asked):
        driver.add(i, request)
    most = 0
    while engine.has_work:
        driver.step()
        most = max(most, small.num_bytes)
    assert 200_000 < most <= 300_000
    assert [driver.texts[i, 0] for i in range(len(asked))] == [text for text, _, _ in expected]
    assert engine.speculator.num_accepted > 0


def test_nothing_is_drafted_beyond_the_context(cache_dir: Path, heads: dict[str, CostlyProposer]) -> None:
    short = make_engine(cache_dir, max_model_len=48)
    eagle = make_eagle(find_heads(TINY, "eagle3"), TINY, CONFIG, 48)
    for costly in (eagle, heads["medusa"]):
        short.speculator = None
        request = EngineRequest(list(range(100, 120)), (greedy(28),))
        expected = answers(short, [request])
        short.speculator = always(costly, 6)
        assert answers(short, [request]) == expected
    short.close()
