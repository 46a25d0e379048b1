"""One decoder layer at a time over whole sequences, watching what enters each matrix. Knows arithmetic, no schemes.

The arithmetic of models/decoder.py in float32, without a cache: calibration reads every token once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.decoder import rope_tables

SAMPLE_TOKENS_EACH, MAX_SAMPLE_TOKENS = 64, 512
MATRICES = ("qkv", "o", "gate_up", "down")


# B sequences, L tokens of each, E hidden size, H query heads, K key/value heads, D head size, O outputs, I inputs
@dataclass(slots=True)
class DenseLayer:
    """A layer in float32, to be changed in place. Rows of `qkv` are q, k, v, those of `gate_up` gate, up."""

    matrices: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor | None]
    input_norm_E: torch.Tensor
    post_norm_E: torch.Tensor
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None


class InputStatistics:
    """What entered a matrix: the largest and the mean magnitude of each input, sums of outer products, a sample."""

    def __init__(self, num_inputs: int) -> None:
        self.largest_I = torch.zeros(num_inputs)
        self.sum_I = torch.zeros(num_inputs)
        self.hessian_II = torch.zeros(num_inputs, num_inputs)
        self.num_tokens = 0
        self._sample: list[torch.Tensor] = []

    def add(self, x_TI: torch.Tensor) -> None:
        magnitude_TI = x_TI.abs()
        torch.maximum(self.largest_I, magnitude_TI.amax(0), out=self.largest_I)
        self.sum_I += magnitude_TI.sum(0)
        self.hessian_II.addmm_(x_TI.t(), x_TI)
        self.num_tokens += len(x_TI)
        if len(self._sample) * SAMPLE_TOKENS_EACH < MAX_SAMPLE_TOKENS:
            self._sample.append(x_TI[:: max(1, len(x_TI) // SAMPLE_TOKENS_EACH)][:SAMPLE_TOKENS_EACH].clone())

    @property
    def sample_TI(self) -> torch.Tensor:  # noqa: N802
        """Some of the tokens, from all over the sequences of the first batches."""
        return torch.cat(self._sample)

    @property
    def mean_I(self) -> torch.Tensor:  # noqa: N802
        return self.sum_I / max(1, self.num_tokens)

    def divide_inputs(self, by_I: torch.Tensor) -> None:
        """What would have been seen had every input been divided."""
        self.largest_I /= by_I
        self.sum_I /= by_I
        self.hessian_II /= torch.outer(by_I, by_I)
        self._sample = [x_TI / by_I for x_TI in self._sample]


class LayerMath:
    """Runs layers of one model over sequences of up to `num_positions` tokens."""

    def __init__(self, config: ModelConfig, num_positions: int) -> None:
        self._config = config
        self._cos_PD, self._sin_PD = rope_tables(config, num_positions)

    def forward(
        self,
        layer: DenseLayer,
        index: int,
        hidden_BLE: torch.Tensor,
        watched: Mapping[str, InputStatistics] | None = None,
    ) -> torch.Tensor:
        """What leaves layer number `index`. `watched` gets what entered its matrices."""
        config = self._config

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            if watched is not None:
                watched[name].add(x.flatten(0, 1))
            return F.linear(x, layer.matrices[name], layer.biases[name])

        num_sequences, length, _ = hidden_BLE.shape
        qkv = product("qkv", self._norm(hidden_BLE, layer.input_norm_E))
        heads = qkv.view(num_sequences, length, -1, config.head_size).transpose(1, 2)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q, k = self._norm(q, layer.q_norm_D), self._norm(k, layer.k_norm_D)
        q, k = self._rotated(q), self._rotated(k)
        window = config.sliding_windows[index]
        mask = _window_mask(length, window) if 0 < window < length else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        hidden_BLE = hidden_BLE + product("o", attended.transpose(1, 2).flatten(2))
        gate, up = product("gate_up", self._norm(hidden_BLE, layer.post_norm_E)).chunk(2, dim=-1)
        return hidden_BLE + product("down", F.silu(gate) * up)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._config.rms_norm_eps)

    def _rotated(self, heads: torch.Tensor) -> torch.Tensor:
        cos, sin = self._cos_PD[: heads.shape[2]], self._sin_PD[: heads.shape[2]]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _window_mask(length: int, window: int) -> torch.Tensor:
    """True where a query (row) sees a position: itself and the `window` - 1 before it."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    return (distance >= 0) & (distance < window)
