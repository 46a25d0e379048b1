"""EAGLE-3 beside a device: whatever a target computes in whatever pieces, the trees are those of the CPU's proposer,
and no block or byte is left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from eagle_passes import TorchEagleDevice
from test_eagle import EMBED_VE, TARGET_SIZE, VOCAB, random_draft

from autobot_llm.engine.batching.draft_tree import depths
from autobot_llm.engine.executor import Features
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.eagle.device_proposer import MOST_PARTS, DeviceEagleProposer
from autobot_llm.engine.speculative.eagle.model import EagleDraft
from autobot_llm.engine.speculative.eagle.proposer import EagleProposer
from autobot_llm.engine.speculative.proposer import Computed, ReadingProposer

BLOCK_SIZE, MAX_LEN = 4, 96
NUM_SCHEDULES, NUM_STEPS = 4, 40
LAYERS = (2, 4, 5)


def device_proposer(
    draft: EagleDraft,
    *,
    breadth: int = 4,
    num_blocks: int = 400,
    max_tokens: int = 512,
    max_bytes: int = 2**30,
    max_rows: int | None = None,
) -> DeviceEagleProposer:
    device = TorchEagleDevice(
        draft, EMBED_VE, num_blocks, BLOCK_SIZE, num_branches=breadth, max_tokens=max_tokens
    )  # fmt: skip
    pool = BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=False)
    return DeviceEagleProposer(
        device, pool, LAYERS, max_model_len=MAX_LEN, breadth=breadth, max_bytes=max_bytes, max_rows=max_rows
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These products are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Target:
    """A target's steps over sequences of random tokens and features: each position's are its own, whenever computed."""

    def __init__(
        self, seed: int, proposers: list[EagleProposer | DeviceEagleProposer], *, reads_ahead: bool = False
    ) -> None:
        self.reads_ahead = reads_ahead
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
        under_way: list[Computed] = []  # of prompts, as far as the next tokens are known
        for sequence in rng.sample(self.sequences, rng.randint(1, len(self.sequences))):
            if rng.random() < 0.05:
                sequence.num_computed_tokens = 0  # preempted
            start, known = sequence.num_computed_tokens, len(sequence.token_ids)
            number, num_drafts = rng.randint(1, known - start), 0
            first_row, num_sure = sum(map(len, rows)), min(number, known - 1 - start)
            if num_sure > 0:
                under_way.append(Computed(sequence, start, list(range(first_row, first_row + num_sure)), None))
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
                if self.reads_ahead and isinstance(proposer, ReadingProposer):
                    proposer.take_in(under_way, Features(streams_TF=torch.cat(rows)))
                proposer.observe(computed, Features(streams_TF=torch.cat(rows)))

    def decoding(self) -> list[Sequence]:
        found = [s for s in self.sequences if s.num_computed_tokens == len(s.token_ids) - 1]
        return self.rng.sample(found, self.rng.randint(0, len(found)))


@pytest.mark.parametrize("breadth", [1, 4])
@pytest.mark.parametrize("max_tokens", [8, 512])
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_trees_are_those_of_the_twin(breadth: int, max_tokens: int, reads_ahead: bool) -> None:
    """Chains, too, which are trees without a branch; and where prompts are taken in as they are computed."""
    draft = random_draft(3, norm_before_residual=breadth > 1)
    num_compared = num_ahead = 0
    for seed in range(NUM_SCHEDULES):
        twin = EagleProposer(draft, EMBED_VE, LAYERS, max_model_len=MAX_LEN, breadth=breadth)
        proposer = device_proposer(draft, max_tokens=max_tokens, breadth=breadth)
        target, drafted = Target(seed, [twin, proposer], reads_ahead=reads_ahead), dict[int, int]()
        for _ in range(NUM_STEPS):
            if len(target.sequences) < 6 and (not target.sequences or target.rng.random() < 0.3):
                target.arrive()
            target.step()
            if target.rng.random() < 0.6:
                asked, num_tokens = target.decoding(), target.rng.randint(1, 5)
                asked = [s for s in asked if len(s.token_ids) - 1 + num_tokens <= MAX_LEN]
                greedy = [Sequence(s.id, s.token_ids, SamplingParams(max_tokens=99, temperature=0.0)) for s in asked]
                lags = [proposer.lag(s) for s in asked]
                pairs = list(zip(lags, [twin.lag(s) for s in asked], strict=True))
                assert all(lag <= of_twin if reads_ahead else lag == of_twin for lag, of_twin in pairs)
                num_ahead += sum(lag < of_twin for lag, of_twin in pairs)
                expected, found = twin.propose(greedy, num_tokens), proposer.propose(asked, num_tokens)
                for s, mine, theirs in zip(asked, found, expected, strict=True):
                    if drafted.get(s.id) != len(s.token_ids):
                        assert mine == theirs
                        num_compared += mine is not None
                    elif mine is not None:  # as far as it goes, the one that was made before
                        assert max(depths(mine.parents)) <= num_tokens
                    drafted[s.id] = len(s.token_ids)
            if target.rng.random() < 0.1:
                target.leave()
        while target.sequences:
            target.leave()
        assert proposer.pool.num_free == proposer.pool.num_blocks and proposer.num_bytes == 0
    assert num_compared > 60 and (num_ahead > 20) == reads_ahead


@pytest.mark.parametrize(("num_blocks", "max_bytes"), [(22, 2**30), (400, 3_000)])
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_where_blocks_or_bytes_run_out_others_lose_their_windows_and_nothing_leaks(
    num_blocks: int, max_bytes: int, reads_ahead: bool
) -> None:
    draft = random_draft(4)
    proposer = device_proposer(draft, num_blocks=num_blocks, max_bytes=max_bytes)
    target, num_drafts, num_refused = Target(0, [proposer], reads_ahead=reads_ahead), 0, 0
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
    assert proposer.device.is_closed


def decoding_alone(proposer: DeviceEagleProposer) -> list[Sequence]:
    target = Target(1, [proposer])
    target.arrive()
    while not (asked := target.decoding()):
        target.step()
    return asked


def test_a_draft_is_made_once() -> None:
    proposer = device_proposer(random_draft(5))
    asked = decoding_alone(proposer)
    (draft,) = proposer.propose(asked, 5)
    num_taken = proposer.device.num_taken
    assert draft is not None and draft.parents is not None and len(draft.token_ids) == 20
    assert num_taken == len(asked[0].token_ids) - 1, "every position was taken in, and none twice"
    (again,) = proposer.propose(asked, 5)  # the target computed nothing meanwhile
    assert again == draft
    (shallower,) = proposer.propose(asked, 2)
    assert shallower is not None and shallower.parents is not None and max(depths(shallower.parents)) == 2
    assert shallower == draft.first(len(shallower.token_ids))
    assert proposer.device.num_trees == 1 and proposer.device.num_taken == num_taken


def test_the_trees_of_a_step_share_its_rows_and_no_tree_is_deeper_than_the_device_takes() -> None:
    proposer = device_proposer(random_draft(5), max_rows=20)
    asked = decoding_alone(proposer)
    (draft,) = proposer.propose(asked, 9)
    assert draft is not None and draft.parents is not None
    assert len(draft.token_ids) == 19 and max(depths(draft.parents)) <= proposer.device.max_depth
    assert proposer.num_passes(9) == proposer.device.max_depth
    assert [proposer.num_nodes(5, n) for n in (1, 2, 4, 7, 30)] == [19, 9, 4, 1, 1]


def test_a_window_keeps_no_step_of_others_alive() -> None:
    """A row of a large step is copied; those of small ones after a while, since the next draft takes them in."""
    proposer = device_proposer(random_draft(5))
    sequence = Sequence(1, [3] * 300, SamplingParams(max_tokens=99, temperature=0.0))
    kept = list[torch.Tensor]()
    for start in range(200):
        streams_TF = torch.zeros(500 if start == 0 else 3, 3 * TARGET_SIZE)
        kept.append(streams_TF)
        proposer.observe([Computed(sequence, start, [1], 0)], Features(streams_TF=streams_TF))
        window = proposer._windows[1]
        held = sum(len(each.streams_TF) for each in {id(w.streams_TF): w for w in window.waiting}.values())
        assert held <= start + 1 + 2 * MOST_PARTS and window.num_waiting == start + 1
        assert all(each.streams_TF is not kept[0] for each in window.waiting)
    assert proposer.num_bytes == 200 * 3 * TARGET_SIZE * 4
