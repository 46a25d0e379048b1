"""Drafts that branch: whatever their shape, and however a step with them meets the scheduler, the answers are those
without drafts, token by token and seed by seed. So sampled answers are distributed as those are, and there is no
statistical test of trees beside that of test_speculation.py: see acceptance.py."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
import torch
from engines import TINY, Driver, num_leaked_blocks
from fake_device import VOCAB_SIZE, FakeDevice, FakeTreeDevice, logits_of
from grammars import compiled
from guessed_trees import TreeGuesser, guessed_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import END_TOKEN, SIZE, Abort, Arrival, Check, Steps, actions, crowded_arrival, engine_on

from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.batching.draft_tree import MAX_TREE_TOKENS, ROOT
from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.grammar.compiler import GrammarCompiler
from autobot_llm.engine.grammar.spec import GrammarSpec
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.request import EngineRequest
from autobot_llm.engine.sampler import SampledToken, Sampler
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.acceptance import verify
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.possible import possible
from autobot_llm.engine.speculative.proposer import Draft
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.engine.tokenizer import Tokenizer

MAX_DRAFT = MAX_TREE_TOKENS - 1
_outputs: dict[str, list[int]] = {}


class Knowing(TreeGuesser):
    """TreeGuesser that works out what the fake device's model says."""

    def output_of(self, sequence: Sequence) -> list[int]:
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        key = repr((prompt, sequence.params))
        if key not in _outputs:
            sampler, double = Sampler(VOCAB_SIZE), Sequence(-1, prompt, sequence.params)
            for _ in range(sequence.params.max_tokens):
                logits_V = torch.from_numpy(logits_of(tuple(double.token_ids)).copy())
                (outcome,) = sampler.sample(logits_V[None], [double])
                assert isinstance(outcome, SampledToken)
                double.token_ids.append(outcome.token_id)
            _outputs[key] = double.output_ids
        return _outputs[key]


def guessing(engine: Engine, seed: int = 0, num_tokens: int = MAX_DRAFT) -> tuple[Engine, Knowing]:
    guesser = Knowing({}, seed, VOCAB_SIZE, num_tokens)
    engine.speculator = Speculator(MAX_DRAFT, make_free=lambda _: guesser, policy=Always(num_tokens), clock=lambda: 0.0)
    return engine, guesser


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 6),
    num_extra_tokens=st.integers(0, 40),
    prefix_caching=st.booleans(),
    num_swap_blocks=st.sampled_from([0, 3, 100]),
    num_tokens=st.sampled_from([1, 4, 12, MAX_DRAFT]),
)
def test_any_schedule_gives_the_answers_without_trees(
    actions: list[Arrival | Steps | Abort],
    num_blocks: int,
    max_num_seqs: int,
    num_extra_tokens: int,
    prefix_caching: bool,
    num_swap_blocks: int,
    num_tokens: int,
) -> None:
    """Trees, lines and no drafts in one step; no block leaks, and what is published holds the tokens it is found by."""
    engine = engine_on(
        FakeTreeDevice(num_blocks, SIZE),
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + num_extra_tokens,
        prefix_caching=prefix_caching,
        num_swap_blocks=num_swap_blocks,
    )
    check = Check(guessing(engine, num_blocks, num_tokens)[0])
    check.play(actions)
    check.finish()


def test_crowded_schedules_with_trees_preempt_swap_share_stop_and_move() -> None:
    """The same promises where everything that can go wrong is known to happen."""
    seen: Counter[str] = Counter()
    for seed in range(25):
        rng = random.Random(seed)
        num_seqs, num_blocks = rng.randint(2, 6), rng.randint(8, 12)
        device = FakeTreeDevice(num_blocks, SIZE)
        engine, guesser = guessing(
            engine_on(
                device,
                num_blocks,
                max_num_seqs=num_seqs,
                max_num_batched_tokens=num_seqs + rng.randint(10, 40),
                num_swap_blocks=rng.choice([0, 6, 50]),
            ),
            seed,
            num_tokens=6,
        )
        check = Check(engine)
        for _ in range(12):
            check.arrive(crowded_arrival(rng))
            for _ in range(rng.randrange(4)):
                check.step()
            if check.open_requests() and rng.random() < 0.2:
                check.abort(rng.choice(check.open_requests()))
        check.finish()
        scheduler, speculator = engine.scheduler, engine.speculator
        assert speculator is not None
        seen["preempted"] += scheduler.num_preemptions > 0
        seen["swapped"] += scheduler.swap_space is not None and scheduler.swap_space.num_swaps > 0
        seen["shared"] += scheduler.block_pool.num_hit_tokens > 0
        seen["moved"] += device.num_moves > 0
        seen["rejected"] += 0 < speculator.num_accepted < speculator.num_proposed
        seen["stopped"] += any(end.end == "stop" for end in check.ended.values())
        seen["mixed"] += guesser.num_trees > 0 and guesser.num_lines > 0
    assert len(seen) == 7 and min(seen.values()) >= 4, seen


PARAMS = {
    "greedy": {"temperature": 0.0},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.5},
    "penalties": {"temperature": 1.3, "presence_penalty": 1.2, "frequency_penalty": 0.7},
    "bias and shortest": {"temperature": 0.8, "min_tokens": 9, "logit_bias": {END_TOKEN: 4.0, 20: 3.0}},
    "restricted": {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    "log probabilities": {"temperature": 1.0, "num_logprobs": 3},
}


@pytest.mark.parametrize("name", PARAMS)
def test_each_sampling_parameter_gives_the_same_answer_with_trees(name: str) -> None:
    num_accepted = 0
    for seed in range(6):
        params = SamplingParams(max_tokens=16, seed=seed, stop_token_ids=frozenset({END_TOKEN}), **PARAMS[name])
        request = EngineRequest([20, 21, 22 + seed % 3], (params,))
        plain = Driver(engine_on(FakeTreeDevice(64, SIZE), 64))
        drafted = Driver(guessing(engine_on(FakeTreeDevice(64, SIZE), 64, max_num_batched_tokens=70), seed)[0])
        for driver in (plain, drafted):
            driver.add(0, request)
            driver.run()
        assert drafted.texts == plain.texts
        assert drafted.logprobs == plain.logprobs and drafted.token_ids == plain.token_ids
        assert drafted.ended[0, 0].num_tokens == plain.ended[0, 0].num_tokens
        assert drafted.engine.speculator is not None
        num_accepted += drafted.engine.speculator.num_accepted
    assert num_accepted > 20


def test_a_tree_at_the_end_of_the_context_exceeds_neither_it_nor_the_answer() -> None:
    """63 guesses where four more tokens are allowed: they have places in the cache, and no position beyond the end."""
    device = FakeTreeDevice(64, SIZE)
    engine, _ = guessing(engine_on(device, 64, max_model_len=16, max_num_batched_tokens=200), seed=1)
    driver = Driver(engine)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    driver.add(0, EngineRequest([20] * 12, (params,)))
    driver.add(1, EngineRequest([21] * 12, (dataclasses.replace(params, max_tokens=1),)))
    driver.add(2, EngineRequest([22] * 12, (dataclasses.replace(params, max_tokens=2),)))
    driver.run()
    assert [driver.ended[i, 0].num_tokens for i in range(3)] == [4, 1, 2]
    assert num_leaked_blocks(engine) == 0


def test_a_device_that_knows_no_trees_gets_the_first_path() -> None:
    class Fork(TreeGuesser):
        def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
            one, two, *_ = [*self.output_of(sequence)[sequence.num_output_tokens :], 0, 0]
            return Draft([one, (one + 1) % VOCAB_SIZE, two, two], "", [ROOT, ROOT, 0, 1])

    prompt = [20, 21, 22]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    plain = Driver(engine_on(FakeDevice(32, SIZE), 32))
    plain.add(0, EngineRequest(prompt, (params,)))
    (choice,) = plain.engine._choices.values()
    plain.run()
    outputs = {tuple(prompt): choice.sequence.output_ids}
    drafted = Driver(engine_on(FakeDevice(32, SIZE), 32))
    speculator = Speculator(4, make_free=lambda _: Fork(outputs, 0, VOCAB_SIZE), policy=Always(4), clock=lambda: 0.0)
    drafted.engine.speculator = speculator
    drafted.add(0, EngineRequest(prompt, (params,)))
    drafted.run()
    assert drafted.texts == plain.texts
    assert speculator.num_accepted == speculator.num_proposed, "two in a row, and no fork"
    assert drafted.engine.num_steps == 1 + 11 // 3 + 1


def test_a_verdict_names_the_rows_of_the_accepted_path() -> None:
    """The hidden state of the last accepted token, which heads draft from, is in the last of them."""
    rng = random.Random(3)
    for seed in range(20):
        params = SamplingParams(max_tokens=20, temperature=seed % 2 * 1.0, seed=seed, repetition_penalty=1 + seed % 3)
        first = Sequence(0, [20, 21], params)
        sequence = Sequence(1, [22, 23, 24], params)
        truth = Knowing({}, 0, VOCAB_SIZE).output_of(sequence)
        draft = guessed_tree(rng, truth, rng.randint(0, 8), rng.randint(0, 20), VOCAB_SIZE)
        assert draft.parents is not None
        first.draft_ids = [1, 2]
        sequence.draft_ids, sequence.draft_parents = draft.token_ids, draft.parents
        number = rng.randint(0, len(draft.token_ids))
        for one, start in ((first, 0), (sequence, 16)):
            one.block_ids.extend(range(start, start + 16))
        scheduled = [ScheduledSequence(first, 0, 4, True, 0, 2), ScheduledSequence(sequence, 0, 3, True, 0, 0)]
        if number:
            device = FakeTreeDevice(32, SIZE)
            device.execute(build_batch([ScheduledSequence(sequence, 0, 2, False)], SIZE))
            scheduled[1] = ScheduledSequence(sequence, 2, 1 + number, True, 0, number)
            logits_RV = device.execute(build_batch(scheduled, SIZE))
        else:
            logits_RV = FakeTreeDevice(32, SIZE).execute(build_batch(scheduled, SIZE))
        _, verdict = verify(Sampler(VOCAB_SIZE), logits_RV, scheduled)
        tokens = [outcome.token_id for outcome in verdict.outcomes if isinstance(outcome, SampledToken)]
        assert tokens == truth[: len(tokens)]
        assert [draft.token_ids[node] for node in verdict.path] == tokens[:-1]
        assert verdict.num_accepted == len(verdict.path) and verdict.rows[0] == 3
        for depth, row in enumerate(verdict.rows):
            assert np.array_equal(logits_RV[row], logits_of((22, 23, 24, *truth[:depth])))
        assert sequence.token_ids == [22, 23, 24]


def test_nothing_follows_a_stop_token_in_a_tree() -> None:
    sequence = Sequence(0, [20], SamplingParams(max_tokens=9, stop_token_ids=frozenset({END_TOKEN})))
    draft = possible(Draft([5, END_TOKEN, 6, 7, 8, 9], "", [ROOT, ROOT, 1, 0, 2, 3]), sequence)
    assert draft == Draft([5, END_TOKEN, 7, 9], "", [ROOT, ROOT, 0, 2])


def test_a_token_that_the_grammar_forbids_leaves_a_tree_with_all_that_follow_it() -> None:
    tokenizer, config = Tokenizer.from_folder(TINY), load_config(TINY)
    compiler = GrammarCompiler.for_model(tokenizer, config.vocab_size, config.eos_token_ids)
    try:
        grammar = compiled(compiler, GrammarSpec.regex("[ab](c|d)+", "response_format"))
    finally:
        compiler.close()
    a, b, c, d, x = (tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "abcdx")
    sequence = Sequence(0, [20], SamplingParams(max_tokens=9, grammar=grammar))
    draft = possible(
        Draft([x, a, c, c, b, a, d, c], "", [ROOT, ROOT, 0, 1, ROOT, 3, 4, 6]), sequence
    )  # x and what follows it, and the a after ac
    assert draft == Draft([a, c, b, d, c], "", [ROOT, 0, ROOT, 2, 3])
    assert sequence.matcher is not None and sequence.matcher.num_allowed([a, c]) == 2, "where it was"


@given(st.data())
def test_the_shape_of_a_tree_is_seen_alike_by_all_who_ask(data: st.DataObject) -> None:
    """Depths, masks, paths, leaves and what remains of it, each by what the parents say."""
    size = data.draw(st.integers(0, MAX_DRAFT))
    parents = [data.draw(st.integers(ROOT, node - 1)) for node in range(size)]
    assert draft_tree.is_tree(parents)
    depths, masks = draft_tree.depths(parents), draft_tree.masks(parents)
    for node in range(size):
        path = draft_tree.path_to(parents, node)
        assert [parents[n] for n in path] == [ROOT, *path[:-1]] and path[-1:] == [node]
        assert depths[node] == len(path)
        assert masks[node + 1] == 1 | sum(1 << (n + 1) for n in path)
    assert draft_tree.is_line(parents) == (depths == list(range(1, size + 1)))
    assert draft_tree.leaves(parents) == [n for n in range(size) if n not in parents]
    best = draft_tree.first_path(parents)
    assert best == (draft_tree.path_to(parents, best[-1]) if best else [])
    assert not best or best[-1] in draft_tree.leaves(parents)
    kept = [n for n in range(size) if n in best or depths[n] == 1]
    draft = Draft(list(range(size)), "", parents).only(kept)
    assert draft.token_ids == kept and draft.parents is not None and draft_tree.is_tree(draft.parents)
    assert draft_tree.depths(draft.parents) == [depths[n] for n in kept]
    assert not draft_tree.is_tree([*parents, size])
