"""EAGLE-3's network: a token and a feature in, the next feature and the next token's logits out. Knows arithmetic;
knows neither caches nor trees: attention is the caller's.

At position t it reads the embedding of token t + 1 and a feature of position t: at positions that the target has
computed the target's own (`fuse`), after them what this network returned one position before. From what it returns at t
follow the logits of token t + 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from autobot_llm.engine.models.decoder import rope_tables
from autobot_llm.engine.speculative.eagle.config import NUM_FEATURES, EagleConfig

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Rotated queries [..., H, D], rotated keys and values [..., K, D] to [..., H, D]; scaled by 1 / sqrt(D)."""


# ... leading dimensions (packed tokens, or sequences and positions), E hidden size, H query heads, K key/value heads,
# D head size, W draft vocabulary
class EagleDraft(nn.Module):
    """The names of its tensors are those of the published checkpoints.

    `lm_head_WE`: rows of the target's own projection, for a draft that shares it; they are no parameter of this module
    and are not stored with it. `d2t` plus its index is the target's id of a draft token; `t2d` marks the target's
    tokens that the draft knows.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        size = config.layer.hidden_size
        self.config = config
        self.fc = nn.Linear(NUM_FEATURES * config.target_hidden_size, size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(size, eps=config.layer.rms_norm_eps)
        self.lm_head = None if config.shares_lm_head else nn.Linear(size, config.draft_vocab_size, bias=False)
        self.lm_head_WE: torch.Tensor | None = None
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.layer.vocab_size, dtype=torch.bool))

    @property
    def target_ids(self) -> torch.Tensor:
        """The target's id of each draft token."""
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def choose_vocabulary(self, target_ids: torch.Tensor) -> None:
        """Let the draft know these tokens of the target: `draft_vocab_size` different ids, in rising order."""
        assert target_ids.shape == self.d2t.shape
        self.d2t.copy_(target_ids - torch.arange(target_ids.shape[0], device=target_ids.device))
        self.t2d.zero_()
        self.t2d[target_ids] = True

    def share_lm_head(self, lm_head_VE: torch.Tensor) -> None:
        """Project with these rows of the target's head; after `d2t` is known."""
        self.lm_head_WE = lm_head_VE.index_select(0, self.target_ids).detach()

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's three streams side by side [..., 3 E] as one feature [..., E]."""
        fused: torch.Tensor = self.fc(features)
        return fused

    def forward(
        self, embedded: torch.Tensor, feature: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """The next features [..., E]. `cos_sin`: the rotary tables' rows of the positions, [..., 1, D] each."""
        returned: torch.Tensor = self.midlayer(embedded, feature, cos_sin, attend)
        return returned

    def keys_values(
        self, embedded: torch.Tensor, feature: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` gives its `attend` for keys and values, alone."""
        layer = self.midlayer
        return layer.self_attn.keys_values(layer.both(embedded, layer.hidden_norm(feature)), cos_sin)

    def logits(self, feature: torch.Tensor) -> torch.Tensor:
        """Logits [..., W] over the draft's vocabulary, of what `forward` returned."""
        normed = self.norm(feature)
        if self.lm_head is not None:
            own: torch.Tensor = self.lm_head(normed)
            return own
        assert self.lm_head_WE is not None, "share_lm_head comes first"
        return F.linear(normed, self.lm_head_WE)


class _Layer(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        size, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.hidden_norm = nn.RMSNorm(size, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)
        self.self_attn = _Attention(config)
        self.mlp = _FeedForward(config)
        self._norm_before_residual = config.norm_before_residual

    def forward(
        self, embedded: torch.Tensor, feature: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        normed = self.hidden_norm(feature)
        residual = normed if self._norm_before_residual else feature
        hidden = residual + self.self_attn(self.both(embedded, normed), cos_sin, attend)
        added: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return added

    def both(self, embedded: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """What attention reads: token and normed feature side by side."""
        return torch.cat((self.input_layernorm(embedded), normed), dim=-1)


class _Attention(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        layer = config.layer
        size, self._head_size = layer.hidden_size, layer.head_size
        self.q_proj = nn.Linear(2 * size, layer.num_heads * layer.head_size, bias=layer.qkv_bias)
        self.k_proj = nn.Linear(2 * size, layer.num_kv_heads * layer.head_size, bias=layer.qkv_bias)
        self.v_proj = nn.Linear(2 * size, layer.num_kv_heads * layer.head_size, bias=layer.qkv_bias)
        self.o_proj = nn.Linear(layer.num_heads * layer.head_size, size, bias=layer.o_bias)

    def forward(self, both: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        q = rotated(self.q_proj(both).unflatten(-1, (-1, self._head_size)), *cos_sin)
        projected: torch.Tensor = self.o_proj(attend(q, *self.keys_values(both, cos_sin)).flatten(-2))
        return projected

    def keys_values(
        self, both: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (-1, self._head_size)
        return rotated(self.k_proj(both).unflatten(-1, heads), *cos_sin), self.v_proj(both).unflatten(-1, heads)


class _FeedForward(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        size, inner, bias = config.layer.hidden_size, config.layer.intermediate_size, config.layer.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings by halves; tables as `rope_tables` makes them, without a sign."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def draft_rope(
    config: EagleConfig, num_positions: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_PD and sin_PD of the draft's own layer."""
    cos_PD, sin_PD = rope_tables(config.layer, num_positions)
    return cos_PD.to(device, dtype), sin_PD.to(device, dtype)
