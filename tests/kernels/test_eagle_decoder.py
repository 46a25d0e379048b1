"""EAGLE-3's layer in fused kernels: what it reads of each token, and trees of passes against the plain proposer's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_folders import TINY

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, ItemCut
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.executor import Features
from autobot_llm.engine.gpu.eagle_decoder import EagleDecoder, EagleTokens
from autobot_llm.engine.gpu.eagle_steps import NUM_BRANCHES, draft_layout, fill_draft, levels_layout
from autobot_llm.engine.gpu.eagle_trees import tree_passes
from autobot_llm.engine.kernels.gpu.draft_input import draft_input, draft_input_reference
from autobot_llm.engine.kernels.gpu.draft_tree import CHOICE_FIELDS, TreeGrower
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.eagle import EagleConfig, EagleDraft
from autobot_llm.engine.speculative.eagle.on_device import Roots, Streams, Taken
from autobot_llm.engine.speculative.eagle.proposer import EagleProposer
from autobot_llm.engine.speculative.proposer import Computed

VOCAB, DRAFT_VOCAB, SIZE = 96, 48, 128
BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("has_rows", [False, True])
def test_tokens_find_their_features(
    norm_before_residual: bool, has_rows: bool, device: torch.device, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    ids_T = torch.randint(0, VOCAB, (5,), generator=generator).to(device, torch.int32)
    rows_T = torch.tensor([3, 2, 0, 3, 1], dtype=torch.int32, device=device) if has_rows else None
    width = 200  # no power of two
    arguments = (ids_T, rows_T, numbers(VOCAB, width), numbers(8, width), numbers(width), numbers(width), 1e-5)
    found = draft_input(*arguments, norm_before_residual=norm_before_residual)
    expected = draft_input_reference(*arguments, norm_before_residual=norm_before_residual)
    for mine, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), twin, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, over the rows of no sequence
@pytest.mark.parametrize(
    ("norm_before_residual", "has_biases", "rounds"), [(False, False, False), (True, True, False), (True, False, True)]
)
def test_trees_are_those_of_the_plain_proposer(
    norm_before_residual: bool, has_biases: bool, rounds: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """Nodes and chances, of two sequences in a draft for four, one of them with a window that begins later; in pieces,
    and twice: what a tree has left in the cache is overwritten."""
    layer = replace(
        load_config(TINY), vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=256, num_layers=1, num_heads=2,
        num_kv_heads=1, head_size=64, sliding_windows=(0,), tie_word_embeddings=False, max_position_embeddings=256,
        qkv_bias=has_biases, o_bias=has_biases, mlp_bias=has_biases,
    )  # fmt: skip
    config = EagleConfig(layer, DRAFT_VOCAB, SIZE, (2, 4, 5), norm_before_residual=norm_before_residual)
    generator = torch.Generator().manual_seed(1)
    twin = EagleDraft(config)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.5 if "lm_head" in name else 0.08, generator=generator)
            parameter.copy_(parameter.to(dtype))
    twin.choose_vocabulary(torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values)
    twin.requires_grad_(False)
    draft = EagleDraft(config).requires_grad_(False)
    draft.load_state_dict(twin.state_dict())
    draft = draft.to(device, dtype)
    embed_VE = torch.randn(VOCAB, SIZE, generator=generator).to(dtype)
    proposer = EagleProposer(twin, embed_VE.float(), (2, 4, 5), max_model_len=200, breadth=NUM_BRANCHES)

    storage = PagedStorage.allocate(layer, 16, BLOCK_SIZE, dtype, device)
    shape = AttentionShape(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.sliding_windows)
    attention = TritonPagedAttention(shape, storage.keys, storage.values, max_sequences=4, reason="a test")
    decoder = EagleDecoder(draft, embed_VE.to(device), storage, attention, max_context=200, max_rows=32, rounds=rounds)
    grower = TreeGrower(twin.target_ids.int().to(device), max_sequences=4, num_branches=NUM_BRANCHES, max_depth=4)

    firsts, lengths, blocks = (0, 21), (20, 5), ([9, 2, 5, 7], [1, 14, 3, 0])
    sequences = [
        Sequence(i, torch.randint(0, VOCAB, (first + length + 1,), generator=generator).tolist(),
                 SamplingParams(max_tokens=9, temperature=0.0))
        for i, (first, length) in enumerate(zip(firsts, lengths, strict=True))
    ]  # fmt: skip
    streams = [torch.randn(length, 3 * SIZE, generator=generator).to(dtype) for length in lengths]
    for sequence, first, each in zip(sequences, firsts, streams, strict=True):
        rows = list(range(len(each)))
        proposer.observe([Computed(sequence, first, rows, None)], Features(streams_TF=each.float()))

    def taken(s: int, start: int, end: int) -> Taken:
        places, table = np.arange(start, end, dtype=np.int32), np.array(blocks[s], np.int32)
        ids = sequences[s].token_ids[firsts[s] + 1 :]
        slots = table[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
        return Taken(
            [Streams(streams[s], range(start, end))], np.array(ids[start:end], np.int32), places + firsts[s], slots
        )

    first_part = taken(0, 0, 16)  # the other sequence, and what is left of this one, are taken in with their roots
    arrays = (torch.from_numpy(array.astype(np.int32)).to(device) for array in first_part[1:])
    decoder.take_in(streams[0][:16].to(device), EagleTokens(*arrays))
    parts = [taken(0, 16, 20), taken(1, 0, 5)]
    together = Taken([], *(np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts), strict=True)))
    roots = Roots(
        np.array([3, 8], np.int32),
        np.array(lengths, np.int32),
        np.array(blocks, np.int32),
        [(s.params, 0) for s in sequences],
    )
    streams_in = torch.cat([torch.zeros(3, 3 * SIZE, dtype=dtype), streams[0][16:], streams[1]]).to(device)
    for depth in (2,) if rounds or has_biases else (3, 1):
        layout = draft_layout(4, table_width=4, spare_items=3)
        host = np.full(layout.num_bytes, 113, np.uint8)
        fill_draft(layout.on_host(host), together, range(3, 12), roots, 8 * depth, cut=ItemCut())
        on_device = layout.on_device(torch.from_numpy(host).to(device))
        level_layout = levels_layout(4, depth, spare_items=3)
        levels = level_layout.on_device(torch.full((level_layout.num_bytes,), 113, dtype=torch.uint8, device=device))
        chosen = torch.zeros((4, 64, CHOICE_FIELDS), dtype=torch.int32, device=device)
        tree_passes(decoder, grower, attention, on_device, levels, depth)(streams_in, chosen)
        expected = proposer.propose(sequences, depth)
        for found_N3, tree in zip(chosen.cpu().numpy(), expected, strict=False):
            assert tree is not None and tree.parents is not None
            number = len(tree.token_ids)
            found, paths = paths_of(found_N3[:number, 0], found_N3[:number, 1]), paths_of(tree.token_ids, tree.parents)
            # of equally good ones others may be kept where rounding differs
            assert len(found ^ paths) <= max(2, (0.4 if rounds else 0.2) * number), (found ^ paths, number)
            assert max(map(len, found)) == depth


def paths_of(tokens: object, parents: object) -> set[tuple[int, ...]]:
    """Each node's tokens from the root on: what a tree says, whatever its order."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(np.asarray(tokens).tolist(), np.asarray(parents).tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)
