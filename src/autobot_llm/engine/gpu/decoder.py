"""The decoder on a GPU, in fused kernels. Knows weights and arithmetic; knows nothing of sequences, blocks or sampling.

Five products and attention make a layer, and everything between them rides along: a norm in the product that reads it,
a residual in the product that adds to it, rotary embedding with the write into the cache. The slow twin is
models/decoder.py; the arithmetic is the same, with fewer roundings to the weights' dtype in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autobot_llm.engine.attention.paged import PagedAttention
from autobot_llm.engine.executor import Features
from autobot_llm.engine.gpu.features import NOTHING
from autobot_llm.engine.kernels.gpu.embedding import embed
from autobot_llm.engine.kernels.gpu.linear import feed_forward_add, linear_add, norm_linear
from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.rotary import rotate_and_store
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.decoder import rope_tables
from autobot_llm.engine.models.embeddings import Embeddings
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights


# T packed tokens, R rows whose logits are wanted, E hidden size, H query heads, K key/value heads, D head size, C the
# width of q, k and v together, V vocabulary, P positions
@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """One step's tokens on the device, int32. `token_rows_T`[t] >= 0 takes the token from `last_tokens` instead of
    `ids_T`; `logit_rows_R` None means every row, in order. Slots below 0 are not written."""

    ids_T: torch.Tensor
    token_rows_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    last_tokens: torch.Tensor
    logit_rows_R: torch.Tensor | None


class FusedDecoder:
    """A decoder-only transformer over packed tokens, writing into `storage` and attending through `attention`.

    `feature_layers` are those whose streams `Features.streams_TF` holds side by side, as of FeatureKinds.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        storage: PagedStorage,
        attention: PagedAttention,
        *,
        max_context: int,
        feature_layers: tuple[int, ...] = (),
    ) -> None:
        self._feature_layers = feature_layers
        self.device = weights.device
        self.dtype = weights.dtype
        self.hidden_size = config.hidden_size
        self.head_size = config.head_size
        self._config = config
        self._weights = weights
        self._storage = storage
        self._attention = attention
        cos_PD, sin_PD = rope_tables(config, max_context)
        half = config.head_size // 2  # both halves of a row are alike
        self._cos_sin_PD = torch.cat((cos_PD[:, :half], sin_PD[:, :half]), dim=-1).to(self.device)

    @property
    def embeddings(self) -> Embeddings:
        """The very tensors that the steps read."""
        return Embeddings(self._weights.embed_VE, self._weights.lm_head_VE)

    def forward(self, inputs: DecoderInputs, metadata: Any, kept: Features = NOTHING) -> torch.Tensor:
        """Compute all tokens; returns float32 logits_RV. `metadata` is the attention backend's for this step. Fills
        the tensors that are `kept`."""
        weights = self._weights
        hidden_RE = self._layers(inputs, metadata, kept.streams_TF)
        if kept.hidden_RE is not None:
            rms_norm(hidden_RE, weights.norm_E, self._config.rms_norm_eps, out=kept.hidden_RE)
        return norm_linear(
            hidden_RE, weights.norm_E, self._config.rms_norm_eps, weights.lm_head_VE, out_dtype=torch.float32
        )

    def hidden(self, inputs: DecoderInputs, metadata: Any) -> torch.Tensor:
        """As `forward`, but what the head would be given: float32 hidden_RE, after the last norm."""
        return rms_norm(self._layers(inputs, metadata), self._weights.norm_E, self._config.rms_norm_eps).float()

    def _layers(self, inputs: DecoderInputs, metadata: Any, streams_TF: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layer leaves of the rows whose logits are wanted."""
        config, weights = self._config, self._weights
        kept = () if streams_TF is None else self._feature_layers
        num_tokens = inputs.ids_T.shape[0]
        hidden_TE = torch.empty(num_tokens, config.hidden_size, dtype=weights.dtype, device=self.device)
        embed(inputs.ids_T, inputs.token_rows_T, inputs.last_tokens, weights.embed_VE, hidden_TE)
        # the last layer computes only the rows whose logits are wanted, unless its stream is, too
        last = config.num_layers if config.num_layers in kept else config.num_layers - 1
        for i, layer in enumerate(weights.layers):
            if i in kept:
                self._keep(i, hidden_TE, streams_TF)
            qkv_TC = norm_linear(hidden_TE, layer.input_norm_E, config.rms_norm_eps, layer.qkv_weight, layer.qkv_bias)
            attended_TA = self._attend(i, layer, qkv_TC, inputs, metadata)
            if i == last and inputs.logit_rows_R is not None:
                hidden_TE = hidden_TE.index_select(0, inputs.logit_rows_R)
                attended_TA = attended_TA.index_select(0, inputs.logit_rows_R)
            linear_add(attended_TA, layer.o_weight, layer.o_bias, hidden_TE, out=hidden_TE)
            feed_forward_add(
                hidden_TE,
                layer.post_norm_E,
                config.rms_norm_eps,
                layer.gate_up_weight,
                layer.gate_up_bias,
                layer.down_weight,
                layer.down_bias,
                out=hidden_TE,
            )
        if config.num_layers in kept:
            self._keep(config.num_layers, hidden_TE, streams_TF)
            if inputs.logit_rows_R is not None:
                hidden_TE = hidden_TE.index_select(0, inputs.logit_rows_R)
        return hidden_TE

    def _keep(self, layer: int, hidden_TE: torch.Tensor, streams_TF: torch.Tensor | None) -> None:
        assert streams_TF is not None
        place, width = self._feature_layers.index(layer), hidden_TE.shape[1]
        streams_TF[:, place * width : (place + 1) * width].copy_(hidden_TE)

    def _attend(
        self, i: int, layer: LayerWeights, qkv_TC: torch.Tensor, inputs: DecoderInputs, metadata: Any
    ) -> torch.Tensor:
        """What the heads of layer i gather, [T, H*D], before the output projection. Rotates q and k in place."""
        self._store(i, layer, qkv_TC, inputs.positions_T, inputs.slots_T)
        return self._gathered(i, qkv_TC, metadata)

    def _store(
        self, i: int, layer: LayerWeights, qkv_TC: torch.Tensor, positions_T: torch.Tensor, slots_T: torch.Tensor
    ) -> None:
        """Rotate q and k in place, and write k and v into the cache."""
        config = self._config
        rotate_and_store(
            qkv_TC,
            positions_T,
            slots_T,
            self._cos_sin_PD,
            self._storage.keys[i],
            self._storage.values[i],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            q_norm_D=layer.q_norm_D,
            k_norm_D=layer.k_norm_D,
            eps=config.rms_norm_eps,
        )

    def _gathered(self, i: int, qkv_TC: torch.Tensor, metadata: Any) -> torch.Tensor:
        config = self._config
        num_heads, num_kv_heads, head_size = config.num_heads, config.num_kv_heads, config.head_size
        heads = qkv_TC.view(-1, num_heads + 2 * num_kv_heads, head_size)
        out_THD = torch.empty(heads.shape[0], num_heads, head_size, dtype=qkv_TC.dtype, device=self.device)
        self._attention.attend(
            i,
            heads[:, :num_heads],
            heads[:, num_heads : num_heads + num_kv_heads],
            heads[:, num_heads + num_kv_heads :],
            out_THD,
            metadata,
        )
        return out_THD.view(heads.shape[0], -1)
