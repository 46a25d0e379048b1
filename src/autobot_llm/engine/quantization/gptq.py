"""GPTQ: round a matrix column by column, and let the columns that are left make up for each error.

Knows one matrix and the second moments of its inputs; knows no layers. Source: Frantar et al. 2022 (arXiv 2210.17323),
with the inverse by Cholesky factors, lazy updates of blocks, and groups whose scales are chosen beforehand.
"""

from __future__ import annotations

import torch

from autobot_llm.engine.quantization.rounding import choose_scales
from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.engine.quantization.weight import FP8, QuantizedWeight

DAMPING = 0.01  # of the mean of the diagonal: keeps the inverse stable where inputs hardly vary
BLOCK_SIZE = 128


# O outputs, I inputs, G groups
def gptq(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    act_order: bool,
) -> QuantizedWeight:
    """The quantized matrix whose product with the inputs behind `hessian_II` (sum of x x^T) differs little.

    `act_order` rounds the inputs with the largest moments first, where most of the error can still be made up for;
    groups stay as they are, so that readers need no map. Scales are of `dtype`.
    """
    diagonal = hessian_II.diagonal().clone()
    unused = diagonal == 0
    diagonal[unused] = 1.0
    importance_I = diagonal / diagonal.mean()
    scales_OG, zeros_OG = choose_scales(weight_OI, scheme, dtype, importance_I=importance_I)
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(diagonal))
    groups_I = (torch.arange(len(diagonal)) // (scheme.group_size or len(diagonal)))[order]
    scales_OI = scales_OG.index_select(1, groups_I)
    zeros_OI = None if zeros_OG is None else zeros_OG.index_select(1, groups_I)
    ordered_II = hessian_II.index_select(0, order).index_select(1, order)
    ordered_II.diagonal()[unused[order]] = 1.0
    factor_II = _inverse_factor(ordered_II)
    del ordered_II
    rounded_OI = _round_in_order(weight_OI[:, order].float(), factor_II, scales_OI, zeros_OI, scheme)
    values_OI = torch.empty_like(rounded_OI)
    values_OI[:, order] = rounded_OI
    return QuantizedWeight.from_values(values_OI, scales_OG.to(dtype), zeros_OG, scheme, dtype=dtype)


def _inverse_factor(hessian_II: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse; damping grows until there is one. `hessian_II` is used up."""
    mean = hessian_II.diagonal().mean()
    damping, added = DAMPING, 0.0
    while True:
        hessian_II.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(hessian_II)
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
        if damping > 1e4:
            raise ValueError("the inputs seen in calibration are not numbers")


def _round_in_order(
    weight_OI: torch.Tensor,
    factor_II: torch.Tensor,
    scales_OI: torch.Tensor,
    zeros_OI: torch.Tensor | None,
    scheme: Scheme,
) -> torch.Tensor:
    """The stored numbers, in float32; `weight_OI` is used up."""
    num_inputs = weight_OI.shape[1]
    values_OI = torch.empty_like(weight_OI)
    for start in range(0, num_inputs, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, num_inputs)
        block = weight_OI[:, start:stop]
        errors = torch.empty_like(block)
        corner = factor_II[start:stop, start:stop]
        for i in range(stop - start):
            scale_O = scales_OI[:, start + i]
            zero_O = 0.0 if zeros_OI is None else zeros_OI[:, start + i]
            column_O = block[:, i]
            scaled = column_O / scale_O
            if scheme.kind == "float":
                value_O = scaled.clamp_(scheme.low, scheme.high).to(FP8).float()
            else:
                value_O = scaled.round_().add_(zero_O).clamp_(scheme.low, scheme.high)
            values_OI[:, start + i] = value_O
            errors[:, i] = (column_O - (value_O - zero_O) * scale_O) / corner[i, i]
            block[:, i + 1 :] -= torch.outer(errors[:, i], corner[i, i + 1 :])
        weight_OI[:, stop:] -= errors @ factor_II[start:stop, stop:]
    return values_OI
