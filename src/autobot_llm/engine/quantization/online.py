"""Round a model's matrices as it is loaded, without calibration. Knows weights and schemes; knows no files."""

from __future__ import annotations

from dataclasses import replace

import torch

from autobot_llm.engine.models.weights import MATRICES, DecoderWeights, LayerWeights
from autobot_llm.engine.quantization.rounding import round_to_nearest
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType, Scheme, scheme_of
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.errors import ConfigurationError

ONLINE_TYPES = (QuantizationType.W8A8, QuantizationType.W8, QuantizationType.W4, QuantizationType.FP8)


def online_scheme(kind: QuantizationType) -> Scheme:
    """How a type that can be made at load is stored. Raises ConfigurationError for one that needs calibration."""
    if kind not in ONLINE_TYPES:
        accepted = ", ".join(ONLINE_TYPES)
        raise ConfigurationError(f"{kind.value} cannot be made at load: expected {accepted}, or a quantized folder")
    return scheme_of(QuantizationConfig(type=kind))


def quantize_online(weights: DecoderWeights, kind: QuantizationType) -> DecoderWeights:
    """The same model with its layers' matrices rounded to nearest; takes seconds, and memory for both meanwhile.

    Raises what `online_scheme` and `rounded` do.
    """
    scheme = online_scheme(kind)
    return replace(weights, layers=tuple(_quantized(layer, scheme) for layer in weights.layers))


def _quantized(layer: LayerWeights, scheme: Scheme) -> LayerWeights:
    return replace(layer, **{name: rounded(getattr(layer, name), scheme) for name in MATRICES})


def rounded(matrix: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """The matrix rounded to nearest. Raises ConfigurationError where its groups do not fit."""
    if scheme.group_size and matrix.shape[1] % scheme.group_size:
        raise ConfigurationError(
            f"int4 at load needs inputs in multiples of {scheme.group_size}, and a matrix has {matrix.shape[1]}: "
            "use int8, or quantize the model with a smaller --group-size"
        )
    return round_to_nearest(matrix, scheme, matrix.dtype)
