"""Train an EAGLE-3 draft by training-time test. Knows the loss and its unrolled steps; knows nothing of where texts
come from.

The draft is run several steps on its own features, as it will be when it drafts. Row p of step j stands for a draft
that began at position p and has come j tokens far: it reads token p + 1 + j of the real text and what row p of step
j - 1 returned, sees the true positions up to p and its own steps before it, and learns the target's distribution of
token p + 2 + j, as far as the draft's vocabulary goes. Source: section 3.2 of the paper; step j counts 0.8^j.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
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
from autobot_llm.training.loop import Group

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

    def groups(self) -> list[Group]:
        return [Group(list(self.draft.parameters()))]

    def learn(self, batch: Batch) -> torch.Tensor:
        hidden = self._target(batch)
        with torch.no_grad():
            logits_RV, place_T = self._known_logits(batch, hidden)
            logits_RV = logits_RV.float()
            wanted_RW = (logits_RV[:, self.draft.target_ids] - logits_RV.logsumexp(dim=-1, keepdim=True)).exp_()
        loss = torch.zeros((), device=batch.ids_BS.device)
        for step, (logits_SW, next_S) in enumerate(self._guesses(batch, hidden)):
            loss_S = -(wanted_RW[place_T[next_S]] * logits_SW.float().log_softmax(dim=-1)).sum(dim=-1)
            loss = loss + STEP_WEIGHT_DECAY**step * loss_S.sum() / max(1, loss_S.shape[0])
        if loss.requires_grad:  # not where all answers of the batch are a single token
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
        whose next token they are for; fewer steps where the answers are short."""
        num_starts_B = batch.ends_B - batch.starts_B - 1
        num_starts = int(num_starts_B.max())
        with torch.no_grad():
            embedded_BSE = F.embedding(F.pad(batch.ids_BS[:, 1:], (0, 1)), self.model.weights.embed_VE)
        with self._autocast():
            fused_BSE = self.draft.fuse(torch.cat(hidden.features, dim=-1)).float()  # the stream stays in float32
            first_B = batch.carried(batch.starts_B - 1)
            steps = Unrolled(self.draft, self._rope, embedded_BSE, fused_BSE, first_B, max(1, num_starts))
        for step in range(min(self._num_steps, num_starts)):
            counts_BA = torch.arange(num_starts) < num_starts_B[:, None] - step
            rows_R = batch.carried(counts_BA.flatten().nonzero().flatten())
            with self._autocast():
                logits_RW = self.draft.logits(steps.advance().flatten(0, 1)[rows_R])
            yield logits_RW, batch.drafts_from(2 + step) + 1 + step

    def _autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; master weights stay float32."""
        device = self.model.weights.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


class Unrolled:
    """The draft's layer, step after step, for many starts of a draft at once: those at `first_B[b]` and the following
    `num_starts - 1` positions of each sequence. Only keys and values are computed for all positions.

    `embedded_BSE`: the token after each position; `feature_BSE`: the target's feature of it. What starts so late that
    it reads beyond the last position means nothing.
    """

    def __init__(
        self,
        draft: EagleDraft,
        rope: tuple[torch.Tensor, torch.Tensor],
        embedded_BSE: torch.Tensor,
        feature_BSE: torch.Tensor,
        first_B: torch.Tensor,
        num_starts: int,
    ) -> None:
        self._draft, self._rope = draft, rope
        self._embedded_BSE = embedded_BSE.to(feature_BSE.dtype)
        length = feature_BSE.shape[1]
        p_S = torch.arange(length, device=feature_BSE.device)
        self._starts_BA = first_B[:, None] + torch.arange(num_starts, device=first_B.device)
        self._sees_B1AS = (p_S <= self._starts_BA[..., None])[:, None]
        self._feature_BAE = self._rows(feature_BSE, 0)
        cos_PD, sin_PD = rope
        k_BSKD, v_BSKD = draft.keys_values(
            self._embedded_BSE, feature_BSE, (cos_PD[:length, None], sin_PD[:length, None])
        )
        self._keys, self._values = [self._by_head(k_BSKD)], [self._by_head(v_BSKD)]
        self._step = 0

    def advance(self) -> torch.Tensor:
        """What the draft returns at its next step, [B, A, E]: at step j row a sits at position first + a + j."""
        step = self._step
        positions_BA = (self._starts_BA + step).clamp_(max=self._embedded_BSE.shape[1] - 1)
        cos_sin = self._rope[0][positions_BA][:, :, None], self._rope[1][positions_BA][:, :, None]
        self._feature_BAE = self._draft(self._rows(self._embedded_BSE, step), self._feature_BAE, cos_sin, self._attend)
        self._step += 1
        return self._feature_BAE

    def _rows(self, rows_BSE: torch.Tensor, step: int) -> torch.Tensor:
        positions_BA1 = (self._starts_BA + step).clamp_(max=rows_BSE.shape[1] - 1)[..., None]
        return rows_BSE.gather(1, positions_BA1.expand(-1, -1, rows_BSE.shape[2]))

    def _by_head(self, x_BNKD: torch.Tensor) -> torch.Tensor:
        layer = self._draft.config.layer
        return x_BNKD.transpose(1, 2).repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)

    def _attend(self, q_BAHD: torch.Tensor, k_BAKD: torch.Tensor, v_BAKD: torch.Tensor) -> torch.Tensor:
        q_BHAD = q_BAHD.transpose(1, 2)
        keys, values = self._keys, self._values
        if self._step == 0:  # its own key is among those of all positions
            attended = F.scaled_dot_product_attention(q_BHAD, keys[0], values[0], attn_mask=self._sees_B1AS)
            return attended.transpose(1, 2)
        keys.append(self._by_head(k_BAKD))
        values.append(self._by_head(v_BAKD))
        scale, length = q_BHAD.shape[-1] ** -0.5, keys[0].shape[2]
        true_BHAS = (q_BHAD @ keys[0].transpose(2, 3)).float().mul(scale).masked_fill(~self._sees_B1AS, -torch.inf)
        own = [(q_BHAD * key).sum(dim=-1, keepdim=True).float() * scale for key in keys[1:]]
        shares = torch.cat((true_BHAS, *own), dim=-1).softmax(dim=-1).to(values[0].dtype)
        attended = shares[..., :length] @ values[0]
        for i, value in enumerate(values[1:]):
            attended = attended + shares[..., length + i, None] * value
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
