"""Train an EAGLE-3 draft by training-time test. Knows the loss and its unrolled steps; knows nothing of where texts
come from.

The draft is run several steps on its own features, as it will be when it drafts. Row p of step j stands for a draft
that began at position p and has come j tokens far: it reads token p + 1 + j of the real text and what row p of step
j - 1 returned, sees the true positions up to p and its own steps before it, and learns the target's distribution of
token p + 2 + j, as far as the draft's vocabulary goes. Source: section 3.2 of the paper; step j counts 0.8^j.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.speculative.eagle.checkpoint import load_eagle, save_eagle
from autobot_llm.engine.speculative.eagle.config import EagleConfig, default_feature_layers
from autobot_llm.engine.speculative.eagle.model import EagleDraft, draft_rope
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.accuracy import NUM_RANKS, Accuracies, RankCounts
from autobot_llm.training.answers import Answers, Batch
from autobot_llm.training.forward import Hidden, Model

STEP_WEIGHT_DECAY = 0.8
MAX_DRAFT_VOCABULARY = 32_000
INITIAL_STD = 0.02


# B sequences, S positions, H query heads, K key/value heads, D head size, R rows that count, W draft vocabulary
@dataclass(frozen=True, slots=True)
class EagleOptions:
    """`draft_vocab_size` None: half of the target's tokens, at most 32,000. `feature_layers` None: as published.
    `shares_lm_head` None: where the model ties its embeddings.

    `init`: a draft to go on from, whose layer, feature layers and projection stay. A draft that shares the target's
    projection may get another `draft_vocab_size`; None: it knows the tokens that it knew.
    """

    num_steps: int = 5
    draft_vocab_size: int | None = None
    feature_layers: tuple[int, int, int] | None = None
    shares_lm_head: bool | None = None
    init: Path | None = None


class EagleTask:
    name = "eagle3"

    def __init__(self, model: Model, options: EagleOptions, learned: Answers) -> None:
        self.model = model
        self._num_steps = options.num_steps
        self.draft = _draft_to_go_on_from(model, options, learned) if options.init else _new(model, options, learned)
        config, device = model.config, model.weights.device
        layers = self.draft.config.feature_layers or default_feature_layers(config.num_layers)
        if max(layers) > config.num_layers or min(layers) < 0:
            raise ConfigurationError(f"feature layers {layers}: expected numbers from 0 to {config.num_layers}")
        self._layers = layers
        self._rope = draft_rope(self.draft.config, config.max_position_embeddings, torch.float32, device)

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.draft.parameters()

    def learn(self, batch: Batch) -> torch.Tensor:
        hidden = self._target(batch)
        with torch.no_grad():
            logits_RV, place_T = self._known_logits(batch, hidden)
            logits_RV = logits_RV.float()
            wanted_RW = (logits_RV[:, self.draft.target_ids] - logits_RV.logsumexp(dim=-1, keepdim=True)).exp_()
        losses = []
        for step, (logits_SW, next_S) in enumerate(self._guesses(batch, hidden)):
            loss_S = -(wanted_RW[place_T[next_S]] * logits_SW.float().log_softmax(dim=-1)).sum(dim=-1)
            losses.append(STEP_WEIGHT_DECAY**step * loss_S.sum() / max(1, loss_S.shape[0]))
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, answers: Answers, batch_size: int) -> Accuracies:
        counts = RankCounts()
        for category in sorted(set(answers.categories)):
            members = answers.rows([i for i, name in enumerate(answers.categories) if name == category])
            for batch in members.batches(batch_size, random.Random(0)):
                hidden = self._target(batch)
                logits_RV, place_T = self._known_logits(batch, hidden)
                choice_R = logits_RV.argmax(dim=-1)
                for step, (logits_SW, next_S) in enumerate(self._guesses(batch, hidden)):
                    best_SN = logits_SW.topk(NUM_RANKS, dim=-1).indices
                    counts.add(category, step, self.draft.target_ids[best_SN], choice_R[place_T[next_S]])
        return counts.accuracies()

    def state(self) -> dict[str, torch.Tensor]:
        return self.draft.state_dict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.draft.load_state_dict(state)
        if self.draft.lm_head is None:
            self.draft.share_lm_head(self.model.weights.lm_head_VE)

    def export(self, folder: Path, accuracies: Accuracies) -> None:
        save_eagle(folder, self.draft, base_model=self.model.name)

    @torch.no_grad()
    def _target(self, batch: Batch) -> Hidden:
        return self.model.hidden(batch.ids_BS, feature_layers=self._layers)

    def _known_logits(self, batch: Batch, hidden: Hidden) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's logits [R, V] where its next token is part of the answer, and the row of each position."""
        rows_R = batch.drafts_from(1)
        logits_RV = self.model.logits(hidden.normed_BSE.flatten(0, 1)[rows_R])
        place_T = torch.zeros(batch.ids_BS.numel(), dtype=torch.int64, device=rows_R.device)
        place_T[rows_R] = torch.arange(rows_R.shape[0], device=rows_R.device)
        return logits_RV, place_T

    def _guesses(self, batch: Batch, hidden: Hidden) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The draft's logits [R, W] at each step where they count, and the positions, numbered through all sequences,
        whose next token they are for; fewer steps where the sequences are short."""
        steps = Unrolled(self.draft, self._rope)
        feature = self._fused(hidden)
        length = batch.ids_BS.shape[1]
        for step in range(min(self._num_steps, length - 2)):
            num_rows = length - 1 - step
            ids = batch.ids_BS[:, 1 + step : 1 + step + num_rows]
            with torch.no_grad():
                embedded = F.embedding(ids, self.model.weights.embed_VE)
            rows_R = batch.drafts_from(2 + step, num_rows)
            with self._autocast():
                feature = steps.advance(embedded, feature[:, :num_rows])
                logits_RW = self.draft.logits(feature.flatten(0, 1)[rows_R])
            yield logits_RW, batch.drafts_from(2 + step) + 1 + step

    def _fused(self, hidden: Hidden) -> torch.Tensor:
        with self._autocast():
            fused = self.draft.fuse(torch.cat(hidden.features, dim=-1))
        return fused.float()  # the stream stays in float32; products are bfloat16

    def _autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; master weights stay float32."""
        device = self.model.weights.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


class Unrolled:
    """The draft's layer, step after step, for all starts of a draft at once."""

    def __init__(self, draft: EagleDraft, rope: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._draft, self._rope = draft, rope
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def advance(self, embedded: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Row p of step j sits at position p + j."""
        step, num_rows = len(self._keys), embedded.shape[1]
        cos_PD, sin_PD = self._rope
        positions = slice(step, step + num_rows)
        cos_sin = cos_PD[positions, None], sin_PD[positions, None]
        returned: torch.Tensor = self._draft(embedded.to(feature.dtype), feature, cos_sin, self._attend)
        return returned

    def _attend(self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor) -> torch.Tensor:
        group = q_BSHD.shape[2] // k_BSKD.shape[2]
        q_BHSD = q_BSHD.transpose(1, 2)
        self._keys.append(k_BSKD.transpose(1, 2).repeat_interleave(group, dim=1))
        self._values.append(v_BSKD.transpose(1, 2).repeat_interleave(group, dim=1))
        num_rows = q_BHSD.shape[2]
        keys = [key[:, :, :num_rows] for key in self._keys]
        values = [value[:, :, :num_rows] for value in self._values]
        if len(keys) == 1:
            return F.scaled_dot_product_attention(q_BHSD, keys[0], values[0], is_causal=True).transpose(1, 2)
        scale = q_BHSD.shape[-1] ** -0.5
        hidden_SS = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q_BHSD.device).triu_(1)
        true_BHSS = (q_BHSD @ keys[0].transpose(2, 3)).float().mul(scale).masked_fill(hidden_SS, -torch.inf)
        own = [(q_BHSD * key).sum(dim=-1, keepdim=True).float() * scale for key in keys[1:]]
        shares = torch.cat((true_BHSS, *own), dim=-1).softmax(dim=-1).to(values[0].dtype)
        attended = shares[..., :num_rows] @ values[0]
        for i, value in enumerate(values[1:]):
            attended = attended + shares[..., num_rows + i, None] * value
        return attended.transpose(1, 2)


def _new(model: Model, options: EagleOptions, learned: Answers) -> EagleDraft:
    config, weights = model.config, model.weights
    shares = config.tie_word_embeddings if options.shares_lm_head is None else options.shares_lm_head
    num_tokens = min(options.draft_vocab_size or min(config.vocab_size // 2, MAX_DRAFT_VOCABULARY), config.vocab_size)
    layer = replace(
        config, model_type="llama", num_layers=1, sliding_windows=(0,), tie_word_embeddings=False,
        qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
    )  # fmt: skip
    layers = options.feature_layers or default_feature_layers(config.num_layers)
    size = config.hidden_size
    draft = EagleDraft(EagleConfig(layer, num_tokens, size, layers, shares_lm_head=shares)).to(weights.device)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=INITIAL_STD)
        # at first the last of the three streams passes, and the layer adds nothing: a feature that the head can read
        draft.fc.weight[:, -size:] += torch.eye(size, device=weights.device)
        draft.midlayer.self_attn.o_proj.weight.zero_()
        draft.midlayer.mlp.down_proj.weight.zero_()
        draft.norm.weight.copy_(weights.norm_E)
        draft.choose_vocabulary(most_frequent(learned, config.vocab_size, num_tokens).to(weights.device))
        if draft.lm_head is not None:
            draft.lm_head.weight.copy_(weights.lm_head_VE[draft.target_ids])
        else:
            draft.share_lm_head(weights.lm_head_VE)
    return draft


def _draft_to_go_on_from(model: Model, options: EagleOptions, learned: Answers) -> EagleDraft:
    """Raises ConfigurationError for options that a draft has already, ModelLoadError for one that does not fit."""
    assert options.init is not None
    if options.feature_layers is not None or options.shares_lm_head is not None:
        raise ConfigurationError(f"{options.init}: a draft to go on from has its feature layers and its projection")
    config, weights = model.config, model.weights
    loaded = load_eagle(
        options.init, vocab_size=config.vocab_size, target_hidden_size=config.hidden_size,
        lm_head_VE=weights.lm_head_VE, device=weights.device,
    )  # fmt: skip
    num_tokens = min(options.draft_vocab_size or loaded.config.draft_vocab_size, config.vocab_size)
    if num_tokens == loaded.config.draft_vocab_size:
        target_ids = loaded.target_ids
    elif loaded.lm_head is None:
        target_ids = most_frequent(learned, config.vocab_size, num_tokens).to(weights.device)
    else:
        raise ConfigurationError(f"{options.init}: its own projection is for {loaded.config.draft_vocab_size} tokens")
    draft = EagleDraft(replace(loaded.config, draft_vocab_size=num_tokens)).to(weights.device)
    draft.load_state_dict({name: t for name, t in loaded.state_dict().items() if name not in ("d2t", "t2d")}, False)
    draft.choose_vocabulary(target_ids)
    if draft.lm_head is None:
        draft.share_lm_head(weights.lm_head_VE)
    return draft


def most_frequent(answers: Answers, vocab_size: int, num_tokens: int) -> torch.Tensor:
    """The ids of the `num_tokens` tokens that the answers use most, in rising order; unused ones by their number."""
    p_S = torch.arange(answers.ids_NS.shape[1])
    in_answer_NS = (p_S >= answers.starts_N[:, None]) & (p_S < answers.ends_N[:, None])
    counts_V = torch.bincount(answers.ids_NS.cpu()[in_answer_NS].long(), minlength=vocab_size)
    return counts_V.sort(descending=True, stable=True).indices[:num_tokens].sort().values
