"""The fused decoder with quantized weights, against itself with the numbers that they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import write_random_model

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape
from autobot_llm.engine.attention.sdpa_paged import SdpaPagedAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.gpu.decoder import DecoderInputs, FusedDecoder
from autobot_llm.engine.gpu.packing import WeightPacker
from autobot_llm.engine.kernels.gpu import quantized_tiles
from autobot_llm.engine.kernels.gpu.quantized_tiles import choose_quantized_tile
from autobot_llm.engine.kernels.gpu.tiles import Kind
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.weights import MATRICES, DecoderWeights, LayerWeights, load_weights
from autobot_llm.engine.quantization.packed import PackedWeight
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.sequence import SamplingParams, Sequence

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 256, "initializer_range": 0.1}  # fmt: skip


def dense(weights: DecoderWeights) -> DecoderWeights:
    def of_layer(layer: LayerWeights) -> LayerWeights:
        matrices = {name: getattr(layer, name) for name in MATRICES}
        assert all(isinstance(matrix, PackedWeight) for matrix in matrices.values())
        return replace(layer, **{name: matrix.dequantized(weights.dtype) for name, matrix in matrices.items()})

    return replace(weights, layers=tuple(map(of_layer, weights.layers)))


def logits(config: ModelConfig, weights: DecoderWeights, lengths: tuple[int, ...]) -> torch.Tensor:
    """Of the last tokens of fresh prompts."""
    device = weights.device
    storage = PagedStorage.allocate(config, 32, BLOCK_SIZE, weights.dtype, device)
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_size, config.sliding_windows)
    attention = SdpaPagedAttention(shape, storage.keys, storage.values, reason="a test", math_dtype=torch.float32)
    decoder = FusedDecoder(config, weights, storage, attention, max_context=256)
    rng, parts, first = np.random.default_rng(0), [], 0
    for i, length in enumerate(lengths):
        sequence = Sequence(i, rng.integers(5, 250, length).tolist(), SamplingParams(max_tokens=1))
        sequence.block_ids = list(range(first, first + length // BLOCK_SIZE + 1))
        first += len(sequence.block_ids)
        parts.append(ScheduledSequence(sequence, 0, length, True))
    batch = build_batch(parts, BLOCK_SIZE)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    inputs = DecoderInputs(
        on_device(batch.ids_T), on_device(batch.pending_rows_T), on_device(batch.positions_T),
        on_device(batch.slots_T), torch.zeros(1, dtype=torch.int32, device=device), on_device(batch.logit_rows_R),
    )  # fmt: skip
    return decoder.forward(inputs, attention.prepare(batch))


# few rows, and as many as no tile is made for, where w8a8 rounds the activations
@pytest.mark.parametrize(
    ("kind", "lengths", "error"),
    [("w8", (3, 2), 0.0), ("w4", (3, 2), 0.0), ("w4", (40, 26), 0.0), ("w8a8", (20, 16), 3e-2)],
    ids=["w8-few", "w4-few", "w4-many", "w8a8-many"],
)
def test_packed_weights_give_the_logits_of_the_numbers_they_stand_for(
    tmp_path: Path, kind: str, lengths: tuple[int, ...], error: float, device: torch.device, dtype: torch.dtype
) -> None:
    write_random_model(tmp_path, "qwen2", dtype=str(dtype).removeprefix("torch."), **SIZES)  # it has biases
    config = load_config(tmp_path)
    packer = WeightPacker.for_model(config, QuantizationType(kind), (9, 0))
    weights = load_weights(tmp_path, config, dtype=None, device=device, convert=packer)
    found, expected = logits(config, weights, lengths), logits(config, dense(weights), lengths)
    assert found.shape == (len(lengths), 256) and found.dtype == torch.float32
    bound = error + (4e-3 if dtype == torch.float16 else 3e-2)
    assert (found - expected).norm() < bound * expected.norm()


def test_every_number_of_rows_has_the_tile_of_the_nearest_shape_or_none() -> None:
    for num_bits, tables in quantized_tiles.TABLES.items():
        limits = [most_rows for most_rows, _ in tables]
        assert limits == sorted(limits)
        for kind in Kind:
            for num_rows in (1, limits[0], limits[0] + 1, limits[-1]):
                assert choose_quantized_tile(kind, num_rows, 384, 384, num_bits) is not None
            assert choose_quantized_tile(kind, limits[-1] + 1, 384, 384, num_bits) is None
