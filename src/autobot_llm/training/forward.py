"""A model's forward pass for training: whole batches of sequences, the hidden states of chosen layers, gradients where
weights ask for them. Knows weights and arithmetic; knows nothing of blocks or schedulers.

The arithmetic is that of engine/models/decoder.py, whose logits it is tested against. With a cache it also continues a
batch by one token at a time, all sequences at the same position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.decoder import rope_tables
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights, load_weights
from autobot_llm.engine.speculative.eagle.model import rotated


# B sequences, S positions, E hidden size, H query heads, K key/value heads, D head size, G query heads of a key/value
# head, V vocabulary, L cached positions
@dataclass(slots=True)
class BatchCache:
    """Keys and values of a batch, [B, K, L, D] for each layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def empty(cls, model: Model, num_sequences: int, num_positions: int) -> BatchCache:
        shape = (num_sequences, model.config.num_kv_heads, num_positions, model.config.head_size)

        def tensors() -> list[torch.Tensor]:
            return [
                torch.zeros(shape, dtype=model.weights.dtype, device=model.weights.device)
                for _ in range(model.config.num_layers)
            ]

        return cls(tensors(), tensors())


@dataclass(frozen=True, slots=True)
class Hidden:
    """`normed_BSE` is what the projection reads; `features` are the streams that the chosen layers read, in order."""

    normed_BSE: torch.Tensor
    features: tuple[torch.Tensor, ...] = ()


@dataclass(slots=True)
class Model:
    """A decoder's configuration and weights, and tables made of them once."""

    config: ModelConfig
    weights: DecoderWeights
    name: str = ""
    _rope: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> Model:
        """Raises ModelLoadError (see `load_config`, `load_weights`)."""
        config = load_config(folder)
        return cls(config, load_weights(folder, config, dtype=dtype, device=device), folder.resolve().name)

    def rope(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos_PD and sin_PD for all of the model's positions."""
        if dtype not in self._rope:
            cos_PD, sin_PD = rope_tables(self.config, self.config.max_position_embeddings)
            device = self.weights.device
            self._rope[dtype] = cos_PD.to(device, dtype), sin_PD.to(device, dtype)
        return self._rope[dtype]

    def hidden(
        self,
        ids_BS: torch.Tensor,
        *,
        feature_layers: tuple[int, ...] = (),
        first: int = 0,
        cache: BatchCache | None = None,
    ) -> Hidden:
        """Compute positions `first` and following. Without a cache, or with several positions, `first` is 0."""
        assert first == 0 or (cache is not None and ids_BS.shape[1] == 1)
        config, weights = self.config, self.weights
        hidden_BSE = F.embedding(ids_BS, weights.embed_VE)
        cos_PD, sin_PD = self.rope(hidden_BSE.dtype)
        positions = slice(first, first + ids_BS.shape[1])
        cos_sin = cos_PD[positions, None], sin_PD[positions, None]
        features: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(weights.layers):
            features[i] = hidden_BSE
            q_BSHD, k_BSKD, v_BSKD = _project(config, layer, hidden_BSE, cos_sin)
            attended_BSHD = self._attend(i, q_BSHD, k_BSKD, v_BSKD, first, cache)
            hidden_BSE = _finish(config, layer, hidden_BSE, attended_BSHD)
        features[config.num_layers] = hidden_BSE
        normed_BSE = _norm(hidden_BSE, weights.norm_E, config.rms_norm_eps)
        return Hidden(normed_BSE, tuple(features[i] for i in feature_layers))

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of `Hidden.normed_BSE`."""
        return F.linear(normed, self.weights.lm_head_VE)

    def logits_at(self, ids_BS: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of these positions alone, numbered through all sequences."""
        return self.logits(self.hidden(ids_BS).normed_BSE.flatten(0, 1)[rows_R])

    def _attend(
        self,
        i: int,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        first: int,
        cache: BatchCache | None,
    ) -> torch.Tensor:
        window = self.config.sliding_windows[i]
        k_BKSD, v_BKSD = k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
        num_positions = q_BSHD.shape[1]
        if cache is not None:
            cache.keys[i][:, :, first : first + num_positions] = k_BKSD
            cache.values[i][:, :, first : first + num_positions] = v_BKSD
        if cache is not None and num_positions == 1:
            # the query heads of a key/value head are rows of one product, and see all that is cached: no mask
            oldest = max(0, first + 1 - window) if window else 0
            keys, values = (store[i][:, :, oldest : first + 1] for store in (cache.keys, cache.values))
            q_BKGD = q_BSHD[:, 0].reshape(q_BSHD.shape[0], self.config.num_kv_heads, -1, self.config.head_size)
            return F.scaled_dot_product_attention(q_BKGD, keys, values).flatten(1, 2)[:, None]
        group = self.config.num_heads // self.config.num_kv_heads
        keys, values = k_BKSD.repeat_interleave(group, dim=1), v_BKSD.repeat_interleave(group, dim=1)
        q_BHSD = q_BSHD.transpose(1, 2)
        if window and window < num_positions:
            positions = torch.arange(num_positions, device=q_BHSD.device)
            distance_SS = positions[:, None] - positions
            mask_SS = (distance_SS >= 0) & (distance_SS < window)
            return F.scaled_dot_product_attention(q_BHSD, keys, values, attn_mask=mask_SS).transpose(1, 2)
        return F.scaled_dot_product_attention(q_BHSD, keys, values, is_causal=True).transpose(1, 2)


def _project(
    config: ModelConfig, layer: LayerWeights, hidden_BSE: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed_BSE = _norm(hidden_BSE, layer.input_norm_E, config.rms_norm_eps)
    heads = F.linear(normed_BSE, layer.qkv_weight, layer.qkv_bias).view(*hidden_BSE.shape[:2], -1, config.head_size)
    q_BSHD, k_BSKD, v_BSKD = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
    if layer.q_norm_D is not None and layer.k_norm_D is not None:
        q_BSHD = _norm(q_BSHD, layer.q_norm_D, config.rms_norm_eps)
        k_BSKD = _norm(k_BSKD, layer.k_norm_D, config.rms_norm_eps)
    return rotated(q_BSHD, *cos_sin), rotated(k_BSKD, *cos_sin), v_BSKD


def _finish(
    config: ModelConfig, layer: LayerWeights, hidden_BSE: torch.Tensor, attended_BSHD: torch.Tensor
) -> torch.Tensor:
    hidden_BSE = hidden_BSE + F.linear(attended_BSHD.flatten(2), layer.o_weight, layer.o_bias)
    normed_BSE = _norm(hidden_BSE, layer.post_norm_E, config.rms_norm_eps)
    gate, up = F.linear(normed_BSE, layer.gate_up_weight, layer.gate_up_bias).chunk(2, dim=-1)
    return hidden_BSE + F.linear(F.silu(gate) * up, layer.down_weight, layer.down_bias)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
