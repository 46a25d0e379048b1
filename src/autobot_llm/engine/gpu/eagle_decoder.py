"""EAGLE-3's layer in the fused kernels of the decoder. Knows its weights, and the rows of features that it reads and
returns; knows nothing of sequences. The slow twin is speculative/eagle/model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from autobot_llm.engine.attention.paged import PagedAttention
from autobot_llm.engine.gpu.decoder import FusedDecoder
from autobot_llm.engine.kernels.gpu.draft_input import draft_input
from autobot_llm.engine.kernels.gpu.linear import feed_forward_add, linear, linear_add, norm_linear
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights
from autobot_llm.engine.quantization.online import online_scheme, rounded
from autobot_llm.engine.quantization.packed import PackedWeight, packed
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.speculative.eagle.model import EagleDraft


# T packed tokens, E hidden size, F three times the target's, W draft vocabulary
class EagleTokens(NamedTuple):
    """Tokens of a pass, by the target's ids, where they stand and which slots of the cache they go to: int32. Slots
    below 0 are not written."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor


class EagleDecoder(FusedDecoder):
    """Passes of the layer: over what the target has computed, and over what the draft continues.

    Each of the latter overwrites what the layer returned in the pass before it, of at most `max_rows` tokens. With
    `rounds`, matrices are kept in 8 bits, half as many bytes to read in a pass: what that does to guesses is next to
    nothing, and to answers nothing at all.
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
        rounds: bool,
    ) -> None:
        layer = draft.config.layer
        super().__init__(layer, _weights(draft, embed_VE, rounds), storage, attention, max_context=max_context)
        self._norm_before_residual = draft.config.norm_before_residual
        self._feature_norm_E = draft.midlayer.hidden_norm.weight
        self._fc_weight = _rounded(draft.fc.weight) if rounds else draft.fc.weight
        self._returned_RE = torch.zeros((max_rows, self.hidden_size), dtype=self.dtype, device=self.device)

    def take_in(self, streams_TF: torch.Tensor, tokens: EagleTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of tokens whose features the target has computed, its three streams side by side:
        all that is ever read of any but a sequence's last. Returns qkv_TC, rotated, and the residual TE."""
        return self._project(tokens, linear(streams_TF, self._fc_weight), None)

    def begin(
        self, streams_TF: torch.Tensor, tokens: EagleTokens, last_rows_S: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        """The same, and float32 logits_SW after the tokens in `last_rows_S`, in whose order attention's `metadata`
        counts its queries."""
        qkv_TC, residual_TE = self.take_in(streams_TF, tokens)
        rows = qkv_TC.index_select(0, last_rows_S), residual_TE.index_select(0, last_rows_S)
        return self._finish(*rows, metadata)

    def go_on(self, tokens: EagleTokens, rows_T: torch.Tensor, metadata: Any) -> torch.Tensor:
        """float32 logits_TW after drafted tokens, each with what the pass before returned in one of its rows."""
        return self._finish(*self._project(tokens, self._returned_RE, rows_T), metadata)

    def _project(
        self, tokens: EagleTokens, features_RE: torch.Tensor, rows_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._weights.layers[0]
        both_TX, residual_TE = draft_input(
            tokens.ids_T,
            rows_T,
            self._weights.embed_VE,
            features_RE,
            layer.input_norm_E,
            self._feature_norm_E,
            self._config.rms_norm_eps,
            norm_before_residual=self._norm_before_residual,
        )
        qkv_TC = linear(both_TX, layer.qkv_weight, layer.qkv_bias)
        self._store(0, layer, qkv_TC, tokens.positions_T, tokens.slots_T)
        return qkv_TC, residual_TE

    def _finish(self, qkv_TC: torch.Tensor, residual_TE: torch.Tensor, metadata: Any) -> torch.Tensor:
        weights, eps = self._weights, self._config.rms_norm_eps
        layer = weights.layers[0]
        linear_add(self._gathered(0, qkv_TC, metadata), layer.o_weight, layer.o_bias, residual_TE, out=residual_TE)
        returned_TE = feed_forward_add(
            residual_TE,
            layer.post_norm_E,
            eps,
            layer.gate_up_weight,
            layer.gate_up_bias,
            layer.down_weight,
            layer.down_bias,
            out=self._returned_RE[: len(residual_TE)],
        )
        return norm_linear(returned_TE, weights.norm_E, eps, weights.lm_head_VE, out_dtype=torch.float32)


def _weights(draft: EagleDraft, embed_VE: torch.Tensor, rounds: bool) -> DecoderWeights:
    """The layer's matrices as the fused kernels read them; the projection to the vocabulary is never rounded."""
    layer = draft.midlayer
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    lm_head_WE = draft.lm_head_WE if draft.lm_head is None else draft.lm_head.weight
    assert lm_head_WE is not None, "share_lm_head comes first"
    kept: Callable[[torch.Tensor], Any] = _rounded if rounds else lambda matrix: matrix
    return DecoderWeights(
        embed_VE=embed_VE,
        layers=(
            LayerWeights(
                input_norm_E=layer.input_layernorm.weight,
                qkv_weight=kept(_cat_weights(qkv)),
                qkv_bias=_cat_biases(qkv),
                q_norm_D=None,
                k_norm_D=None,
                o_weight=kept(attention.o_proj.weight),
                o_bias=attention.o_proj.bias,
                post_norm_E=layer.post_attention_layernorm.weight,
                gate_up_weight=kept(_cat_weights(gate_up)),
                gate_up_bias=_cat_biases(gate_up),
                down_weight=kept(mlp.down_proj.weight),
                down_bias=mlp.down_proj.bias,
            ),
        ),
        norm_E=draft.norm.weight,
        lm_head_VE=lm_head_WE,
    )


def _rounded(matrix: torch.Tensor) -> PackedWeight:
    return packed(rounded(matrix, online_scheme(QuantizationType.W8)))


def _cat_weights(modules: tuple[torch.nn.Linear, ...]) -> torch.Tensor:
    weights: list[torch.Tensor] = [module.weight for module in modules]
    return torch.cat(weights)


def _cat_biases(modules: tuple[torch.nn.Linear, ...]) -> torch.Tensor | None:
    biases: list[torch.Tensor] = [module.bias for module in modules if module.bias is not None]
    return torch.cat(biases) if biases else None
