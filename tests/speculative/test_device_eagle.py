"""EAGLE-3 beside a device: whatever a target computes in whatever pieces, the chains are those of the CPU's proposer,
and no block or byte is left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from eagle_passes import TorchEaglePasses
from test_eagle import EMBED_VE, TARGET_SIZE, VOCAB, random_draft

from autobot_llm.engine.executor import Features
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.eagle.device_proposer import DeviceEagleProposer
from autobot_llm.engine.speculative.eagle.model import EagleDraft
from autobot_llm.engine.speculative.eagle.proposer import EagleProposer
from autobot_llm.engine.speculative.proposer import Computed

BLOCK_SIZE, MAX_LEN = 4, 96
NUM_SCHEDULES, NUM_STEPS = 4, 40
LAYERS = (2, 4, 5)


def device_proposer(draft: EagleDraft, *, num_blocks: int = 400, max_tokens: int = 512, max_bytes: int = 2**30):
    executor = TorchEaglePasses(draft, EMBED_VE, num_blocks, BLOCK_SIZE, max_tokens)
    pool = BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=False)
    return DeviceEagleProposer(
        executor, pool, draft.target_ids.numpy(), LAYERS, max_tokens=max_tokens, max_model_len=MAX_LEN,
        max_bytes=max_bytes,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These products are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Target:
    """A target's steps over sequences of random tokens and features: each position's are its own, whenever computed."""

    def __init__(self, seed: int, proposers: list[EagleProposer | DeviceEagleProposer]) -> None:
        self.rng = random.Random(seed)
        self.proposers = proposers
        self.features = torch.Generator().manual_seed(seed)
        self.streams: dict[int, torch.Tensor] = {}
        self.sequences: list[Sequence] = []

    def arrive(self) -> None:
        rng, number = self.rng, len(self.streams)
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(3, 40))]
        sequence = Sequence(number, ids, SamplingParams(max_tokens=99, temperature=rng.choice([0.0, 0.0, 1.0])))
        sequence.num_computed_tokens = rng.choice([0, 0, len(ids) // 2])  # a prefix was found
        self.streams[number] = torch.randn(MAX_LEN, 3 * TARGET_SIZE, generator=self.features)
        self.sequences.append(sequence)

    def leave(self) -> None:
        sequence = self.sequences.pop(self.rng.randrange(len(self.sequences)))
        for proposer in self.proposers:
            proposer.forget(sequence)

    def step(self) -> None:
        """A part of a prompt, or a token with drafts of which some are right, of some of the sequences."""
        rng, rows, computed = self.rng, list[torch.Tensor](), list[Computed]()
        for sequence in rng.sample(self.sequences, rng.randint(1, len(self.sequences))):
            if rng.random() < 0.05:
                sequence.num_computed_tokens = 0  # preempted
            start, known = sequence.num_computed_tokens, len(sequence.token_ids)
            number, num_drafts = rng.randint(1, known - start), 0
            if start + number == known:
                num_drafts = min(rng.randint(0, 4), MAX_LEN - known - 1)
                if num_drafts < 0:
                    continue
                right = rng.randint(0, num_drafts)
                sequence.token_ids += [rng.randrange(VOCAB) for _ in range(right + 1)]
                gap = rng.choice([0, 0, 1]) if right else 0  # a path of a tree skips rows
                token_rows = [*range(number), *range(number + gap, number + gap + right)]
                num_rows = number + gap + num_drafts
            else:
                token_rows, num_rows = list(range(number)), number
            end = start + len(token_rows)
            streams = torch.full((num_rows, 3 * TARGET_SIZE), 7.0)
            streams[token_rows] = self.streams[sequence.id][start:end]
            before = sum(map(len, rows))
            rows.append(streams)
            sequence.num_computed_tokens = end
            computed.append(Computed(sequence, start, [before + row for row in token_rows], 0 if num_drafts else None))
        if rows:
            for proposer in self.proposers:
                proposer.observe(computed, Features(streams_TF=torch.cat(rows)))

    def decoding(self) -> list[Sequence]:
        found = [s for s in self.sequences if s.num_computed_tokens == len(s.token_ids) - 1]
        return self.rng.sample(found, self.rng.randint(0, len(found)))


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("max_tokens", [8, 512])
def test_chains_are_those_of_the_twin(norm_before_residual: bool, max_tokens: int) -> None:
    draft = random_draft(3, norm_before_residual=norm_before_residual)
    num_compared = 0
    for seed in range(NUM_SCHEDULES):
        twin = EagleProposer(draft, EMBED_VE, LAYERS, max_model_len=MAX_LEN)
        proposer = device_proposer(draft, max_tokens=max_tokens)
        target = Target(seed, [twin, proposer])
        for _ in range(NUM_STEPS):
            if len(target.sequences) < 6 and (not target.sequences or target.rng.random() < 0.3):
                target.arrive()
            target.step()
            if target.rng.random() < 0.6:
                asked, num_tokens = target.decoding(), target.rng.randint(1, 5)
                greedy = [Sequence(s.id, s.token_ids, SamplingParams(max_tokens=99, temperature=0.0)) for s in asked]
                assert [twin.lag(s) for s in asked] == [proposer.lag(s) for s in asked]
                expected, found = twin.propose(greedy, num_tokens), proposer.propose(asked, num_tokens)
                assert found == [None if each is None else each.as_line() for each in expected]
                num_compared += sum(each is not None for each in found)
            if target.rng.random() < 0.1:
                target.leave()
        while target.sequences:
            target.leave()
        assert proposer.pool.num_free == proposer.pool.num_blocks and proposer.num_bytes == 0
        assert proposer.executor.num_unwaited == 0
    assert num_compared > 60


@pytest.mark.parametrize(("num_blocks", "max_bytes"), [(14, 2**30), (400, 3_000)])
def test_where_blocks_or_bytes_run_out_others_lose_their_windows_and_nothing_leaks(
    num_blocks: int, max_bytes: int
) -> None:
    draft = random_draft(4)
    proposer = device_proposer(draft, num_blocks=num_blocks, max_bytes=max_bytes)
    target, num_drafts, num_refused = Target(0, [proposer]), 0, 0
    for _ in range(100):
        if len(target.sequences) < 6:
            target.arrive()
        target.step()
        assert proposer.num_bytes <= max_bytes
        found = proposer.propose(target.decoding(), 3)
        num_drafts += sum(each is not None for each in found)
        num_refused += sum(each is None for each in found)
        if target.rng.random() < 0.1:
            target.leave()
    assert num_drafts > 25 and num_refused > 5
    while target.sequences:
        target.leave()
    assert proposer.pool.num_free == num_blocks and proposer.num_bytes == 0
    proposer.close()
    assert proposer.executor.is_closed


def test_a_chain_takes_one_pass_a_token() -> None:
    proposer = device_proposer(random_draft(5))
    target = Target(1, [proposer])
    target.arrive()
    while not (asked := target.decoding()):
        target.step()
    (draft,) = proposer.propose(asked, 5)
    assert draft is not None and len(draft.token_ids) == 5 and draft.parents is None
    assert proposer.executor.num_passes == 5
    (again,) = proposer.propose(asked, 5)  # the target computed nothing meanwhile
    assert again == draft
