"""Move range from activations into weights, or precision to the inputs that matter, without changing the function.

A factor that a norm (or the rows of the matrix before) is divided by, and the columns of the matrix after are
multiplied with, cancels out. SmoothQuant picks it to make activations easy to round (Xiao et al. 2022, arXiv
2211.10438); AWQ to spend the weights' precision on large inputs (Lin et al. 2023, arXiv 2306.00978).
Knows one layer and what entered its matrices; knows nothing of how the results are stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.quantization.layerwise import DenseLayer, InputStatistics
from autobot_llm.engine.quantization.rounding import round_activations, round_to_nearest
from autobot_llm.engine.quantization.scheme import Scheme

INT8 = Scheme("int", 8, "channel", activations="int8")
SMOOTHING_STEPS = (0.0, 0.2, 0.4, 0.6, 0.8)  # of the way from alpha to 1
NUM_AWQ_STEPS = 20
SMALLEST = 1e-5


def smooth(layer: DenseLayer, seen: Mapping[str, InputStatistics], alpha: float, dtype: torch.dtype) -> None:
    """SmoothQuant: divide input j by max|x_j|^a / max|w_j|^(1 - a). `dtype` is what norms are stored in.

    The exponent a is `alpha` or more, whichever errs least on a sample with both sides rounded: the inputs of `down`
    are products and have far larger outliers than a norm's outputs.
    """
    for name in ("qkv", "gate_up", "down"):
        weight_OI, sample_TI = layer.matrices[name], seen[name].sample_TI
        largest_I = weight_OI.abs().amax(0).clamp_(min=SMALLEST)
        expected_TO = sample_TI @ weight_OI.t()
        least, best_I = float("inf"), None
        for step in SMOOTHING_STEPS:
            exponent = alpha + (1 - alpha) * step
            factor_I = seen[name].largest_I.clamp(min=SMALLEST) ** exponent / largest_I ** (1 - exponent)
            factor_I.clamp_(min=SMALLEST)
            error = _error_with_both_rounded(weight_OI * factor_I, sample_TI / factor_I, expected_TO, dtype)
            if error < least:
                least, best_I = error, factor_I
        if best_I is not None:
            _move(layer, seen[name], name, best_I, dtype)


def _error_with_both_rounded(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, expected_TO: torch.Tensor, dtype: torch.dtype
) -> float:
    rounded_TI, scale_T1 = round_activations(x_TI, "int8")
    weight_OI = round_to_nearest(weight_OI, INT8, dtype, search=False).dequantize(torch.float32)
    return float(((rounded_TI.float() * scale_T1) @ weight_OI.t()).sub_(expected_TO).square_().sum())


def scale_for_activations(
    layer: DenseLayer, seen: Mapping[str, InputStatistics], scheme: Scheme, config: ModelConfig, dtype: torch.dtype
) -> None:
    """AWQ: factors mean|x_j|^r, r in [0, 1) searched for the least squared error of each matrix's product."""
    for name in ("qkv", "o", "gate_up", "down"):
        mean_I = _shared_by_heads(seen[name].mean_I, config) if name == "o" else seen[name].mean_I
        factor_I = _best_factor(layer.matrices[name], seen[name], mean_I.clamp(min=SMALLEST), scheme, dtype)
        if factor_I is not None:
            _move(layer, seen[name], name, factor_I, dtype, config)


def _best_factor(
    weight_OI: torch.Tensor, seen: InputStatistics, mean_I: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> torch.Tensor | None:
    """None where no scaling is best."""
    least, best = float("inf"), None
    for step in range(NUM_AWQ_STEPS):
        factor_I = mean_I ** (step / NUM_AWQ_STEPS)
        factor_I = factor_I / (factor_I.amax() * factor_I.amin()).sqrt()
        rounded = round_to_nearest(weight_OI * factor_I, scheme, dtype).dequantize(torch.float32)
        difference = rounded.div_(factor_I).sub_(weight_OI)
        error = float(((difference @ seen.hessian_II) * difference).sum())
        if error < least:
            least, best = error, factor_I if step else None
    return best


def _move(
    layer: DenseLayer,
    seen: InputStatistics,
    name: str,
    factor_I: torch.Tensor,
    dtype: torch.dtype,
    config: ModelConfig | None = None,
) -> None:
    """Divide the inputs of matrix `name` by the factor, where they come from, and multiply its columns."""
    if name in ("qkv", "gate_up"):
        norm_E = layer.input_norm_E if name == "qkv" else layer.post_norm_E
        # The norm is stored rounded. What it really is divided by is known then, and put into the matrix.
        rounded_E = (norm_E / factor_I).to(dtype).float()
        factor_I = torch.where(rounded_E != 0, norm_E / rounded_E, torch.ones_like(norm_E))
        norm_E.copy_(torch.where(rounded_E != 0, rounded_E, norm_E))
    elif name == "down":
        _divide_rows(layer, "gate_up", slice(len(factor_I), None), factor_I)
    else:
        assert config is not None, "values are shared by heads"
        size = config.num_kv_heads * config.head_size
        heads = factor_I.view(config.num_kv_heads, -1, config.head_size)
        _divide_rows(layer, "qkv", slice(-size, None), heads[:, 0].flatten())
    layer.matrices[name] *= factor_I
    seen.divide_inputs(factor_I)


def _divide_rows(layer: DenseLayer, name: str, rows: slice, factor: torch.Tensor) -> None:
    layer.matrices[name][rows] /= factor.unsqueeze(1)
    if (bias := layer.biases[name]) is not None:
        bias[rows] /= factor


def _shared_by_heads(mean_I: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """One figure for the query heads that read the same values: attention's output is scaled where values are."""
    heads = mean_I.view(config.num_kv_heads, -1, config.head_size)
    return heads.mean(1, keepdim=True).expand_as(heads).flatten()
