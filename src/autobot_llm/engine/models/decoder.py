"""The decoder of Llama, Mistral, Qwen2 and Qwen3: token ids in, logits out. Knows weights and arithmetic; knows nothing
of sequences, blocks or sampling.

Written for eager torch at small batches, where each operator costs more to launch than to compute: q, k, v are one
product, gate and up are one, residuals are added inside a product, and rotary tables are built once. The arithmetic is
that of Hugging Face transformers: rotary embeddings by halves, RMSNorm and softmax in float32.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.attention.backend import AttentionBackend
from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.models.config import ModelConfig, RopeScaling
from autobot_llm.engine.models.linear import Linear, choose_linear
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights
from autobot_llm.engine.quantization.products import with_quantized


# T packed tokens, R rows whose logits are wanted, E hidden size, H query heads, K key/value heads, D head size,
# F feed-forward size, V vocabulary, P positions
class Decoder:
    """A decoder-only transformer over packed tokens.

    `max_context` (tokens) bounds the positions it is asked for, and the size of its rotary tables; by default the
    model's own limit.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, *, max_context: int | None = None) -> None:
        self.device = weights.device
        self._norm = _RMSNorm(config, weights)
        self._linear = choose_linear(weights.dtype, weights.device)
        if weights.is_quantized:
            self._linear = with_quantized(self._linear)
        self._embed_VE = weights.embed_VE
        self._norm_E = weights.norm_E
        self._lm_head = self._linear.pack(weights.lm_head_VE)
        self._layers = tuple(_Layer(config, layer, self._norm, self._linear) for layer in weights.layers)
        num_positions = max_context or config.max_position_embeddings
        cos_PD, sin_PD = rope_tables(config, num_positions)
        # the sign of "rotate half" goes into the table, so that rotating is one roll
        sin_PD = torch.cat((-sin_PD[:, : config.head_size // 2], sin_PD[:, config.head_size // 2 :]), dim=-1)
        tables_P2D = torch.stack((cos_PD, sin_PD), dim=1)
        self._cos_sin_P2D = tables_P2D.to(weights.dtype).to(weights.device)

    def forward(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        logit_rows_R: torch.Tensor,
        attention: AttentionBackend,
        metadata: Any,
    ) -> torch.Tensor:
        """Compute all tokens, writing their keys and values through `attention`; return float32 logits_RV of the rows.

        `metadata` is what `attention.prepare` made of this step. Ids and rows are int64, positions int32 or int64.
        """
        with torch.inference_mode():
            normed_RE, _ = self._hidden(ids_T, positions_T, logit_rows_R, attention, metadata)
        return self._logits(normed_RE)

    def hidden(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        logit_rows_R: torch.Tensor,
        attention: AttentionBackend,
        metadata: Any,
    ) -> torch.Tensor:
        """As `forward`, but what the head would be given: float32 hidden_RE of the rows, after the last norm."""
        with torch.inference_mode():
            return self._hidden(ids_T, positions_T, logit_rows_R, attention, metadata)[0].float()

    def forward_with_features(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        logit_rows_R: torch.Tensor,
        attention: AttentionBackend,
        metadata: Any,
        wanted: FeatureKinds,
    ) -> tuple[torch.Tensor, Features]:
        """As `forward`, and the features of this step."""
        with torch.inference_mode():
            normed_RE, streams = self._hidden(ids_T, positions_T, logit_rows_R, attention, metadata, wanted.layers)
            streams_TF = torch.cat([streams[i] for i in wanted.layers], dim=-1).float() if wanted.layers else None
        return self._logits(normed_RE), Features(normed_RE.float() if wanted.hidden else None, streams_TF)

    def _logits(self, normed_RE: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # outside of inference mode, so that a sampler may change the logits in place
            return self._linear.apply(normed_RE, self._lm_head, None).float()

    def _hidden(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        logit_rows_R: torch.Tensor,
        attention: AttentionBackend,
        metadata: Any,
        layers: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The rows after the last norm, and the streams of the layers that are asked for."""
        num_rows, num_tokens = logit_rows_R.shape[0], ids_T.shape[0]
        streams: dict[int, torch.Tensor] = {}
        hidden_TE = F.embedding(ids_T, self._embed_VE)
        cos_sin_T2D = self._cos_sin_P2D.index_select(0, positions_T)
        cos_T1D, sin_T1D = cos_sin_T2D[:, :1], cos_sin_T2D[:, 1:]
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            if i in layers:
                streams[i] = hidden_TE
            q_THD, k_TKD, v_TKD = layer.project(hidden_TE, cos_T1D, sin_T1D)
            attended_THD = attention.attend(i, q_THD, k_TKD, v_TKD, metadata)
            if i == last and num_rows < num_tokens and last + 1 not in layers:
                # only these rows are wanted, and no later layer needs the others
                hidden_TE = hidden_TE.index_select(0, logit_rows_R)
                attended_THD = attended_THD.index_select(0, logit_rows_R)
            hidden_TE = layer.finish(hidden_TE, attended_THD)
        if last + 1 in layers:
            streams[last + 1] = hidden_TE
            hidden_TE = hidden_TE.index_select(0, logit_rows_R)
        return self._norm(hidden_TE, self._norm_E), streams


class _Layer:
    """One layer, in the two halves around attention."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, norm: _RMSNorm, linear: Linear) -> None:
        self._norm = norm
        self._apply, self._add = linear.apply, linear.add
        self._weights = replace(
            weights,
            qkv_weight=linear.pack(weights.qkv_weight),
            o_weight=linear.pack(weights.o_weight),
            gate_up_weight=linear.pack(weights.gate_up_weight),
            down_weight=linear.pack(weights.down_weight),
        )
        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._head_size = config.head_size
        self._half = config.head_size // 2
        self._intermediate_size = config.intermediate_size
        self._qk_norm_HD = _qk_norm(config, weights)

    def project(
        self, hidden_TE: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries THD, rotated keys TKD and values TKD."""
        weights = self._weights
        qkv = self._apply(self._norm(hidden_TE, weights.input_norm_E), weights.qkv_weight, weights.qkv_bias)
        heads = qkv.view(hidden_TE.shape[0], -1, self._head_size)
        num_heads, num_kv_heads, _ = self._heads
        qk = heads.narrow(1, 0, self._num_rotated)
        if self._qk_norm_HD is not None:
            qk = self._norm(qk, self._qk_norm_HD)
        rotated = torch.addcmul(qk * cos_T1D, qk.roll(self._half, -1), sin_T1D)
        return (
            rotated.narrow(1, 0, num_heads),
            rotated.narrow(1, num_heads, num_kv_heads),
            heads.narrow(1, self._num_rotated, num_kv_heads),
        )

    def finish(self, hidden_TE: torch.Tensor, attended_THD: torch.Tensor) -> torch.Tensor:
        """Output projection and feed-forward, each added to the residual stream."""
        weights, size = self._weights, self._intermediate_size
        attended = attended_THD.flatten(1)
        hidden_TE = self._add(hidden_TE, attended, weights.o_weight, weights.o_bias)
        normed_TE = self._norm(hidden_TE, weights.post_norm_E)
        gate_up = self._apply(normed_TE, weights.gate_up_weight, weights.gate_up_bias)
        activated_TF = F.silu(gate_up.narrow(1, 0, size)).mul_(gate_up.narrow(1, size, size))
        return self._add(hidden_TE, activated_TF, weights.down_weight, weights.down_bias)


def _qk_norm(config: ModelConfig, weights: LayerWeights) -> torch.Tensor | None:
    """The norm weights of query and key heads as one table, a row for each rotated head."""
    if weights.q_norm_D is None or weights.k_norm_D is None:
        return None
    return torch.cat((weights.q_norm_D.expand(config.num_heads, -1), weights.k_norm_D.expand(config.num_kv_heads, -1)))


class _RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self._eps = torch.tensor(config.rms_norm_eps, dtype=torch.float32, device=weights.device)
        self._is_float32 = weights.dtype == torch.float32

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._is_float32:
            return self._scale(x).mul(x).mul_(weight)
        wide = x.float()
        return wide.mul_(self._scale(wide)).to(weight.dtype).mul_(weight)  # rounded before the weight, as published

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        # the norm squared instead of a mean of squares: one operator less, and the same within rounding
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self._eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_PD and sin_PD in float32 on the CPU, both halves of D alike (rotary embeddings by halves).

    Sources: RoFormer (arXiv 2104.09864); Llama 3.1's scaling as published with its weights.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    inverse_frequencies = _scaled(1.0 / (config.rope_theta**exponents), config.rope_scaling)
    angles = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1) * inverse_frequencies
    angles_PD = torch.cat((angles, angles), dim=-1)
    return angles_PD.cos(), angles_PD.sin()


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    # 0 where a wave is longer than the trained context allows (divide), 1 where it is short (keep)
    kept = scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor
    kept = (kept / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp_(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
