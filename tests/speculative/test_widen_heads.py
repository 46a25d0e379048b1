"""Heads and drafts of the small model work for the widened one: they propose the same tokens."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from model_folders import TINY

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.speculative.eagle import EagleConfig, EagleDraft, EagleDrafter, load_eagle, save_eagle
from autobot_llm.engine.speculative.medusa.checkpoint import load_medusa_heads, save_medusa_heads
from autobot_llm.engine.speculative.medusa.heads import MedusaHeads
from autobot_llm.training.forward import Model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from widen import widen_folder
from widen_heads import widen_heads
from widening import SHAPES

LAYERS = (2, 5, 8)
IDS_BS = torch.tensor([[2, 186, 300, 411, 1000, 87, 4, 3, 186]])


def test_widened_heads_and_drafts_propose_what_the_small_ones_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = Model.load(TINY, dtype=torch.float32, device="cpu")
    lm_head_VE = small.weights.lm_head_VE
    heads = MedusaHeads(2, 384, 8192, num_layers=2, lm_head_VE=lm_head_VE)
    layer = replace(load_config(TINY), num_layers=1, sliding_windows=(0,), tie_word_embeddings=False)
    draft = EagleDraft(EagleConfig(layer, 4096, 384, LAYERS, shares_lm_head=True))
    with torch.no_grad():
        for name, parameter in [*heads.named_parameters(), *draft.named_parameters()]:
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.05)
    draft.choose_vocabulary(torch.arange(0, 8192, 2))
    save_medusa_heads(tmp_path / "heads", heads, base_model="tiny", dtype=torch.float32)
    save_eagle(tmp_path / "draft", draft, base_model="tiny", dtype=torch.float32)
    widen_folder(TINY, tmp_path / "wide", SHAPES["small"], dtype=torch.float32)
    for name in ("heads", "draft"):
        widen_heads(TINY, tmp_path / name, tmp_path / f"wide {name}", SHAPES["small"], dtype=torch.float32)
    wide = Model.load(tmp_path / "wide", dtype=torch.float32, device="cpu")

    proposed, trees = [], []
    for model, prefix in ((small, ""), (wide, "wide ")):
        size, lm_head_VE = model.config.hidden_size, model.weights.lm_head_VE
        hidden = model.hidden(IDS_BS, feature_layers=LAYERS)
        loaded = load_medusa_heads(
            tmp_path / f"{prefix}heads", hidden_size=size, vocab_size=8192, lm_head_VE=lm_head_VE
        )
        proposed.append(loaded.heads(hidden.normed_BSE[0]))
        eagle = load_eagle(tmp_path / f"{prefix}draft", vocab_size=8192, target_hidden_size=size, lm_head_VE=lm_head_VE)
        drafter = EagleDrafter(eagle, model.weights.embed_VE, max_context=64)
        drafter.extend(torch.cat(hidden.features, dim=-1)[0], torch.tensor([*IDS_BS[0, 1:].tolist(), 500]))
        trees.append(drafter.tree(12, max_depth=3, top_k=3))
    torch.testing.assert_close(proposed[1], proposed[0], rtol=1e-3, atol=1e-3)
    assert proposed[0].abs().max() > 1.0
    assert trees[1].tokens_N.tolist() == trees[0].tokens_N.tolist()
    torch.testing.assert_close(trees[1].log_probabilities_N, trees[0].log_probabilities_N, rtol=1e-3, atol=1e-3)
    assert len(set(trees[0].tokens_N.tolist())) > 3
