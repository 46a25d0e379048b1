"""EAGLE-3's draft: chains and trees equal a twin without a cache, training runs what decoding runs, and files load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_folders import TINY

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.speculative.eagle import (
    EagleConfig,
    EagleDraft,
    EagleDrafter,
    default_feature_layers,
    load_eagle,
    save_eagle,
)
from autobot_llm.engine.speculative.eagle.model import draft_rope
from autobot_llm.errors import ContextLengthError, ModelLoadError
from autobot_llm.training.eagle import Unrolled

VOCAB, DRAFT_VOCAB, SIZE, TARGET_SIZE = 120, 40, 32, 32


def config(**changes: bool) -> EagleConfig:
    layer = replace(
        load_config(TINY), vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=48, num_layers=1, num_heads=4,
        num_kv_heads=2, head_size=8, sliding_windows=(0,), tie_word_embeddings=False, max_position_embeddings=256,
    )  # fmt: skip
    return EagleConfig(layer, DRAFT_VOCAB, TARGET_SIZE, (2, 4, 5), **changes)


def random_draft(seed: int = 0, **changes: bool) -> EagleDraft:
    generator = torch.Generator().manual_seed(seed)
    draft = EagleDraft(config(**changes))
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25, generator=generator)
    draft.choose_vocabulary(torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values)
    return draft.requires_grad_(False)


EMBED_VE = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(9))
FEATURES_TF = torch.randn(20, 3 * TARGET_SIZE, generator=torch.Generator().manual_seed(10))
NEXT_IDS_T = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(11))


def after(draft: EagleDraft, drafted: list[int]) -> torch.Tensor:
    """The slow twin: the log probabilities W after these drafted tokens, everything computed again without a cache."""
    cos_PD, sin_PD = draft_rope(draft.config, 256, torch.float32, "cpu")
    ids, features = NEXT_IDS_T.tolist(), draft.fuse(FEATURES_TF)
    for token in [None, *drafted]:
        if token is not None:
            ids.append(token)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            scores_HTT = torch.einsum("thd,shd->hts", q, k) / 8**0.5
            hidden = torch.ones(scores_HTT.shape[1:], dtype=torch.bool).triu(1)
            return torch.einsum("hts,shd->thd", scores_HTT.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)

        rows = slice(0, len(ids))
        returned_TE = draft(EMBED_VE[ids], features, (cos_PD[rows, None], sin_PD[rows, None]), attend)
        features = torch.cat((features, returned_TE[-1:]))
    return draft.logits(returned_TE[-1]).log_softmax(dim=-1)


def drafter(draft: EagleDraft, *, max_context: int = 200) -> EagleDrafter:
    made = EagleDrafter(draft, EMBED_VE, max_context=max_context)
    made.extend(FEATURES_TF, NEXT_IDS_T)
    return made


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_a_chain_equals_the_twin_without_a_cache(norm_before_residual: bool) -> None:
    draft = random_draft(norm_before_residual=norm_before_residual)
    tokens = drafter(draft).chain(6)
    expected: list[int] = []
    for _ in range(6):
        expected.append(int(draft.target_ids[after(draft, expected).argmax()]))
    assert tokens == expected
    assert len(set(tokens)) > 1 and all(draft.t2d[token] for token in tokens)


def test_every_path_of_a_tree_has_the_twins_probability() -> None:
    draft = random_draft()
    made = drafter(draft).tree(24, max_depth=4, top_k=3)
    tree, tokens = made.tree, made.tokens_N.tolist()
    assert tree.num_nodes == 24 and tree.max_depth > 2
    assert tokens[0] == NEXT_IDS_T[-1]
    for node in range(1, tree.num_nodes):
        path = [tokens[i] for i in tree.path_to(node)[1:]]
        log_W = after(draft, path[:-1])
        place = draft.target_ids.tolist().index(path[-1])
        parent = made.log_probabilities_N[tree.parents[node]]
        assert made.log_probabilities_N[node] == pytest.approx(float(parent + log_W[place]), abs=1e-4)
        assert log_W.argsort(descending=True)[tree.ranks[node]] == place


def test_the_tree_holds_the_most_probable_nodes_of_its_levels() -> None:
    draft = random_draft()
    small, large = drafter(draft).tree(6, max_depth=4, top_k=4), drafter(draft).tree(40, max_depth=4, top_k=4)
    best = sorted(large.log_probabilities_N.tolist(), reverse=True)[:6]
    assert sorted(small.log_probabilities_N.tolist(), reverse=True) == pytest.approx(best)
    chain = drafter(draft).chain(4)
    narrow = drafter(draft).tree(5, max_depth=4, top_k=1)
    assert narrow.tokens_N.tolist()[1:] == chain


def test_features_may_come_in_pieces_and_drafts_leave_nothing_behind() -> None:
    draft = random_draft()
    expected = drafter(draft).chain(5)
    made = EagleDrafter(draft, EMBED_VE, max_context=200)
    made.extend(FEATURES_TF[:7], NEXT_IDS_T[:7])
    made.tree(16, max_depth=3, top_k=3)
    made.extend(FEATURES_TF[7:15], NEXT_IDS_T[7:15])
    made.chain(9)
    made.truncate(11)
    made.extend(FEATURES_TF[11:19], NEXT_IDS_T[11:19])
    made.extend(FEATURES_TF[19:], NEXT_IDS_T[19:])
    assert made.num_computed_tokens == 20
    assert made.chain(5) == expected


def test_drafts_end_where_the_context_ends() -> None:
    draft = random_draft()
    assert drafter(draft, max_context=22).chain(8) == drafter(draft).chain(8)[:3]
    assert drafter(draft, max_context=21).tree(30, max_depth=5, top_k=3).tree.max_depth == 1
    with pytest.raises(ContextLengthError, match="20 tokens for a draft of at most 19"):
        drafter(draft, max_context=19)


def test_training_runs_what_decoding_runs() -> None:
    """Row p of the unrolled step j is what the drafter returns j tokens after it began at position p."""
    draft = random_draft()
    rope = draft_rope(draft.config, 256, torch.float32, "cpu")
    embedded, fused = EMBED_VE[NEXT_IDS_T].expand(2, -1, -1), draft.fuse(FEATURES_TF).expand(2, -1, -1)
    firsts = (2, 9)
    steps = Unrolled(draft, rope, embedded, fused, torch.tensor(firsts), 18)
    for step in range(4):
        feature = steps.advance()
        for row, begun in ((0, 3), (0, 11), (0, 19 - step), (1, 11), (1, 19 - step)):
            made = EagleDrafter(draft, EMBED_VE, max_context=200)
            made.extend(FEATURES_TF[: begun + 1], NEXT_IDS_T[: begun + 1])
            returned_1E = made._feature_1E
            for i in range(step):  # the real text, drafted
                place, token = begun + 1 + i, NEXT_IDS_T[begun + 1 + i : begun + 2 + i]
                mask = torch.ones(1, place + 1, dtype=torch.bool)
                returned_1E = made._forward(token, returned_1E, torch.tensor([place]), place, mask)
            torch.testing.assert_close(feature[row, begun - firsts[row]], returned_1E[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shares_lm_head", [False, True])
def test_what_is_saved_loads(tmp_path: Path, shares_lm_head: bool) -> None:
    draft = random_draft(shares_lm_head=shares_lm_head)
    lm_head_VE = torch.randn(VOCAB, SIZE)
    if shares_lm_head:
        draft.share_lm_head(lm_head_VE)
    save_eagle(tmp_path, draft, base_model="tiny", dtype=torch.float32)
    loaded = load_eagle(tmp_path, vocab_size=VOCAB, target_hidden_size=TARGET_SIZE, lm_head_VE=lm_head_VE)
    assert loaded.config.feature_layers == (2, 4, 5)
    assert drafter(loaded).chain(5) == drafter(draft).chain(5)
    if shares_lm_head:
        with pytest.raises(ModelLoadError, match="shares the target's projection"):
            load_eagle(tmp_path, vocab_size=VOCAB, target_hidden_size=TARGET_SIZE)


def published_config(**changes: object) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": SIZE,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": VOCAB, "draft_vocab_size": DRAFT_VOCAB, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "max_position_embeddings": 256, "torch_dtype": "float16", **changes,
    }  # fmt: skip


@pytest.mark.parametrize("layer_name", ["midlayer.", "layers.0."])
def test_the_published_format_loads(tmp_path: Path, layer_name: str) -> None:
    draft = random_draft()
    names = set(draft.state_dict())
    assert {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", "midlayer.hidden_norm.weight"} < names
    state = {name.replace("midlayer.", layer_name): tensor.clone() for name, tensor in draft.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_eagle(tmp_path, vocab_size=VOCAB, target_hidden_size=TARGET_SIZE)
    assert loaded.config.feature_layers is None
    assert drafter(loaded).chain(4) == drafter(draft).chain(4)
    # some exports have the target's embeddings beside it
    safetensors.torch.save_file(state | {"embed_tokens.weight": EMBED_VE.clone()}, tmp_path / "model.safetensors")
    loaded = load_eagle(tmp_path, vocab_size=VOCAB, target_hidden_size=TARGET_SIZE)
    assert drafter(loaded).chain(4) == drafter(draft).chain(4)


def test_a_draft_of_another_target_or_with_wrong_tensors_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "target_hidden_size": TARGET_SIZE}
    state = random_draft().state_dict()
    for config_changes, state_changes, complaint in (
        ({"vocab_size": 121}, {}, "vocab_size=121; the target has 120"),
        ({"target_hidden_size": 64}, {}, "features of 64; the target's are 32"),
        ({"num_hidden_layers": 2}, {}, "num_hidden_layers=2: an EAGLE-3 draft has 1"),
        ({"draft_vocab_size": 41}, {}, r"shape \(40"),
        ({"draft_vocab_size": 121}, {}, "draft_vocab_size=121: expected 1 to 120"),
        ({}, {"fc.weight": None}, "fc.weight is missing"),
        ({}, {"fc.weight": torch.zeros(SIZE, SIZE)}, r"fc.weight has shape \(32, 32\)"),
        ({}, {"fc2.weight": torch.zeros(2)}, "has no tensor fc2.weight"),
        ({}, {"d2t": torch.full((DRAFT_VOCAB,), 100)}, "d2t points outside"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(published_config(**config_changes)))
        changed = {name: tensor for name, tensor in (state | state_changes).items() if tensor is not None}
        safetensors.torch.save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelLoadError, match=complaint):
            load_eagle(tmp_path, **sizes)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="neither model.safetensors nor pytorch_model.bin"):
        load_eagle(tmp_path, **sizes)


def test_the_usual_feature_layers_are_an_early_a_middle_and_a_late_one() -> None:
    assert default_feature_layers(32) == (2, 16, 29)
    with pytest.raises(ModelLoadError, match="4 layers"):
        default_feature_layers(4)
