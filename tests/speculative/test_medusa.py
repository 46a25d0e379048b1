"""Medusa's heads: files that are read and refused, and decoding that gives the very tokens of greedy decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_folders import TINY, write_random_model

from autobot_llm.engine.speculative.medusa import (
    CandidateTree,
    MedusaConfig,
    MedusaDecoder,
    MedusaHeads,
    choose_tree,
)
from autobot_llm.engine.speculative.medusa.checkpoint import load_medusa_heads, save_medusa_heads
from autobot_llm.engine.speculative.medusa.heads import StackedHeads
from autobot_llm.errors import ConfigurationError, ModelLoadError

SIZES = {"hidden_size": 48, "vocab_size": 97}


def random_heads(
    num_heads: int = 3, num_layers: int = 1, lm_head_VE: torch.Tensor | None = None, **sizes: int
) -> MedusaHeads:
    heads = MedusaHeads(num_heads, **(SIZES | sizes), num_layers=num_layers, lm_head_VE=lm_head_VE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return heads


def config(**changes: Any) -> MedusaConfig:
    return MedusaConfig(**{"num_heads": 3, **SIZES, "tree_candidates": 16, **changes})


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_stacked_heads_equal_the_heads_one_by_one(num_layers: int, shared: bool) -> None:
    lm_head_VE = torch.randn(97, 48, dtype=torch.float64) if shared else None
    heads = random_heads(num_layers=num_layers, lm_head_VE=lm_head_VE).double()  # sums in another order, not near ties
    hidden_RE = torch.randn(5, 48, dtype=torch.float64)
    expected_KRV = heads(hidden_RE).detach()
    stacked = StackedHeads(heads)
    torch.testing.assert_close(stacked.logits(hidden_RE), expected_KRV)
    assert stacked.top_tokens(hidden_RE, 4).tolist() == expected_KRV.topk(4).indices.transpose(0, 1).tolist()


def test_a_new_head_that_shares_the_projection_is_the_models_own() -> None:
    lm_head_VE, hidden_RE = torch.randn(97, 48), torch.randn(4, 48)
    heads = MedusaHeads(2, **SIZES, num_layers=2, lm_head_VE=lm_head_VE)
    torch.testing.assert_close(heads(hidden_RE)[1], hidden_RE @ lm_head_VE.t())


def write_published(folder: Path, heads: MedusaHeads, **about: Any) -> None:
    """As FasterDecoding publishes them."""
    torch.save(heads.state_dict(), folder / "medusa_lm_head.pt")
    fields = {"medusa_num_heads": len(heads), "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (folder / "config.json").write_text(json.dumps(fields | about))


def test_the_published_format_loads(tmp_path: Path) -> None:
    heads = random_heads()
    assert set(heads.state_dict()) == {
        f"{i}.{name}" for i in range(3) for name in ("0.linear.weight", "0.linear.bias", "1.weight")
    }
    write_published(tmp_path, heads)
    hidden_RE = torch.randn(2, 48)
    for source in (tmp_path, tmp_path / "medusa_lm_head.pt"):
        loaded = load_medusa_heads(source, **SIZES)
        torch.testing.assert_close(loaded.heads(hidden_RE), heads(hidden_RE).detach())
    assert loaded.about.base_model_name_or_path == "lmsys/vicuna-7b-v1.3"


@pytest.mark.parametrize("nested", [True, False])
def test_a_dictionary_of_heads_loads(nested: bool) -> None:
    heads = random_heads()
    source: dict[str, Any] = {f"head_{i}": head.state_dict() for i, head in enumerate(heads)}
    if not nested:
        source = {f"{head}.{name}": tensor for head, state in source.items() for name, tensor in state.items()}
    decoder = MedusaDecoder(config())
    assert decoder.load_heads(source)
    hidden_E = torch.randn(48)
    candidates = decoder.generate_candidates(hidden_E, next_token=7)
    best_KN = heads(hidden_E[None])[:, 0].topk(10).indices
    tree = candidates.tree
    assert tree.num_nodes == 16
    assert candidates.tokens_N[0] == 7
    for node in range(1, tree.num_nodes):
        assert candidates.tokens_N[node] == best_KN[tree.depths[node] - 1, tree.ranks[node]]


def test_what_is_saved_loads_with_its_tree(tmp_path: Path) -> None:
    lm_head_VE = torch.randn(97, 48)
    heads = random_heads(num_layers=2, lm_head_VE=lm_head_VE)
    accuracies = [[0.5, 0.2], [0.3, 0.1], [0.2, 0.1]]
    save_medusa_heads(tmp_path, heads, base_model="tiny", accuracies=accuracies, dtype=torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "medusa_lm_head.safetensors"]
    decoder = MedusaDecoder(config(tree_candidates=6), lm_head_VE=lm_head_VE)
    assert decoder.load_heads(str(tmp_path))
    assert decoder.tree == choose_tree(accuracies, 6)
    with pytest.raises(ModelLoadError, match=r"0\.2\.weight is missing"):
        load_medusa_heads(tmp_path, **SIZES)


def test_nothing_at_the_path_is_false_and_no_error(tmp_path: Path) -> None:
    decoder = MedusaDecoder(config())
    assert decoder.load_heads(tmp_path / "nowhere") is False
    assert decoder.num_heads == 0
    with pytest.raises(ConfigurationError, match="load_heads"):
        decoder.generate_candidates(torch.randn(48), 1)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_files_of_another_model_and_hostile_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_published(tmp_path, random_heads())
    with pytest.raises(ModelLoadError, match=r"0\.0\.linear\.weight has shape \(48, 48\); .*hidden_size=64"):
        load_medusa_heads(tmp_path, hidden_size=64, vocab_size=97)
    with pytest.raises(ModelLoadError, match=r"0\.1\.weight has shape \(97, 48\); .*vocab_size=100"):
        load_medusa_heads(tmp_path, hidden_size=48, vocab_size=100)
    write_published(tmp_path, random_heads(), medusa_num_heads=5)
    with pytest.raises(ModelLoadError, match="3 heads, but config.json says medusa_num_heads=5"):
        load_medusa_heads(tmp_path, **SIZES)
    with pytest.raises(ModelLoadError, match="lm_head"):
        load_medusa_heads({"lm_head.weight": torch.zeros(2)}, **SIZES)
    torch.save({"0.0.linear.weight": Malice()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ModelLoadError, match=r"medusa_lm_head\.pt"):
        load_medusa_heads(tmp_path, **SIZES)
    assert capsys.readouterr().out == ""
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ModelLoadError):
        load_medusa_heads(tmp_path, **SIZES)
    with pytest.raises(ConfigurationError, match="3 heads"):
        MedusaDecoder(config(), tree=CandidateTree((-1, 0, 1, 2, 3), (0,) * 5)).load_heads(
            dict(random_heads().state_dict())
        )


def test_wrong_values_are_named() -> None:
    for field, value in (("num_heads", 0), ("tree_candidates", 1), ("typical_acceptance_threshold", 0.0)):
        with pytest.raises(ConfigurationError, match=field):
            MedusaConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="acceptance='fast'"):
        MedusaDecoder(config(), acceptance="fast")  # type: ignore[arg-type]


class MaskedModel:
    """transformers' model, computed without a cache and with any mask."""

    def __init__(self, folder: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.lm_head_VE = self._model.lm_head.weight.detach()
        self.num_steps = 0

    def __call__(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, mask_TT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_steps += 1
        bias = torch.zeros(mask_TT.shape).masked_fill_(~mask_TT, torch.finfo(torch.float32).min)
        with torch.no_grad():
            normed_TE = self._model.model(
                ids_T[None], attention_mask=bias[None, None], position_ids=positions_T[None], use_cache=False
            ).last_hidden_state[0]
        return normed_TE, normed_TE @ self.lm_head_VE.t()

    def greedy(self, ids: list[int], num_tokens: int) -> list[int]:
        made = list(ids)
        with torch.no_grad():
            for _ in range(num_tokens):
                made.append(int(self._model(torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
        return made[len(ids) :]


def test_medusa_gives_the_tokens_of_greedy_decoding(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", initializer_range=0.15)
    target = MaskedModel(tmp_path)
    lm_head_VE = target.lm_head_VE
    decoder = MedusaDecoder(MedusaConfig(3, 64, 8192, tree_candidates=32), lm_head_VE=lm_head_VE)
    decoder.load_heads(dict(random_heads(lm_head_VE=lm_head_VE, hidden_size=64, vocab_size=8192).state_dict()))
    prompt = [5, 900, 31, 44]
    expected = target.greedy(prompt, 24)
    tokens = [token for step in decoder.generate(target, prompt, 24) for token in step.tokens]
    assert tokens[:24] == expected


def test_a_tree_with_the_right_tokens_is_accepted_to_its_end() -> None:
    """Heads that know the answer: each step accepts a whole path, through the tree's mask and positions."""
    target = MaskedModel(TINY)
    prompt = [2, 186, 300, 411, 3]
    expected = target.greedy(prompt, 13)
    lm_head_VE = target.lm_head_VE

    class Knowing(MedusaDecoder):
        place = 0

        def generate_candidates(self, hidden_states: torch.Tensor, next_token: int | None = None) -> Any:
            made = super().generate_candidates(hidden_states, next_token)
            first_ranks = [
                node for node in range(1, made.tree.num_nodes) if set(made.tree.rank_paths()[node - 1]) == {1}
            ]
            for node in first_ranks:  # the second choices are right, the first ones are not
                made.tokens_N[node] = expected[self.place + made.tree.depths[node]]
            for node in set(range(1, made.tree.num_nodes)) - set(first_ranks):
                made.tokens_N[node] = 4000 + node
            return made

    tree = CandidateTree.from_rank_paths([[0], [1], [1, 0], [1, 1], [0, 1], [1, 1, 1], [1, 1, 0]])
    decoder = Knowing(MedusaConfig(3, 384, 8192), lm_head_VE=lm_head_VE, tree=tree)
    heads = MedusaHeads(3, 384, 8192, lm_head_VE=lm_head_VE)
    decoder.load_heads(dict(heads.state_dict()))
    tokens: list[int] = []
    for step in decoder.generate(target, prompt, 12):
        tokens += step.tokens
        decoder.place = len(tokens) - 1
        assert len(step.tokens) in (1, 4)
    assert tokens == expected[: len(tokens)] and len(tokens) == 13
    assert target.num_steps == 4


def test_an_answer_takes_at_most_max_steps() -> None:
    target = MaskedModel(TINY)
    lm_head_VE = target.lm_head_VE
    decoder = MedusaDecoder(MedusaConfig(2, 384, 8192, tree_candidates=4, max_steps=3), lm_head_VE=lm_head_VE)
    decoder.load_heads(dict(MedusaHeads(2, 384, 8192, lm_head_VE=lm_head_VE).state_dict()))
    assert len(list(decoder.generate(target, [2, 7, 9], 100))) == 1 + 3


def test_typical_acceptance_says_that_it_is_lossy() -> None:
    lm_head_VE = torch.randn(97, 48)
    decoder = MedusaDecoder(config(tree_candidates=4), lm_head_VE=lm_head_VE, acceptance="typical")
    decoder.load_heads(dict(random_heads(lm_head_VE=lm_head_VE).state_dict()))
    candidates = decoder.generate_candidates(torch.randn(48))
    flat = torch.full((4, 97), 1 / 97)
    accepted = decoder.verify_and_accept(candidates, flat)
    assert not accepted.lossless
    assert accepted.num_accepted == candidates.tree.max_depth, "in a flat distribution every token is typical"
