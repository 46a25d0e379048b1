"""EAGLE-3's layer in the fused kernels of the decoder. Knows its weights, and the rows of features that it reads and
returns; knows nothing of sequences. The slow twin is speculative/eagle/model.py.
"""

from __future__ import annotations

from typing import Any

import torch

from autobot_llm.engine.attention.paged import PagedAttention
from autobot_llm.engine.gpu.decoder import DecoderInputs, FusedDecoder
from autobot_llm.engine.kernels.gpu.draft_input import draft_input
from autobot_llm.engine.kernels.gpu.linear import linear, linear_add, norm_linear_gated
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights
from autobot_llm.engine.speculative.eagle.model import EagleDraft


# T packed tokens, R rows whose logits are wanted, E hidden size, F three times the target's, W draft vocabulary
class EagleDecoder(FusedDecoder):
    """A pass of the layer, and logits over the draft's vocabulary.

    Token t reads the target's feature features_TE[t]. Where its `token_rows_T` is not negative, both token and feature
    are what that row of the pass before gave: `last_tokens` are ids of the draft, and the feature is what the layer
    returned there. A pass of at most `max_rows` tokens or rows, padding included.
    """

    def __init__(
        self,
        draft: EagleDraft,
        embed_VE: torch.Tensor,
        storage: PagedStorage,
        attention: PagedAttention,
        *,
        max_context: int,
        max_rows: int,
    ) -> None:
        super().__init__(draft.config.layer, _weights(draft, embed_VE), storage, attention, max_context=max_context)
        self._norm_before_residual = draft.config.norm_before_residual
        self._feature_norm_E = draft.midlayer.hidden_norm.weight
        self._fc_weight = draft.fc.weight
        self._target_ids_W = draft.target_ids.int()
        shape = (max_rows, self.hidden_size)
        self.features_TE = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._returned_RE = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def fuse(self, streams_TF: torch.Tensor) -> torch.Tensor:
        """Features TE from the target's three streams side by side."""
        return linear(streams_TF, self._fc_weight)

    def _layers(self, inputs: DecoderInputs, metadata: Any, streams_TF: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer returns of the rows whose logits are wanted; the next pass finds it."""
        layer, eps = self._weights.layers[0], self._config.rms_norm_eps
        both_TX, residual_RE = draft_input(
            inputs.ids_T,
            inputs.token_rows_T,
            inputs.last_tokens,
            self._target_ids_W,
            self._weights.embed_VE,
            self.features_TE,
            self._returned_RE,
            layer.input_norm_E,
            self._feature_norm_E,
            eps,
            norm_before_residual=self._norm_before_residual,
        )
        attended_RA = self._attend(0, layer, linear(both_TX, layer.qkv_weight, layer.qkv_bias), inputs, metadata)
        if inputs.logit_rows_R is not None:
            residual_RE = residual_RE.index_select(0, inputs.logit_rows_R)
            attended_RA = attended_RA.index_select(0, inputs.logit_rows_R)
        linear_add(attended_RA, layer.o_weight, layer.o_bias, residual_RE, out=residual_RE)
        activated_RF = norm_linear_gated(residual_RE, layer.post_norm_E, eps, layer.gate_up_weight, layer.gate_up_bias)
        returned_RE = self._returned_RE[: len(residual_RE)]
        return linear_add(activated_RF, layer.down_weight, layer.down_bias, residual_RE, out=returned_RE)


def _weights(draft: EagleDraft, embed_VE: torch.Tensor) -> DecoderWeights:
    """The layer's matrices as the fused kernels read them."""
    layer = draft.midlayer
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    lm_head_WE = draft.lm_head_WE if draft.lm_head is None else draft.lm_head.weight
    assert lm_head_WE is not None, "share_lm_head comes first"
    return DecoderWeights(
        embed_VE=embed_VE,
        layers=(
            LayerWeights(
                input_norm_E=layer.input_layernorm.weight,
                qkv_weight=_cat_weights(qkv),
                qkv_bias=_cat_biases(qkv),
                q_norm_D=None,
                k_norm_D=None,
                o_weight=attention.o_proj.weight,
                o_bias=attention.o_proj.bias,
                post_norm_E=layer.post_attention_layernorm.weight,
                gate_up_weight=_cat_weights(gate_up),
                gate_up_bias=_cat_biases(gate_up),
                down_weight=mlp.down_proj.weight,
                down_bias=mlp.down_proj.bias,
            ),
        ),
        norm_E=draft.norm.weight,
        lm_head_VE=lm_head_WE,
    )


def _cat_weights(modules: tuple[torch.nn.Linear, ...]) -> torch.Tensor:
    weights: list[torch.Tensor] = [module.weight for module in modules]
    return torch.cat(weights)


def _cat_biases(modules: tuple[torch.nn.Linear, ...]) -> torch.Tensor | None:
    biases: list[torch.Tensor] = [module.bias for module in modules if module.bias is not None]
    return torch.cat(biases) if biases else None
