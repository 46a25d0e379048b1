"""Whatever is drafted, and however a step with drafts meets the scheduler: the answers are those without drafts."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engines import Driver, num_leaked_blocks
from fake_device import VOCAB_SIZE, FakeDevice, logits_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import END_TOKEN, SIZE, Abort, Arrival, Check, Steps, actions, alone, crowded_arrival, engine_on

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sampler import SampledToken, Sampler
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.proposer import Draft
from autobot_llm.engine.speculative.speculator import Speculator


class Guesser:
    """FreeProposer that knows the fake device's model, and is wrong as often as it is told: a draft of any length whose
    tokens are right with a probability of `skill`."""

    name = "guesser"

    def __init__(self, skill: float, seed: int) -> None:
        self._skill = skill
        self._rng = random.Random(seed)
        self._sampler = Sampler(VOCAB_SIZE)

    def read(self, sequence: Sequence, num_tokens: int) -> None:
        pass

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        token_ids = list(sequence.token_ids)
        num_tokens = self._rng.randint(0, num_tokens)
        for _ in range(num_tokens):
            double = Sequence(-1, token_ids, sequence.params)
            (best,) = self._sampler.sample(torch.from_numpy(logits_of(tuple(token_ids))[None].copy()), [double])
            self._sampler.forget(double)
            is_right = self._rng.random() < self._skill and isinstance(best, SampledToken)
            token_ids.append(best.token_id if is_right else self._rng.randrange(VOCAB_SIZE))
        return Draft(token_ids[len(sequence.token_ids) :], "") if num_tokens else None

    def forget(self, sequence: Sequence) -> None:
        pass


def guessing(engine: Engine, skill: float = 0.7, seed: int = 0, num_tokens: int = 5) -> Engine:
    engine.speculator = Speculator(
        num_tokens, make_free=lambda _: Guesser(skill, seed), policy=Always(num_tokens), clock=lambda: 0.0
    )
    return engine


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 6),
    num_extra_tokens=st.integers(0, 20),
    prefix_caching=st.booleans(),
    num_swap_blocks=st.sampled_from([0, 3, 100]),
    scheduling_policy=st.sampled_from(["fcfs", "priority"]),
    skill=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    num_tokens=st.integers(1, 9),
)
def test_any_schedule_gives_the_answers_without_drafts(
    actions: list[Arrival | Steps | Abort],
    num_blocks: int,
    max_num_seqs: int,
    num_extra_tokens: int,
    prefix_caching: bool,
    num_swap_blocks: int,
    scheduling_policy: str,
    skill: float,
    num_tokens: int,
) -> None:
    """No block is leaked, shared while it is written, or found under tokens that it does not hold."""
    engine = engine_on(
        FakeDevice(num_blocks, SIZE),
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + num_extra_tokens,
        prefix_caching=prefix_caching,
        num_swap_blocks=num_swap_blocks,
        scheduling_policy=scheduling_policy,
    )
    check = Check(guessing(engine, skill, num_blocks, num_tokens))
    check.play(actions)
    check.finish()


def test_crowded_schedules_with_drafts_preempt_swap_share_stop_and_abort() -> None:
    """The same promises where everything that can go wrong is known to happen."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        num_seqs, num_blocks = rng.randint(2, 6), rng.randint(8, 14)
        engine = engine_on(
            FakeDevice(num_blocks, SIZE),
            num_blocks,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_seqs + rng.randint(0, 20),
            num_swap_blocks=rng.choice([0, 6, 50]),
        )
        check = Check(guessing(engine, 0.8, seed))
        for _ in range(12):
            check.arrive(crowded_arrival(rng))
            for _ in range(rng.randrange(4)):
                check.step()
            if check.open_requests() and rng.random() < 0.2:
                check.abort(rng.choice(check.open_requests()))
        check.finish()
        assert engine.speculator is not None
        scheduler, speculator = engine.scheduler, engine.speculator
        seen["preempted"] += scheduler.num_preemptions > 0
        seen["swapped"] += scheduler.swap_space is not None and scheduler.swap_space.num_swaps > 0
        seen["shared"] += scheduler.block_pool.num_hit_tokens > 0
        seen["accepted"] += speculator.num_accepted > 0
        seen["rejected"] += speculator.num_accepted < speculator.num_proposed
        seen["stopped"] += any(end.end == "stop" for end in check.ended.values())
    assert len(seen) == 6 and min(seen.values()) >= 10, seen


PARAMS = {
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.2, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {20: 3.0, 21: -100.0}},
    "shortest": {"min_tokens": 9, "logit_bias": {END_TOKEN: 4.0}},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.1},
    "log probabilities": {"num_logprobs": 3},
}


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("name", PARAMS)
def test_each_sampling_parameter_gives_the_same_answer_with_drafts(name: str, temperature: float) -> None:
    """Penalties and minimum lengths look at the tokens before: those of the draft, as far as they were right."""
    for seed in range(12):
        params = SamplingParams(
            max_tokens=16, temperature=temperature, seed=seed, stop_token_ids=frozenset({END_TOKEN}), **PARAMS[name]
        )
        request = EngineRequest([20, 21, 22 + seed % 3], (params,))
        plain = Driver(engine_on(FakeDevice(32, SIZE), 32))
        drafted = Driver(guessing(engine_on(FakeDevice(32, SIZE), 32), seed=seed))
        for driver in (plain, drafted):
            driver.add(0, request)
            driver.run()
        assert drafted.texts == plain.texts
        assert drafted.logprobs == plain.logprobs and drafted.token_ids == plain.token_ids
        assert drafted.ended[0, 0].num_tokens == plain.ended[0, 0].num_tokens
        assert drafted.engine.speculator is not None
        assert drafted.engine.num_steps <= plain.engine.num_steps


def test_an_answer_never_exceeds_its_limit_or_the_context() -> None:
    engine = guessing(engine_on(FakeDevice(32, SIZE), 32, max_model_len=16), skill=1.0, num_tokens=9)
    driver = Driver(engine)
    params = SamplingParams(max_tokens=11, temperature=0.0)
    driver.add(0, EngineRequest([20] * 5, (params,)))
    driver.add(1, EngineRequest([21] * 5, (dataclasses.replace(params, max_tokens=1),)))
    driver.run()
    assert [driver.ended[i, 0].num_tokens for i in range(2)] == [11, 1]
    assert num_leaked_blocks(engine) == 0


def test_a_broken_row_in_a_draft_ends_its_own_request_with_what_came_before() -> None:
    class Spoiled(FakeDevice):
        def compute(self, batch: Any, last_tokens: list[int]) -> Any:
            logits_RV = super().compute(batch, last_tokens)
            if len(logits_RV) > 3:
                logits_RV[2] = np.nan
            return logits_RV

    engine = guessing(engine_on(Spoiled(32, SIZE), 32, prefix_caching=False), skill=1.0, seed=3)
    driver = Driver(engine)
    driver.add(0, EngineRequest([20, 21], (SamplingParams(max_tokens=20, temperature=0.0),)))
    driver.run()
    whole = alone("broken row", lambda: EngineRequest([20, 21], (SamplingParams(max_tokens=20, temperature=0.0),)))
    error = driver.ended[0, 0].error
    assert error is not None and "NaN" in str(error)
    assert driver.ended[0, 0].num_tokens > 0 and whole[0][0].startswith(driver.texts[0, 0])
    assert num_leaked_blocks(engine) == 0


def test_the_figures_of_a_request_add_up() -> None:
    engine = guessing(engine_on(FakeDevice(32, SIZE), 32), skill=0.8)
    stats = RequestStats()
    engine.add(0, EngineRequest([20, 21], (SamplingParams(max_tokens=20, temperature=0.0),)), stats)
    num_tokens = sum(1 for _ in _outputs(engine))
    speculator = engine.speculator
    assert speculator is not None
    assert stats.num_accepted_tokens == speculator.num_accepted > 0
    assert stats.num_draft_tokens == speculator.num_proposed > speculator.num_accepted
    assert num_tokens == 20 - speculator.num_accepted, "one output a step"
    assert "guesser" in next(iter(speculator.lines()))


def _outputs(engine: Engine) -> Iterator[Any]:
    while engine.has_work:
        yield from engine.step()


def test_drafted_tokens_are_distributed_as_the_model_says() -> None:
    """Chi-square over seeds, of the first three tokens of an answer under top-k, top-p, penalties and drafts."""
    params = SamplingParams(max_tokens=3, temperature=1.2, top_k=12, top_p=0.9, presence_penalty=0.8)
    prompt = [20, 21, 22]
    num_seeds = 1500
    counts: Counter[int] = Counter()
    second: Counter[int] = Counter()
    for start in range(0, num_seeds, 4):
        engine = engine_on(FakeDevice(32, SIZE), 32, max_num_batched_tokens=64)
        engine.speculator = Speculator(3, make_free=NgramOrNothing, policy=Always(3), clock=lambda: 0.0)
        choices = tuple(dataclasses.replace(params, seed=seed) for seed in range(start, start + 4))
        engine.add(0, EngineRequest(prompt, choices), RequestStats())
        sequences = [choice.sequence for choice in engine._choices.values()]
        for _ in _outputs(engine):
            pass
        for sequence in sequences:
            counts[sequence.output_ids[0]] += 1
            second[sequence.output_ids[1]] += 1
    first_V = probabilities(prompt, [], params)
    second_V = sum(first_V[token] * probabilities(prompt, [token], params) for token in np.flatnonzero(first_V))
    for seen, expected_V in ((counts, first_V), (second, second_V)):
        likely = [token for token in range(VOCAB_SIZE) if expected_V[token] * num_seeds >= 5]
        rest = 1 - sum(expected_V[token] for token in likely)
        statistic = sum((seen[t] - num_seeds * expected_V[t]) ** 2 / (num_seeds * expected_V[t]) for t in likely)
        assert all(expected_V[token] > 0 for token in seen), "nothing that is excluded is drawn"
        assert rest < 0.2
        assert statistic < len(likely) + 4 * (2 * len(likely)) ** 0.5, "four standard deviations of chi-square"


class NgramOrNothing(Guesser):
    """Half-right guesses, made by the observer that a speculator gives."""

    def __init__(self, _observe: Any) -> None:
        super().__init__(0.6, 1)


def probabilities(prompt: list[int], answer: list[int], params: SamplingParams) -> Any:
    """What the model, the penalty, the temperature, top-k and top-p make of the next token, written out."""
    logits_V = logits_of((*prompt, *answer)).astype(np.float64)
    for token in set(answer):
        logits_V[token] -= params.presence_penalty
    weights_V = np.exp(logits_V / params.temperature)
    order = np.argsort(-weights_V)
    weights_V[order[params.top_k :]] = 0
    shares = weights_V[order] / weights_V.sum()
    kept = np.cumsum(shares) - shares < params.top_p
    weights_V[order[~kept]] = 0
    return weights_V / weights_V.sum()


def test_prompt_lookup_drafts_on_a_device_that_repeats_itself() -> None:
    """The real proposer, where it is right: fewer steps, the same answer."""
    prompt = [20, 21, 22, 23, 20, 21]
    params = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={22: 60.0})
    plain = Driver(engine_on(FakeDevice(32, SIZE), 32))
    drafted = Driver(engine_on(FakeDevice(32, SIZE), 32))
    drafted.engine.speculator = Speculator(5, make_free=NgramProposer, policy=Always(5))
    for driver in (plain, drafted):
        driver.add(0, EngineRequest(prompt, (params,)))
        driver.run()
    assert drafted.texts == plain.texts
    assert drafted.engine.num_steps < plain.engine.num_steps / 2
