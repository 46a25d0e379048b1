"""A draft's passes as one: the arrays that describe them all at once, against a pass after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import write_random_model

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, ItemCut, full_load
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.executor import SamplingArrays, Unverified
from autobot_llm.engine.gpu.chains import ChainGraphs, padding_of, run
from autobot_llm.engine.gpu.decoder import FusedDecoder
from autobot_llm.engine.gpu.graph_sizes import (
    CHAIN_SIZES,
    LONGEST_CHAIN,
    MAX_PROMPTS,
    MAX_ROWS,
    chain_sizes,
    most_chain_rows,
    padded_size,
)
from autobot_llm.engine.gpu.step_graphs import inputs_of
from autobot_llm.engine.kernels.gpu.sampling import DeviceSampler, SamplingTensors
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sampler import SamplingArraysBuilder
from autobot_llm.engine.sequence import UNKNOWN_TOKEN, SamplingParams, Sequence

VOCAB, NUM_PASSES, NUM_DRAFTS, SPARE_ITEMS = 256, 3, 2, 4
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 64, "vocab_size": VOCAB, "initializer_range": 0.3}  # fmt: skip
LENGTHS, MISSING = (130, 63, 20), (1, 2, 4)


class Draft:
    """A random model over a cache of its own."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        config = load_config(folder)
        weights = load_weights(folder, config, dtype=None, device=device)
        self.storage = PagedStorage.allocate(config, 32, BLOCK_SIZE, weights.dtype, device)
        shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_size, config.sliding_windows)
        self.attention = TritonPagedAttention(
            shape, self.storage.keys, self.storage.values, max_sequences=8, reason="a test"
        )
        self.decoder = FusedDecoder(config, weights, self.storage, self.attention, max_context=256)
        self.sampler = DeviceSampler(VOCAB, 16, device, num_draft_rows=MAX_ROWS)

    def logits(self, batch: StepBatch, last_tokens: torch.Tensor) -> torch.Tensor:
        names = {"ids": batch.ids_T, "token_rows": batch.pending_rows_T, "positions": batch.positions_T,
                 "slots": batch.slots_T, "logit_rows": batch.logit_rows_R}  # fmt: skip
        tensors = {name: torch.from_numpy(a.astype(np.int32)).to(self.device) for name, a in names.items()}
        return self.decoder.forward(inputs_of(tensors, last_tokens), self.attention.prepare(batch))


def sequences_in_part(draft: Draft, *, is_drawn: bool) -> list[Sequence]:
    """Sequences of which all but the last few tokens are in the cache."""
    rng, found = np.random.default_rng(0), []
    blocks = rng.permutation(32)
    for i, (length, missing) in enumerate(zip(LENGTHS, MISSING, strict=True)):
        temperature = (0.0, 1.0, 0.7)[i] if is_drawn else 0.0
        params = SamplingParams(max_tokens=9, temperature=temperature, top_p=(1.0, 1.0, 0.8)[i], seed=i)
        sequence = Sequence(i, rng.integers(5, VOCAB, length).tolist(), params)
        number = -(-(length + NUM_PASSES + NUM_DRAFTS) // BLOCK_SIZE)
        sequence.block_ids.extend(blocks[:number].tolist())
        blocks = blocks[number:]
        sequence.num_computed_tokens = length - missing
        found.append(sequence)
    parts = [ScheduledSequence(s, 0, s.num_computed_tokens, False) for s in found]
    parts[0] = parts[0]._replace(samples=True)
    draft.logits(build_batch(parts, BLOCK_SIZE), draft.sampler.tokens_R)
    return found


def rest_of(sequences: list[Sequence]) -> StepBatch:
    parts = [
        ScheduledSequence(s, s.num_computed_tokens, len(s.token_ids) - s.num_computed_tokens, True) for s in sequences
    ]
    return build_batch(parts, BLOCK_SIZE)


def chained(
    draft: Draft, sequences: list[Sequence], batch: StepBatch, sampling: SamplingArrays, after: Unverified | None
) -> tuple[list[int], torch.Tensor]:
    """Tokens and best logits of a chain, and the same where nobody is in it, which leaves the cache alone."""
    is_drawn, num_missing = sampling.any_drawn, np.diff(batch.query_starts).tolist()
    chains = ChainGraphs(
        draft.attention,
        draft.sampler.tokens_R,
        draft.sampler.max_rows,
        longest=NUM_PASSES,
        max_num_seqs=4,
        table_width=16,
        num_spare_items=SPARE_ITEMS,
    )
    slots = [np.zeros(chains.num_bytes, np.uint8) for _ in range(2)]
    on_device = torch.zeros(chains.num_bytes, dtype=torch.uint8, device=draft.device)
    chains.bind(slots, on_device)
    assert chains.find(num_missing, NUM_PASSES, is_drawn=is_drawn) is None, "nothing is captured"
    chains.is_captured = True
    chain = chains.find(num_missing, NUM_PASSES, is_drawn=is_drawn)
    assert chain is not None and chain.size == 4 and len(chain.passes) == NUM_PASSES
    slots[1][: chain.layout.num_bytes] = padding_of(chain)
    before, tokens_R = draft.storage.cache_L2BK.clone(), draft.sampler.tokens_R.clone()
    on_device.copy_(torch.from_numpy(slots[1]))
    run(chain, draft.decoder, draft.sampler, chains.tokens_R)
    assert torch.equal(draft.storage.cache_L2BK, before)
    draft.sampler.tokens_R.copy_(tokens_R)
    slots[1][:] = 77  # what a slot held before
    chains.fill(chain, 1, batch, sampling, after)
    on_device.copy_(torch.from_numpy(slots[1]))
    run(chain, draft.decoder, draft.sampler, chains.tokens_R)
    rows = torch.from_numpy(chain.rows(len(sequences)))
    return chains.drafts_R.cpu()[rows].tolist(), chains.bests_R.cpu()[rows]


def passes(draft: Draft, sequences: list[Sequence]) -> tuple[list[int], torch.Tensor]:
    """The same, one pass after the other."""
    tokens, bests = list[int](), []
    for _ in range(NUM_PASSES):
        logits_RV = draft.logits(rest_of(sequences), draft.sampler.tokens_R)
        one = SamplingArraysBuilder(VOCAB).build(sequences)
        tensors = None
        if one.any_drawn:
            arrays = {name: np.ascontiguousarray(getattr(one, name)) for name in SamplingTensors.__slots__}
            arrays |= {"keys_R": arrays["keys_R"].view(np.int64), "is_drawn_R": arrays["is_drawn_R"].astype(np.int32)}
            tensors = SamplingTensors(**{name: torch.from_numpy(a).to(draft.device) for name, a in arrays.items()})
        tokens_R, bests_R = draft.sampler.sample(
            logits_RV, tensors, any_drawn=one.any_drawn, any_restricted=one.any_drawn
        )
        tokens += tokens_R.tolist()
        bests.append(bests_R.cpu().clone())
        for sequence, token in zip(sequences, tokens_R.tolist(), strict=True):
            sequence.num_computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(token)
    return tokens, torch.cat(bests)


def behind(draft: Draft, sequences: list[Sequence]) -> tuple[StepBatch, Unverified]:
    """A chain behind a step that verifies NUM_DRAFTS drafts of each, of which none, one and two are right. The
    sequences get the tokens that the step settles."""
    rng, tokens_R, first = np.random.default_rng(1), draft.sampler.tokens_R, draft.sampler.max_rows
    lasts = []
    draft_rows_SN = np.array([[first + 4 * j + i for j in range(NUM_DRAFTS)] for i in range(3)])
    for i, sequence in enumerate(sequences):
        base, drafts = len(sequence.token_ids), rng.integers(5, VOCAB, NUM_DRAFTS).tolist()
        chosen = [*drafts[:i], *(drafts[i:] and [drafts[i] ^ 1]), *rng.integers(5, VOCAB, NUM_DRAFTS).tolist()]
        tokens_R[torch.from_numpy(draft_rows_SN[i])] = torch.tensor(drafts, dtype=torch.int32, device=draft.device)
        rows = slice(i * (1 + NUM_DRAFTS), (i + 1) * (1 + NUM_DRAFTS))
        tokens_R[rows] = torch.tensor(chosen[: 1 + NUM_DRAFTS], dtype=torch.int32, device=draft.device)
        # the chain before has computed all of the drafts but the last one
        sequence.token_ids += drafts[:-1]
        parts = [ScheduledSequence(sequence, sequence.num_computed_tokens, base - 1 - sequence.num_computed_tokens
                                   + NUM_DRAFTS, True)]  # fmt: skip
        draft.logits(build_batch(parts, BLOCK_SIZE), torch.zeros(8, dtype=torch.int32, device=draft.device))
        sequence.token_ids[base:] = [UNKNOWN_TOKEN]
        lasts.append((base, [*drafts[:i], chosen[i]]))
    parts = [ScheduledSequence(s, len(s.token_ids) - 2, 2, True) for s in sequences]
    batch = build_batch(parts, BLOCK_SIZE)
    for sequence, (base, settled) in zip(sequences, lasts, strict=True):
        sequence.token_ids[base:] = settled
        sequence.num_computed_tokens = len(sequence.token_ids) - 2
    return batch, Unverified(np.arange(3) * (1 + NUM_DRAFTS), draft_rows_SN)


# attention leaves rows of padding what they are, NaN included
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("is_behind", [False, True], ids=["after a verdict", "behind a step"])
def test_a_chain_computes_what_its_passes_compute(
    tmp_path: Path, is_behind: bool, device: torch.device, dtype: torch.dtype
) -> None:
    write_random_model(tmp_path, "llama", dtype=str(dtype).removeprefix("torch."), **SIZES)
    draft = Draft(tmp_path, device)
    sequences = sequences_in_part(draft, is_drawn=is_behind)
    num_known = [len(s.token_ids) for s in sequences]
    batch, after = behind(draft, sequences) if is_behind else (rest_of(sequences), None)
    cache = draft.storage.cache_L2BK.clone()
    offsets = [offset for offset in range(NUM_PASSES + NUM_DRAFTS * is_behind) for _ in sequences]
    if is_behind:  # of the token that each would draw if no draft were right
        pairs = zip(sequences * (NUM_PASSES + NUM_DRAFTS), offsets, strict=True)
        offsets = [num_known[s.id] + 1 + offset - len(s.token_ids) for s, offset in pairs]
    sampling = SamplingArraysBuilder(VOCAB).build(sequences * (len(offsets) // 3), offsets)
    found, found_bests = chained(draft, sequences, batch, sampling, after)
    written = draft.storage.cache_L2BK.clone()
    draft.storage.cache_L2BK.copy_(cache)
    expected, bests = passes(draft, sequences)
    assert found == expected
    torch.testing.assert_close(found_bests, bests, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(written, draft.storage.cache_L2BK, rtol=2e-2, atol=2e-2)
    assert not torch.equal(written, cache)


def test_a_chain_is_for_few_missing_tokens_of_few_sequences() -> None:
    assert chain_sizes(256, 5) == {1: 5, 2: 5, 4: 5, 8: 5, 16: 5, 32: 5, 64: 2}
    assert chain_sizes(16, 15) == {1: 15, 2: 15, 4: 15, 8: 15, 16: 13}
    assert chain_sizes(100, 0) == {}


@pytest.mark.parametrize("num_sequences", range(1, MAX_PROMPTS + 1))
def test_drafts_that_a_step_has_room_to_verify_are_a_chain(num_sequences: int) -> None:
    size = padded_size(num_sequences, CHAIN_SIZES)
    assert size is not None
    most = chain_sizes(256, LONGEST_CHAIN)[size]
    assert most >= min(LONGEST_CHAIN, MAX_ROWS // num_sequences - 1)
    assert size * most <= most_chain_rows()


@pytest.mark.parametrize("seed", range(4))
def test_the_items_of_all_passes_cover_each_context_as_it_grows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lens = rng.integers(1, 700, int(rng.integers(1, 20))).astype(np.int32)
    cut, spare_items = ItemCut(), full_load(num_kv_heads=8, num_processors=132)
    for _ in range(40):
        lens_KS = lens + np.arange(5, dtype=np.int32)[:, None]
        items_KI8 = np.full((5, len(lens) + spare_items, 8), -77, np.int32)
        num_new = rng.integers(1, 5, len(lens))
        starts = np.append(0, num_new.cumsum()).astype(np.int32)
        num_items = cut.write_passes(items_KI8, starts, lens_KS, spare_items)
        assert (items_KI8[0, :num_items, 5] == starts[items_KI8[0, :num_items, 0]]).all()
        assert (items_KI8[0, :num_items, 6] == num_new[items_KI8[0, :num_items, 0]]).all()
        assert (items_KI8[1:, :num_items, 5] == items_KI8[1:, :num_items, 0]).all()
        assert (items_KI8[1:, :num_items, 6] == 1).all()
        assert (items_KI8[:, num_items:] == -77).all()
        for items_I8, its_lens in zip(items_KI8[:, :num_items], lens_KS, strict=True):
            for s, length in enumerate(its_lens):
                own = items_I8[items_I8[:, 0] == s]
                assert (own[:, 7] == length).all() and (own[:, 4] == len(own)).all() and own[0, 1] == 0
                covered = [p for start, stop in own[:, 1:3] for p in range(start, stop)]
                assert covered == list(range(length))
        lens = lens + np.int32(rng.integers(1, 6))
