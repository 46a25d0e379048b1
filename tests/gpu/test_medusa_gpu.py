"""Medusa and its trees on a CUDA device, against the same without. `make test-gpu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from answers import DRAWN, GREEDY, OPTIONS, TINY, answers
from reference import Reference

from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import FeatureKinds, TreeExecutor
from autobot_llm.engine.gpu.build import build_gpu_executor
from autobot_llm.engine.gpu.executor import GpuExecutor
from autobot_llm.engine.gpu.options import GpuLimits, GpuOptions
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.sampler import SamplingArraysBuilder
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.engine.speculative.medusa.proposer import MedusaProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

pytestmark = pytest.mark.gpu

CONFIG = load_config(TINY)
KINDS = FeatureKinds(hidden=True, layers=(0, 3, CONFIG.num_layers))
MEDUSA = dataclasses.replace(OPTIONS, speculation=SpeculationOptions("medusa"))


@pytest.fixture(scope="module")
def medusa() -> Iterator[Engine]:
    made = load_engine(MEDUSA)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    made = load_engine(OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module", params=["auto", "off"], ids=["graphs", "launches"])
def executor(request: pytest.FixtureRequest) -> Iterator[GpuExecutor]:
    options = GpuOptions(TINY, "triton", request.param, 0.5, 64 * 2**20, features=KINDS)
    made, _ = build_gpu_executor(CONFIG, options, GpuLimits(16, 1024, 512, 512), torch.device("cuda", 0), None)
    yield made
    made.close()


def always(engine: Engine) -> Speculator:
    """Drafts at every step, whatever they cost."""
    assert engine.speculator is not None, engine.speculation_reason
    costly = engine.speculator._costly
    assert isinstance(costly, MedusaProposer)
    return Speculator(4, costly=costly, policy=Always(4))


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_answers_are_those_without_and_take_fewer_steps(
    params: SamplingParams, together: bool, medusa: Engine, plain: Engine, reference: Reference
) -> None:
    medusa.speculator = speculator = always(medusa)
    before = medusa.num_steps
    reference.check(answers(medusa, params, together=together))
    num_steps = medusa.num_steps - before
    before = plain.num_steps
    reference.check(answers(plain, params, together=together))
    assert speculator.num_accepted > 20, speculator.lines()
    assert num_steps < (0.9 if params is DRAWN else 0.8) * (plain.num_steps - before), speculator.lines()


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_engines_own_choice_answers_the_same(params: SamplingParams, medusa: Engine, reference: Reference) -> None:
    medusa.speculator = Speculator(4, costly=always(medusa)._costly)
    reference.check(answers(medusa, params))


def sequence_of(length: int, blocks: range, seed: int) -> Sequence:
    ids = np.random.default_rng(seed).integers(5, 8000, length).tolist()
    sequence = Sequence(seed, ids, SamplingParams(max_tokens=100, temperature=0.0))
    sequence.block_ids.extend(blocks)
    return sequence


@pytest.mark.parametrize("num_nodes", [5, 15, 40, 63])
def test_a_trees_logits_are_those_of_its_paths(executor: GpuExecutor, reference: Reference, num_nodes: int) -> None:
    rng = np.random.default_rng(num_nodes)
    sequence = sequence_of(150, range(3, 20), seed=num_nodes)
    executor.execute(build_batch([ScheduledSequence(sequence, 0, 149, False)], 16))
    ids = rng.permutation(np.arange(5, 8000))[:num_nodes].tolist()
    parents = [int(rng.integers(-1, node)) for node in range(num_nodes)]
    sequence.draft_ids, sequence.draft_parents = ids, parents
    tree = build_batch([ScheduledSequence(sequence, 149, 1 + num_nodes, True, 0, num_nodes)], 16)
    logits_RV = executor.execute(tree).clone()
    deepest = sorted(range(num_nodes), key=lambda node: -len(draft_tree.path_to(parents, node)))[:4]
    for node in (*deepest, 0, num_nodes - 1):
        path = draft_tree.path_to(parents, node)
        path_ids = [ids[each] for each in path]
        sequence.draft_ids, sequence.draft_parents = path_ids, []
        line = build_batch([ScheduledSequence(sequence, 149, 1 + len(path), True, 0, len(path))], 16)
        found_RV = logits_RV[[0, *(each + 1 for each in path)]].cpu()
        reference.check_rows(found_RV, executor.execute(line).cpu(), [*sequence.token_ids, *path_ids])


def test_after_the_move_a_path_is_as_if_it_had_been_a_line(executor: GpuExecutor) -> None:
    assert isinstance(executor, TreeExecutor)
    cache = executor._storage.cache_L2BK
    cache.copy_(torch.randn(cache.shape, device="cuda"))
    torch.cuda.synchronize()
    before = cache.clone()
    rng = np.random.default_rng(0)
    for number in (1, 5, 31, 70):
        slots_to = np.sort(rng.choice(600, number, replace=False))
        slots_from = slots_to + np.sort(rng.integers(0, 40, number))  # rising: none is written that is yet to be read
        executor.move(slots_from, slots_to)
        torch.cuda.synchronize()
        for slot_from, slot_to in zip(slots_from.tolist(), slots_to.tolist(), strict=True):
            before[:, :, slot_to // 16, :, slot_to % 16] = before[:, :, slot_from // 16, :, slot_from % 16]
        assert torch.equal(cache, before), f"{number} moves"


def test_steps_keep_the_features_of_their_rows(executor: GpuExecutor) -> None:
    """Captured or launched; a later launch leaves them alone. What is kept of the last layer says what hidden_RE is."""
    one, two = sequence_of(120, range(3, 12), seed=1), sequence_of(60, range(12, 20), seed=2)
    batches = [
        build_batch([ScheduledSequence(one, 0, 100, True), ScheduledSequence(two, 0, 40, False)], 16),
        build_batch([ScheduledSequence(one, 100, 1, True), ScheduledSequence(two, 40, 19, True)], 16),
        build_batch([ScheduledSequence(one, 101, 1, True), ScheduledSequence(two, 59, 1, True)], 16),
    ]
    embed_VE, norm_E = executor._decoder._weights.embed_VE, executor._decoder._weights.norm_E
    sampling = SamplingArraysBuilder(CONFIG.vocab_size)
    kept = []
    for batch in batches:
        launched = executor.launch(batch, sampling.build([one, two][: len(batch.logit_rows_R)]))
        kept.append((batch, launched.features))
        launched.wait()
    for batch, (hidden_RE, streams_TF) in kept:
        assert hidden_RE is not None and streams_TF is not None
        first_TE, _, last_TE = streams_TF.split(CONFIG.hidden_size, dim=-1)
        assert torch.equal(first_TE, embed_VE[torch.from_numpy(batch.ids_T).cuda()])
        rows_RE = last_TE[torch.from_numpy(batch.logit_rows_R).cuda()].float()
        scales_R1 = (rows_RE.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).rsqrt()
        torch.testing.assert_close(hidden_RE.float(), rows_RE * scales_R1 * norm_E.float(), rtol=2e-2, atol=2e-2)
        logits_RV, again = executor.execute_with_features(batch, KINDS)
        assert again.hidden_RE is not None
        torch.testing.assert_close(again.hidden_RE, hidden_RE, rtol=2e-2, atol=2e-2)
        assert logits_RV.shape[0] == hidden_RE.shape[0]


def test_heads_on_the_device_say_what_they_say_in_float32(medusa: Engine) -> None:
    from autobot_llm.engine.speculative.heads import find_heads, make_medusa

    folder = find_heads(TINY, "medusa")
    assert folder is not None
    costly, twin = always(medusa)._costly, make_medusa(folder, TINY, CONFIG)
    assert isinstance(costly, MedusaProposer)
    generator = torch.Generator().manual_seed(0)
    for number in (1, 3, 8, 21):
        hidden = [torch.randn(CONFIG.hidden_size, generator=generator) for _ in range(number)]
        ids_KSC, logits_KSC = costly.heads.candidates([each.bfloat16().cuda() for each in hidden], 3, 10)
        _, expected_KSC = twin.heads.candidates([each.bfloat16().float() for each in hidden], 3, 10)
        assert ids_KSC.shape == (3, number, 10) and (np.diff(logits_KSC) <= 0).all()
        np.testing.assert_allclose(logits_KSC, expected_KSC, rtol=0.05, atol=0.1)
