"""What a method is shown of the steps of a device that computes beside the host, and its trees there: whatever the
schedule, features belong to the tokens that they are said to belong to, and the answers are those without drafts."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Any

import numpy as np
import pytest
import torch
from engines import TINY
from fake_device import VOCAB_SIZE, FakePipelinedDevice, FakeTreeDevice, logits_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import SIZE, Abort, Arrival, Check, Steps, actions, engine_on
from test_speculation_beside_device import Now
from test_tree_drafts import MAX_DRAFT, Knowing

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import FeatureKinds, Features, LaunchedStep, SamplingArrays
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.build import SpeculationOptions, wanted_features
from autobot_llm.engine.speculative.heads import find_heads
from autobot_llm.engine.speculative.proposer import Computed, Draft
from autobot_llm.engine.speculative.speculator import Speculator


class FakeFeatureDevice(FakeTreeDevice, FakePipelinedDevice):
    """TreeExecutor and PipelinedExecutor whose steps keep their rows' logits for hidden states, and their tokens for
    streams. Like a GPU's, the tensors are there at once and filled later."""

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> LaunchedStep:
        self.filled = Features(
            torch.full((len(batch.logit_rows_R), VOCAB_SIZE), float("nan")), torch.full((batch.num_tokens, 1), -1)
        )
        step = super().launch(batch, sampling)
        step.features = self.filled
        return step

    def _run(self, step: Any, batch: StepBatch, sampling: SamplingArrays, number: int) -> None:
        features = step.features if step.features.hidden_RE is not None else self.filled
        before = np.array([*self.last_tokens, 0])
        tokens_T = np.where(batch.pending_rows_T >= 0, before[batch.pending_rows_T], batch.ids_T)
        super()._run(step, batch, sampling, number)
        self.fill(features, tokens_T)

    def fill(self, features: Features, tokens_T: Any) -> None:
        assert features.hidden_RE is not None and features.streams_TF is not None
        features.hidden_RE.copy_(torch.from_numpy(self.logits_RV))
        features.streams_TF.copy_(torch.from_numpy(tokens_T)[:, None])

    def compute(self, batch: StepBatch, last_tokens: list[int]) -> Any:
        self.logits_RV = super().compute(batch, last_tokens)
        return self.logits_RV

    def execute_with_features(self, batch: StepBatch, wanted: FeatureKinds) -> tuple[torch.Tensor, Features]:
        logits_RV = self.execute(batch)
        return logits_RV, Features(logits_RV.clone(), torch.from_numpy(batch.ids_T)[:, None].clone())


class Watching:
    """CostlyProposer that checks what it is shown, and guesses trees for those whose last token it saw being chosen."""

    name = "watching"
    wanted: FeatureKinds | None = FeatureKinds(hidden=True, layers=(0,))

    def __init__(self, seed: int) -> None:
        self.guesser = Knowing({}, seed, VOCAB_SIZE, MAX_DRAFT)
        self.known: dict[int, int] = {}
        self.num_drafts = 0

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        hidden_RE, streams_TF = features
        assert hidden_RE is not None and streams_TF is not None
        for sequence, start, rows, logit_row in computed:
            stop = start + len(rows)
            assert streams_TF[rows, 0].tolist() == sequence.token_ids[start:stop]
            if logit_row is not None:
                expected_V = logits_of(tuple(sequence.token_ids[:stop]))
                np.testing.assert_array_equal(hidden_RE[logit_row].numpy(), expected_V)
                self.known[sequence.id] = stop + 1

    def num_passes(self, num_tokens: int) -> int:
        return 1

    def lag(self, sequence: Sequence) -> int:
        return 1

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        is_known = [self.known.get(sequence.id) == len(sequence.token_ids) for sequence in sequences]
        self.num_drafts += sum(is_known)
        pairs = zip(sequences, is_known, strict=True)
        return [self.guesser.propose(sequence, num_tokens) if known else None for sequence, known in pairs]

    def forget(self, sequence: Sequence) -> None:
        self.known.pop(sequence.id, None)

    def close(self) -> None: ...


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 6),
    num_extra_tokens=st.integers(0, 40),
    lazy=st.booleans(),
    num_swap_blocks=st.sampled_from([0, 3, 100]),
    chance=st.sampled_from([0.3, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_features_are_those_of_their_tokens_and_answers_those_without_drafts(
    actions: list[Arrival | Steps | Abort],
    num_blocks: int,
    max_num_seqs: int,
    num_extra_tokens: int,
    lazy: bool,
    num_swap_blocks: int,
    chance: float,
    seed: int,
) -> None:
    watching = Watching(seed)
    engine = engine_on(
        FakeFeatureDevice(num_blocks, SIZE, lazy=lazy),
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + num_extra_tokens,
        num_swap_blocks=num_swap_blocks,
    )
    engine.speculator = Speculator(MAX_DRAFT, costly=watching, policy=Now(MAX_DRAFT, seed, chance), clock=lambda: 0.0)
    check = Check(engine)
    check.play(actions)
    check.finish()
    assert not watching.known, "something is kept of sequences that have left"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_are_verified_and_moved_beside_the_device(temperature: float) -> None:
    device, watching = FakeFeatureDevice(64, SIZE), Watching(1)
    engine = engine_on(device, 64)
    engine.speculator = Speculator(MAX_DRAFT, costly=watching, policy=Now(MAX_DRAFT, 0, 1.0), clock=lambda: 0.0)
    check = Check(engine)
    for prefix in range(12):
        check.arrive(Arrival(prefix=prefix, max_tokens=18, temperature=temperature))
    check.finish()
    assert device.num_moves > 5 and watching.num_drafts > 10
    assert engine.speculator.num_accepted > 10


def test_the_features_that_will_be_wanted_are_known_before_a_model_is_loaded() -> None:
    config = load_config(TINY)
    hidden, streams = FeatureKinds(hidden=True), FeatureKinds(layers=(2, 5, 8))
    heads, eagle = find_heads(TINY, "medusa"), find_heads(TINY, "eagle3")
    for options, expected in (
        (SpeculationOptions("none"), FeatureKinds()),
        (SpeculationOptions("ngram"), FeatureKinds()),
        (SpeculationOptions("draft"), FeatureKinds()),
        (SpeculationOptions("auto"), FeatureKinds()),  # a draft lies beside the embedded model
        (SpeculationOptions("medusa"), hidden),
        (SpeculationOptions("medusa", heads=heads), hidden),
        (SpeculationOptions("auto", heads=heads), hidden),
        (SpeculationOptions("eagle3"), streams),
        (SpeculationOptions("auto", heads=eagle), streams),
    ):
        assert wanted_features(options, TINY, config) == expected, options
