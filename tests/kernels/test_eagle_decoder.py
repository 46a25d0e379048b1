"""EAGLE-3's layer in fused kernels: what it reads of each token, and chains of passes against the plain layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_folders import TINY

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape
from autobot_llm.engine.attention.sdpa_paged import SdpaPagedAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.gpu.decoder import DecoderInputs
from autobot_llm.engine.gpu.eagle_decoder import EagleDecoder
from autobot_llm.engine.kernels.gpu.draft_input import draft_input, draft_input_reference
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.eagle import EagleConfig, EagleDraft
from autobot_llm.engine.speculative.eagle.cache import DraftCache, Part, run_layer
from autobot_llm.engine.speculative.eagle.model import draft_rope

VOCAB, DRAFT_VOCAB, SIZE = 96, 48, 128
BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_tokens_and_features_come_from_the_host_or_from_the_pass_before(
    norm_before_residual: bool, device: torch.device, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def ids(high: int, number: int) -> torch.Tensor:
        return torch.randint(0, high, (number,), generator=generator).to(device, torch.int32)

    rows_T = torch.tensor([-1, 2, 0, -1, 1], dtype=torch.int32, device=device)
    ids_T = torch.where(rows_T < 0, ids(VOCAB, 5), -1)
    width = 200  # no power of two
    arguments = (ids_T, rows_T, ids(DRAFT_VOCAB, 3), ids(VOCAB, DRAFT_VOCAB), numbers(VOCAB, width), numbers(8, width),
                 numbers(4, width), numbers(width), numbers(width), 1e-5)  # fmt: skip
    found = draft_input(*arguments, norm_before_residual=norm_before_residual)
    expected = draft_input_reference(*arguments, norm_before_residual=norm_before_residual)
    for mine, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), twin, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@pytest.mark.parametrize(("norm_before_residual", "has_biases"), [(False, False), (True, True)])
def test_chains_of_passes_return_what_the_plain_layer_returns(
    norm_before_residual: bool, has_biases: bool, device: torch.device, dtype: torch.dtype
) -> None:
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
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.08, generator=generator)
            parameter.copy_(parameter.to(dtype))
    twin.choose_vocabulary(torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values)
    twin.requires_grad_(False)
    draft = EagleDraft(config).requires_grad_(False)
    draft.load_state_dict(twin.state_dict())
    draft = draft.to(device, dtype)
    embed_VE = torch.randn(VOCAB, SIZE, generator=generator).to(dtype)

    storage = PagedStorage.allocate(layer, 16, BLOCK_SIZE, dtype, device)
    shape = AttentionShape(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.sliding_windows)
    attention = SdpaPagedAttention(shape, storage.keys, storage.values, reason="a test", math_dtype=torch.float32)
    decoder = EagleDecoder(draft, embed_VE.to(device), storage, attention, max_context=128, max_rows=32)

    lengths, sequences = (9, 4), []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        sequences.append(Sequence(i, ids, SamplingParams(max_tokens=9)))
        sequences[-1].block_ids.extend([7 - i, 3 + i])
    streams_TF = torch.randn(sum(lengths), 3 * SIZE, generator=generator).to(dtype)
    features_TE = decoder.fuse(streams_TF.to(device))
    expected_TE = twin.fuse(streams_TF.float())
    torch.testing.assert_close(features_TE.cpu().float(), expected_TE, rtol=BOUNDS[dtype], atol=10 * BOUNDS[dtype])
    decoder.features_TE[: sum(lengths)].copy_(features_TE)

    caches = [DraftCache(layer, 0, embed_VE.device) for _ in lengths]
    rope_PD = draft_rope(config, 128, torch.float32, "cpu")
    parts = [Part(cache, 0, s.token_ids) for cache, s in zip(caches, sequences, strict=True)]
    feature_SE = run_layer(twin, embed_VE.float(), rope_PD, parts, expected_TE)[np.cumsum(lengths) - 1]
    batch = build_batch([ScheduledSequence(s, 0, len(s.token_ids), True) for s in sequences], BLOCK_SIZE)
    last_tokens = torch.zeros(2, dtype=torch.int32, device=device)
    for depth in range(3):
        inputs = DecoderInputs(
            *(torch.from_numpy(array.astype(np.int32)).to(device)
              for array in (batch.ids_T, batch.pending_rows_T, batch.positions_T, batch.slots_T)),
            last_tokens, torch.from_numpy(batch.logit_rows_R.astype(np.int32)).to(device),
        )  # fmt: skip
        logits_RW = decoder.forward(inputs, attention.prepare(batch)).cpu()
        expected_RW = twin.logits(feature_SE)
        assert logits_RW.dtype == torch.float32
        assert (logits_RW - expected_RW).norm() < (depth + 1) * BOUNDS[dtype] * expected_RW.norm()
        # both go on with the same tokens, which the decoder finds as the draft's ids in rows of the pass before
        chosen_R = expected_RW.argmax(dim=-1)
        last_tokens.copy_(chosen_R)
        ids = twin.target_ids[chosen_R].tolist()
        parts = [Part(cache, length + depth, [token_id])
                 for cache, length, token_id in zip(caches, lengths, ids, strict=True)]  # fmt: skip
        feature_SE = run_layer(twin, embed_VE.float(), rope_PD, parts, feature_SE)
        for row, sequence in enumerate(sequences):
            sequence.token_ids.append(-1)
            sequence.pending_row = row
        batch = build_batch([ScheduledSequence(s, len(s.token_ids) - 1, 1, True) for s in sequences], BLOCK_SIZE)
