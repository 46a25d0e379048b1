"""The training forward computes what the engine computes, whole, cached, and for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import TINY, write_random_model
from test_decoder import executor, sequence, step

from autobot_llm.training.forward import BatchCache, Model

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied, with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral with a window": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def engine_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """The engine's logits after each of the tokens."""
    runner, one = executor(folder), sequence(ids, list(range(8)))
    return torch.stack([torch.from_numpy(step(runner, (one, 1)))[0] for _ in ids])


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_training_forward_equals_the_engine(kind: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[kind]
    write_random_model(tmp_path, family, **overrides)
    model = Model.load(tmp_path, dtype=torch.float32, device="cpu")
    ids_BS = torch.randint(0, 8192, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = model.logits(model.hidden(ids_BS).normed_BSE)
    for row, ids in zip(logits, ids_BS, strict=True):
        expected = engine_logits(tmp_path, ids.tolist())
        assert expected.abs().max() > 1.0
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral with a window", "qwen3"])
def test_a_batch_continued_token_by_token_equals_the_whole(kind: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[kind]
    write_random_model(tmp_path, family, **overrides)
    model = Model.load(tmp_path, dtype=torch.float32, device="cpu")
    ids_BS = torch.randint(0, 8192, (3, 30), generator=torch.Generator().manual_seed(2))
    whole = model.hidden(ids_BS).normed_BSE
    cache = BatchCache.empty(model, 3, 30)
    parts = [model.hidden(ids_BS[:, :9], cache=cache).normed_BSE]
    parts += [model.hidden(ids_BS[:, i : i + 1], first=i, cache=cache).normed_BSE for i in range(9, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_features_are_the_streams_that_layers_read(tmp_path: Path) -> None:
    model = Model.load(TINY, dtype=torch.float32, device="cpu")
    ids_BS = torch.tensor([[2, 90, 300, 8]])
    hidden = model.hidden(ids_BS, feature_layers=(0, 4, 8))
    first, _, last = hidden.features
    torch.testing.assert_close(first, torch.nn.functional.embedding(ids_BS, model.weights.embed_VE))
    normed = torch.nn.functional.rms_norm(last, (384,), model.weights.norm_E, model.config.rms_norm_eps)
    torch.testing.assert_close(normed, hidden.normed_BSE)
