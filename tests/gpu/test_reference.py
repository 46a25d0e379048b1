"""The judge of GPU answers, on a CPU: what it must accept, and what it must refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from answers import DRAWN, GREEDY, OPTIONS, TEXTS, Answer, answers
from reference import LARGEST_GAP, Reference, relative

from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.sampler import SampledToken, Sampler
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

VOCABULARY = 8192
BOTH = pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """In float32."""
    speculation = SpeculationOptions("ngram")
    made = load_engine(dataclasses.replace(OPTIONS, device="cpu", compiled_step="off", speculation=speculation))
    made.speculator = Speculator(4, make_free=NgramProposer, policy=Always(4), clock=lambda: 0.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def rounded() -> Reference:
    """Plain torch in bfloat16."""
    return Reference(dtype=torch.bfloat16)


def continued(model: Reference, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
    """What this model answers, token by token."""
    sampler, sequences = Sampler(VOCABULARY), list[Sequence]()
    for i, prompt_ids in enumerate(prompts):
        sequences.append(Sequence(i + 1, list(prompt_ids), dataclasses.replace(params, seed=i)))
        sequences[-1].block_ids.extend(range(12 * i, 12 * i + 12))
    for number in range(params.max_tokens):
        starts = [len(s.token_ids) - 1 if number else 0 for s in sequences]
        scheduled = [
            ScheduledSequence(s, start, len(s.token_ids) - start, True)
            for s, start in zip(sequences, starts, strict=True)
        ]
        outcomes = sampler.sample(model.execute(build_batch(scheduled, 16)), sequences)
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            assert isinstance(outcome, SampledToken)
            sequence.token_ids.append(outcome.token_id)
    return [Answer(s.token_ids[: s.num_prompt_tokens], s.output_ids, s.params) for s in sequences]


@BOTH
def test_an_engine_in_float32_has_no_gaps(engine: Engine, reference: Reference, params: SamplingParams) -> None:
    for repeat in (1, 3):
        found = answers(engine, params, repeat=repeat)
        assert [len(answer.output_ids) for answer in found] == [48] * len(TEXTS)
        reference.check(found)
        assert max(float(reference.gaps(answer).max()) for answer in found) < 1e-3
    assert engine.speculator is not None and engine.speculator.num_accepted > 10


@BOTH
def test_bfloat16_alone_is_within_the_bounds(
    engine: Engine, reference: Reference, rounded: Reference, params: SamplingParams
) -> None:
    largest = 0.0
    for repeat in (1, 2):
        prompts = [engine.tokenizer.encode(text, add_special_tokens=False) * repeat for text in TEXTS]
        found = continued(rounded, prompts, params)
        reference.check(found)
        largest = max(largest, *(float(reference.gaps(answer).max()) for answer in found))
    assert largest > 0, "near ties part: bounds are needed"


@BOTH
def test_one_wrong_token_is_refused(engine: Engine, reference: Reference, params: SamplingParams) -> None:
    """The second best one, as a guess would be that nobody verified, at places where it is worse than rounding."""
    found = answers(engine, params)
    num_refused = num_tried = 0
    for prompt_ids, output_ids, own in found:
        logits_TV = reference.logits([*prompt_ids, *output_ids[:-1]], len(prompt_ids) - 1)
        for place in range(0, len(output_ids), 12):
            best, second = logits_TV[place].topk(2).indices.tolist()
            spoiled = list(output_ids)
            spoiled[place] = second if output_ids[place] == best else best
            answer = Answer(prompt_ids, spoiled, own)
            num_tried += 1
            if float(reference.gaps(answer)[place]) > LARGEST_GAP:
                num_refused += 1
                with pytest.raises(AssertionError, match=r"answer 0, token \d+: "):
                    reference.check([answer])
    assert num_refused > 0.5 * num_tried, f"{num_refused} of {num_tried}"


def test_answers_to_something_else_are_refused(engine: Engine, reference: Reference) -> None:
    """As of a cache that has lost one token of each prompt."""
    found = answers(engine, GREEDY)
    with pytest.raises(AssertionError, match="below the best"):
        reference.check([one._replace(prompt_ids=one.prompt_ids[:-3] + one.prompt_ids[-2:]) for one in found])


def test_many_small_gaps_are_refused(engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers(engine, GREEDY)
    gaps_T = torch.zeros(48)
    gaps_T[:5] = 0.1
    monkeypatch.setattr(reference, "gaps", lambda answer: gaps_T)
    with pytest.raises(AssertionError, match=r"10\.4% of 240 tokens"):
        reference.check(found)


def test_what_the_nucleus_cannot_hold_is_refused(engine: Engine, reference: Reference) -> None:
    (answer, *_) = answers(engine, DRAWN)
    unlikely = reference.logits(answer.prompt_ids)[-1].argmin()
    with pytest.raises(AssertionError, match="inf below"):
        reference.check([answer._replace(output_ids=[int(unlikely), *answer.output_ids[1:]])])


def test_near_ties_are_in_the_nucleus_in_either_order() -> None:
    """As an H200 had it: ' fox' 0.829, ' mouse' 0.072 and ' little' 0.053; rounded, ' little' came before ' mouse', and
    0.909 of the mass."""
    logits_1V = torch.tensor([[16.875, 14.924, 14.670, 13.399, 12.9, 12.8, 12.3, 12.2]])
    least_1V, most_1V = Reference._likelier(logits_1V, DRAWN)
    weights_1V = (logits_1V / DRAWN.temperature).softmax(-1)
    assert float(least_1V[0, 1]) == pytest.approx(float(weights_1V[0, 0]), abs=1e-6)
    assert float(most_1V[0, 1]) == pytest.approx(float(weights_1V[0, [0, 2]].sum()), abs=1e-6)
    assert float(least_1V[0, 2]) == pytest.approx(float(weights_1V[0, 0]), abs=1e-6)
    assert float(most_1V[0, 0]) == pytest.approx(0.0, abs=1e-6) == float(least_1V[0, 0])
    assert bool((least_1V <= most_1V + 1e-6).all())


def trees(num: int, num_nodes: int) -> Iterator[tuple[Sequence, StepBatch, list[int], list[list[int]]]]:
    """A sequence whose beginning is computed next, a tree after it, the tree's tokens and the longest paths."""
    for seed in range(num):
        rng = np.random.default_rng(seed)
        sequence = Sequence(seed, rng.integers(5, 8000, 150).tolist(), SamplingParams(max_tokens=9))
        sequence.block_ids.extend(range(3, 20))
        ids = rng.permutation(np.arange(5, 8000))[:num_nodes].tolist()
        parents = [int(rng.integers(-1, node)) for node in range(num_nodes)]
        sequence.draft_ids, sequence.draft_parents = ids, parents
        tree = build_batch([ScheduledSequence(sequence, 149, 1 + num_nodes, True, 0, num_nodes)], 16)
        sequence.draft_ids, sequence.draft_parents = [], []
        paths = [draft_tree.path_to(parents, node) for node in range(num_nodes)]
        yield sequence, tree, ids, sorted(paths, key=len)[-5:]


def test_trees_in_bfloat16_are_as_near_as_lines_and_a_wrong_mask_is_not(
    reference: Reference, rounded: Reference
) -> None:
    num_refused = 0
    for sequence, tree, ids, paths in trees(3, 40):
        rounded.execute(build_batch([ScheduledSequence(sequence, 0, 149, False)], 16))
        found_RV, spoiled_RV = rounded.execute(tree), rounded.execute(without_parents(tree))
        for path in paths:
            context = [*sequence.token_ids, *(ids[node] for node in path)]
            rows = [0, *(node + 1 for node in path)]
            line_RV = rounded.logits(context, 149)
            rounded.execute(build_batch([ScheduledSequence(sequence, 0, 149, False)], 16))  # where the line was
            reference.check_rows(found_RV[rows], line_RV, context)
            with pytest.raises(AssertionError, match="in a line"):
                reference.check_rows(spoiled_RV[rows], line_RV, context)
            num_refused += 1
    assert num_refused == 15


def without_parents(tree: StepBatch) -> StepBatch:
    """Nobody sees the token before it in the tree, except the sequence's last one."""
    assert tree.tree_masks_T is not None
    own = np.uint64(1) << np.arange(tree.num_tokens, dtype=np.uint64)
    return dataclasses.replace(tree, tree_masks_T=own | np.uint64(1))


def test_rows_are_compared_one_by_one() -> None:
    ones: Any = torch.ones(2, 4)
    assert relative(ones * torch.tensor([[1.1], [1.0]]), ones).tolist() == pytest.approx([0.1, 0.0], abs=1e-6)
