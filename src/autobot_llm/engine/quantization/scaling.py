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
from autobot_llm.engine.quantization.rounding import round_to_nearest
from autobot_llm.engine.quantization.scheme import Scheme

NUM_AWQ_STEPS = 20
SMALLEST = 1e-5


def smooth(layer: DenseLayer, seen: Mapping[str, InputStatistics], alpha: float, dtype: torch.dtype) -> None:
    """SmoothQuant: divide input j by max|x_j|^alpha / max|w_j|^(1 - alpha). `dtype` is what norms are stored in."""
    for name in ("qkv", "gate_up", "down"):
        largest_I = layer.matrices[name].abs().amax(0).clamp_(min=SMALLEST)
        factor_I = seen[name].largest_I.clamp(min=SMALLEST) ** alpha / largest_I ** (1 - alpha)
        _move(layer, seen[name], name, factor_I.clamp_(min=SMALLEST), dtype)


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
        rounded = round_to_nearest(weight_OI * factor_I, scheme, dtype, search=False).dequantize(torch.float32)
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
