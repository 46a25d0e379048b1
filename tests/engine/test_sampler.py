"""The sampler: the right distribution, the same tokens in any company, and a bad row that harms nobody else."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autobot_llm.engine.noise import exponential_noise, exponential_noise_on_device, noise_keys
from autobot_llm.engine.sampler import (
    SampledToken,
    Sampler,
    SamplingFailure,
    draw_from_all,
    draw_from_all_on_device,
)
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.errors import EngineError, InvalidRequestError

V = 1000


def sequence(
    sequence_id: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> Sequence:
    new = Sequence(sequence_id, prompt or [1, 2, 3], SamplingParams(max_tokens=100, **params))
    new.token_ids += output or []
    return new


def logits_of(num_rows: int, seed: int = 0, vocab_size: int = V, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits_RV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    outcomes = Sampler(logits_RV.shape[1]).sample(logits_RV, sequences)
    assert all(isinstance(outcome, SampledToken) for outcome in outcomes), outcomes
    return [outcome.token_id for outcome in outcomes if isinstance(outcome, SampledToken)]


def by_transformers(logits_RV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """transformers' own processors in its own order, then our noise over the whole vocabulary."""
    tokens = []
    for logits_V, s in zip(logits_RV, sequences, strict=True):
        p = s.params
        processors = LogitsProcessorList()
        if p.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
        if not p.is_greedy:
            processors.append(TemperatureLogitsWarper(p.temperature))
        if p.top_k:
            processors.append(TopKLogitsWarper(p.top_k))
        if p.top_p < 1.0:
            processors.append(TopPLogitsWarper(p.top_p))
        if p.min_p:
            processors.append(MinPLogitsWarper(p.min_p))
        scores_1V = processors(torch.LongTensor([s.token_ids]), logits_V.unsqueeze(0).clone())
        if p.is_greedy:
            tokens.append(int(scores_1V.argmax()))
            continue
        noise_1V = exponential_noise(noise_keys([(p.seed, len(s.token_ids))]), np.arange(len(logits_V)))
        tokens.append(int((scores_1V.softmax(-1).numpy() / noise_1V).argmax()))
    return tokens


RESTRICTIONS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 64},
    {"top_k": 300},
    {"top_k": V + 5},
    {"top_p": 0.1},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.0001},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 200, "top_p": 0.8, "min_p": 0.02},
    {"top_p": 0.9, "min_p": 0.1},
    {},
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("restriction", RESTRICTIONS, ids=str)
def test_restrictions_keep_what_transformers_keeps(
    restriction: dict[str, Any], spread: float, temperature: float
) -> None:
    logits_RV = logits_of(20, seed=7, spread=spread)
    sequences = [sequence(i, seed=i, temperature=temperature, **restriction) for i in range(20)]
    assert sample(logits_RV, sequences) == by_transformers(logits_RV, sequences)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_repetition_penalty_is_transformers(penalty: float, temperature: float) -> None:
    logits_RV = logits_of(30, seed=3)
    best = logits_RV.topk(20).indices.tolist()
    sequences = [
        sequence(i, best[i][:12], best[i][6:18] * 2, seed=i, temperature=temperature, repetition_penalty=penalty)
        for i in range(30)
    ]
    assert sample(logits_RV, sequences) == by_transformers(logits_RV, sequences)


def test_greedy_takes_the_best_token_and_the_lowest_id_among_equals() -> None:
    logits_RV = torch.zeros(3, 8)
    logits_RV[1, [3, 6]] = 2.0
    logits_RV[2, 7] = 1.0
    assert sample(logits_RV, [sequence(i, temperature=0.0) for i in range(3)]) == [0, 3, 7]
    assert sample(logits_RV, [sequence(i, temperature=0.0, logit_bias={5: -1.0}) for i in range(3)]) == [0, 3, 7]


@pytest.mark.parametrize("temperature", [1e-8, 1e-38, 1e-60])
@pytest.mark.parametrize("restriction", [{}, {"top_p": 0.9}, {"top_k": 5}], ids=str)
def test_a_temperature_near_zero_is_greedy(temperature: float, restriction: dict[str, Any]) -> None:
    logits_RV = logits_of(20)
    sequences = [sequence(i, seed=i, temperature=temperature, **restriction) for i in range(20)]
    assert sample(logits_RV, sequences) == logits_RV.argmax(-1).tolist()


LOGITS_V = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])


def expected_distribution(params: dict[str, Any]) -> list[float]:
    """By hand, in float64, for the prompt [0] and the answer [1, 1, 2]."""
    scores = LOGITS_V.double().tolist()
    repetition = params.get("repetition_penalty", 1.0)
    for token in (0, 1, 2):
        scores[token] *= repetition if scores[token] < 0 else 1 / repetition
    for token, count in ((1, 2), (2, 1)):
        scores[token] -= params.get("presence_penalty", 0.0) + count * params.get("frequency_penalty", 0.0)
    weights = [math.exp(score / params.get("temperature", 1.0)) for score in scores]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    total, mass, kept = sum(weights), 0.0, []
    for token in order:
        if mass >= params.get("top_p", 1.0) * total:
            break
        kept.append(token)
        mass += weights[token]
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.6},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.4, "temperature": 0.8},
        {"presence_penalty": -0.5, "top_p": 0.9},
    ],
    ids=str,
)
def test_samples_follow_the_target_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 10,000 draws, 2,000 seeds at five places each. The seeds are fixed, so it cannot fail by luck;
    the bound is passed by a right sampler in all but one of 10,000 choices of seeds."""
    counts: Counter[int] = Counter()
    for place in range(5):
        sequences = [sequence(i, [0] * (place + 1), [1, 1, 2], seed=7919 * i, **params) for i in range(2000)]
        counts.update(sample(LOGITS_V.repeat(2000, 1), sequences))
    expected = expected_distribution(params)
    assert {token for token, p in enumerate(expected) if p == 0.0}.isdisjoint(counts)
    cells = [(counts[token], 10_000 * p) for token, p in enumerate(expected) if p > 0.0]
    statistic = sum((observed - wanted) ** 2 / wanted for observed, wanted in cells)
    assert statistic < {2: 15.1, 3: 18.4, 4: 21.1, 5: 23.5, 6: 25.7, 7: 27.9, 8: 29.9}[len(cells)]


def test_equal_logits_at_the_border_are_kept_together() -> None:
    """top_k=2 of three equal best: all three stay, as in transformers, rather than two that a sort happened upon."""
    logits_RV = torch.zeros(3000, 8)
    logits_RV[:, [1, 4, 6]] = 3.0
    counts = Counter(sample(logits_RV, [sequence(i, seed=i, top_k=2) for i in range(3000)]))
    assert set(counts) == {1, 4, 6} and min(counts.values()) > 850


@pytest.mark.parametrize("top_k", [1, 5, 64, 300])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.9])
def test_equal_logits_at_the_border_of_top_k_count_for_the_mass_of_top_p(top_k: int, top_p: float) -> None:
    """Rows of few distinct logits, so that far more than top_k tokens are among the top_k."""
    logits_RV = logits_of(200, seed=5, spread=1.2).round()
    sequences = [sequence(i, seed=i, top_k=top_k, top_p=top_p) for i in range(200)]
    tokens = sample(logits_RV, sequences)
    for logits_V, s, token in zip(logits_RV.double().numpy(), sequences, tokens, strict=True):
        weights_V = np.exp(logits_V - logits_V.max())
        weights_V[logits_V < np.sort(logits_V)[-top_k]] = 0.0
        mass_above_V = (weights_V * (logits_V > logits_V[:, None])).sum(-1)
        weights_V[mass_above_V >= top_p * weights_V.sum()] = 0.0
        noise_V = exponential_noise(noise_keys([(s.params.seed, len(s.token_ids))]), np.arange(V))[0]
        assert token == int((weights_V / noise_V).argmax())


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.9},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    {"top_p": 0.7, "frequency_penalty": 0.5},
    {"top_p": 0.999, "num_logprobs": 3},
    {"min_p": 0.001, "logit_bias": {5: 2.0}},
    {"top_k": 200},
    {"temperature": 0.0, "num_logprobs": 0},
]


def test_a_sequence_gets_the_same_tokens_alone_and_in_any_batch() -> None:
    logits_RV = logits_of(90, seed=11)
    sequences = [sequence(i, [i, i + 1], [i] * (i % 4), seed=i, **MIXED[i % len(MIXED)]) for i in range(90)]
    together = Sampler(V).sample(logits_RV, sequences)
    alone = [Sampler(V).sample(logits_RV[i : i + 1], [sequences[i]])[0] for i in range(90)]
    assert together == alone
    shuffled = np.random.default_rng(0).permutation(90).tolist()
    again = Sampler(V).sample(logits_RV[shuffled], [sequences[i] for i in shuffled])
    assert again == [together[i] for i in shuffled]


def test_a_seed_and_a_position_determine_the_draw() -> None:
    logits_RV = torch.zeros(1, V)
    first = sample(logits_RV, [sequence(1, seed=5)])
    assert first == sample(logits_RV, [sequence(2, [9, 8, 7], seed=5)]), "nothing but seed and position count"
    others = [sequence(1, seed=6), sequence(1, [1, 2, 3, 4], seed=5), sequence(1, seed=-5), sequence(1, seed=5 + 2**40)]
    assert all(sample(logits_RV, [other]) != first for other in others)


def test_drawing_on_the_device_and_on_the_host_gives_the_same_tokens() -> None:
    logits_RV = logits_of(300, seed=2)
    sequences = [sequence(i, seed=i - 150, temperature=0.5 + i / 100) for i in range(300)]
    params = [s.params for s in sequences]
    keys_R1 = noise_keys((s.params.seed, len(s.token_ids)) for s in sequences)
    assert draw_from_all(logits_RV, params, keys_R1) == draw_from_all_on_device(logits_RV, params, keys_R1)


def test_the_noise_is_splitmix64_on_the_host_and_on_the_device() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of seed 1234567
    keys_R1 = np.array([[1234567]], np.uint64)
    noise = exponential_noise(keys_R1, np.arange(4))
    assert noise[0] == pytest.approx([-math.log1p(-(bits >> 11) * 2.0**-53) for bits in published], rel=1e-6)
    on_device = exponential_noise_on_device(torch.tensor([[1234567]]), torch.arange(4))
    assert on_device.numpy() == pytest.approx(noise, rel=1e-6)


def test_the_noise_is_exponential_to_the_smallest_values() -> None:
    """Four million numbers: mean and variance 1, and as many below 10^-5 as there should be, all of them different."""
    noise = exponential_noise(noise_keys((seed, 0) for seed in range(40)), np.arange(100_000)).astype(np.float64)
    assert abs(noise.mean() - 1.0) < 0.003 and abs(noise.var() - 1.0) < 0.01
    small = noise[noise < 1e-5]
    assert abs(len(small) - 40) < 25 and len(np.unique(small)) == len(small)
    assert noise.min() > 0.0


def penalized_best(params: dict[str, Any], logits: list[float], prompt: list[int], output: list[int]) -> int:
    return sample(torch.tensor([logits]), [sequence(0, prompt, output, temperature=0.0, **params)])[0]


def test_the_frequency_penalty_counts_the_answer_alone() -> None:
    # Token 0 was generated three times: 5.0 - 3 x 0.5 = 3.5. Token 1 stands in the prompt only.
    assert penalized_best({"frequency_penalty": 0.5}, [5.0, 3.6, 0.0], [1, 1, 1], [0, 0, 0]) == 1
    assert penalized_best({"frequency_penalty": 0.5}, [5.0, 3.4, 0.0], [1, 1, 1], [0, 0, 0]) == 0


def test_the_presence_penalty_is_the_same_for_one_and_for_many() -> None:
    # 5.0 - 1.5 = 3.5, however often token 0 was generated.
    assert penalized_best({"presence_penalty": 1.5}, [5.0, 3.6, 0.0], [1], [0]) == 1
    assert penalized_best({"presence_penalty": 1.5}, [5.0, 3.4, 0.0], [1], [0, 0, 0]) == 0
    assert penalized_best({"presence_penalty": -1.5}, [5.0, 6.0, 0.0], [1], [0]) == 0


def test_counts_kept_from_step_to_step_equal_counts_made_anew() -> None:
    params: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    kept, sampler = sequence(0, [5, 6, 7], **params), Sampler(V)
    for step in range(40):
        logits_RV = logits_of(1, seed=step % 3)
        outcome = sampler.sample(logits_RV, [kept])[0]
        assert outcome == Sampler(V).sample(logits_RV, [kept])[0]
        assert isinstance(outcome, SampledToken)
        kept.token_ids.append(outcome.token_id)
    assert len(set(kept.output_ids)) > 10, "the penalties drive it away from what it said"


def test_a_forgotten_id_starts_anew() -> None:
    logits_RV = torch.tensor([[5.0, 4.0]])
    sampler = Sampler(2)
    old = sequence(0, [1], [0], temperature=0.0, presence_penalty=2.0)
    assert sampler.sample(logits_RV, [old]) == [SampledToken(1)]
    sampler.forget(old)
    assert sampler.sample(logits_RV, [sequence(0, [1], [0], temperature=0.0)]) == [SampledToken(0)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_token_cannot_come_before_min_tokens(temperature: float) -> None:
    logits_RV = torch.tensor([[50.0, 40.0, 0.0, 0.0]])
    params: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": frozenset({0, 1}), "temperature": temperature}
    assert sample(logits_RV, [sequence(0, output=[3], **params)])[0] in (2, 3)
    assert sample(logits_RV, [sequence(0, output=[3, 3], **params)]) == [0]


def test_logit_bias_forces_and_forbids() -> None:
    logits_RV = logits_of(20)
    best = logits_RV.argmax(-1).tolist()
    assert sample(logits_RV, [sequence(i, temperature=0.0, logit_bias={7: 100.0}) for i in range(20)]) == [7] * 20
    second = logits_RV.topk(2).indices[:, 1].tolist()
    forbidden = [sequence(i, temperature=0.0, logit_bias={best[i]: -100.0}) for i in range(20)]
    assert sample(logits_RV, forbidden) == second
    drawn = [sequence(i, seed=i, logit_bias={7: 100.0}) for i in range(20)]
    assert sample(logits_RV, drawn) == [7] * 20


def test_log_probabilities_are_the_models_own_before_any_adjustment() -> None:
    logits_RV = logits_of(3)
    sequences = [
        sequence(0, temperature=0.0, num_logprobs=0),
        sequence(1, temperature=0.5, top_k=1, num_logprobs=4, logit_bias={11: 100.0}),
        sequence(2, temperature=0.0),
    ]
    expected_RV = logits_RV.double().log_softmax(-1)
    first, second, third = Sampler(V).sample(logits_RV, sequences)
    assert isinstance(first, SampledToken) and isinstance(second, SampledToken)
    assert first.logprob == pytest.approx(expected_RV[0].max().item(), abs=1e-5) and first.top == ()
    assert second.token_id == 11
    assert second.logprob == pytest.approx(expected_RV[1, 11].item(), abs=1e-5)
    best = expected_RV[1].topk(4)
    assert [token for token, _ in second.top] == best.indices.tolist()
    assert [logprob for _, logprob in second.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert third == SampledToken(int(logits_RV[2].argmax()))


@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "minus infinity for every token")]
)
@pytest.mark.parametrize("only_greedy", [True, False])
def test_a_row_the_model_broke_fails_alone(value: float, name: str, only_greedy: bool) -> None:
    params: list[dict[str, Any]] = [{"temperature": 0.0}] * 9 if only_greedy else MIXED
    logits_RV = logits_of(9, seed=4)
    expected = Sampler(V).sample(logits_RV, [sequence(i, seed=i, **params[i]) for i in range(9)])
    for broken in range(9):
        damaged_RV = logits_RV.clone()
        damaged_RV[broken, slice(None) if value == -math.inf else 600] = value
        outcomes = Sampler(V).sample(damaged_RV, [sequence(i, seed=i, **params[i]) for i in range(9)])
        failure = outcomes.pop(broken)
        assert isinstance(failure, SamplingFailure) and isinstance(failure.error, EngineError)
        assert f"hold {name}," in failure.error.message
        assert outcomes == expected[:broken] + expected[broken + 1 :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_excludes_every_token_is_told_so(temperature: float) -> None:
    excluded = sequence(
        0, temperature=temperature, min_tokens=1, stop_token_ids=frozenset({0, 1}), logit_bias={2: -math.inf}
    )
    fine = sequence(1, temperature=temperature, logit_bias={2: 100.0})
    failure, token = Sampler(3).sample(torch.zeros(2, 3), [excluded, fine])
    assert isinstance(failure, SamplingFailure) and isinstance(failure.error, InvalidRequestError)
    assert "exclude every token" in failure.error.message
    assert token == SampledToken(2)


def test_the_models_logits_are_left_as_they_were() -> None:
    logits_RV = logits_of(len(MIXED))
    before = logits_RV.clone()
    sample(logits_RV, [sequence(i, output=[i], **params) for i, params in enumerate(MIXED)])
    assert torch.equal(logits_RV, before)
