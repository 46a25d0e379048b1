"""Choose scales and round to nearest, for matrices and for activations. Knows arithmetic; knows no calibration."""

from __future__ import annotations

from typing import Literal

import torch

from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.engine.quantization.weight import FP8, QuantizedWeight

# Ranges tried, as shares of the full one. A whole number gains by clipping a few large ones; a float, whose steps are
# shares of the number, by where within an octave the numbers fall among its steps.
SEARCHED_SHARES = {"int": tuple(1 - 0.025 * i for i in range(17)), "float": tuple(2 ** (i / 8) for i in range(8))}
# Rounding holds several float32 copies of so many, and not of a whole matrix. A GPU wants more work at a time.
NUMBERS_AT_A_TIME, ON_A_GPU = 1 << 22, 1 << 24
SMALLEST_ACTIVATION = 1e-8  # of a token of zeros


# O outputs, I inputs, G groups, T tokens
def choose_scales(
    weight_OI: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    search: bool = True,
    importance_I: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """scales_OG, rounded to `scale_dtype`, and for asymmetric schemes zero_points_OG.

    `search` tries other ranges than the full one and takes that of the least squared error, in which inputs count by
    `importance_I`. The scale is rounded before the error is taken, as it is what a reader will have.
    """
    rows = _some_rows(weight_OI, scheme)
    if len(rows) > 1:
        found = [choose_scales(part, scheme, scale_dtype, search=search, importance_I=importance_I) for part in rows]
        zeros = [zeros_OG for _, zeros_OG in found if zeros_OG is not None]
        return torch.cat([scales_OG for scales_OG, _ in found]), torch.cat(zeros) if zeros else None
    groups_OGS = _grouped(weight_OI.float(), scheme)
    weights_OGS = None if importance_I is None else _grouped(importance_I.unsqueeze(0), scheme)
    low = groups_OGS.amin(-1).clamp_(max=0)
    high = groups_OGS.amax(-1).clamp_(min=0)
    best = _scale(low, high, scheme, scale_dtype)
    if not search:
        return _for_storage(best, scheme)
    least = _error(groups_OGS, *best, scheme, weights_OGS)
    for share in SEARCHED_SHARES[scheme.kind][1:]:
        candidate = _scale(low * share, high * share, scheme, scale_dtype)
        error = _error(groups_OGS, *candidate, scheme, weights_OGS)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1]))
    return _for_storage(best, scheme)


def round_to_nearest(
    weight_OI: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    search: bool = True,
    importance_I: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Each number to the nearest one that the scheme can hold. `dtype` is the matrix's, and that of its scales."""
    parts = [_round_rows(part, scheme, dtype, search, importance_I) for part in _some_rows(weight_OI, scheme)]
    whole = QuantizedWeight.below_each_other(parts)
    assert whole is not None, "no part has groups of its own"
    return whole


def _round_rows(
    weight_OI: torch.Tensor, scheme: Scheme, dtype: torch.dtype, search: bool, importance_I: torch.Tensor | None
) -> QuantizedWeight:
    scales_OG, zeros_OG = choose_scales(weight_OI, scheme, dtype, search=search, importance_I=importance_I)
    scales = scales_OG.expand(len(weight_OI), -1)
    zeros = torch.zeros_like(scales, dtype=torch.float32) if zeros_OG is None else zeros_OG.float()
    dtype_of_values = FP8 if scheme.kind == "float" else torch.int8
    values_OI = torch.empty(weight_OI.shape, dtype=dtype_of_values, device=weight_OI.device)
    grouped_OGS = _in_groups(weight_OI.float(), scheme.group_size)
    values_OI.copy_(_rounded(grouped_OGS, scales.float(), zeros, scheme).flatten(1)[:, : weight_OI.shape[1]])
    del grouped_OGS  # four times the memory, and what follows takes some, too
    return QuantizedWeight.from_values(values_OI, scales.to(dtype).contiguous(), zeros_OG, scheme, dtype=dtype)


def round_activations(x_TI: torch.Tensor, kind: Literal["int8", "fp8"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's numbers in 8 bits, int8 or float8_e4m3fn, and its float32 scale_T1."""
    largest_T1 = x_TI.abs().amax(-1, keepdim=True).float().clamp_(min=SMALLEST_ACTIVATION)
    if kind == "int8":
        scale_T1 = largest_T1 / 127.5  # as compressed-tensors: half of the 255 steps on either side
        return (x_TI.float() / scale_T1).round_().clamp_(-128, 127).to(torch.int8), scale_T1
    scale_T1 = largest_T1 / 448
    return (x_TI.float() / scale_T1).clamp_(-448, 448).to(FP8), scale_T1


def _some_rows(weight_OI: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """A matrix in parts of a bounded size; whole where its outputs share a scale."""
    if scheme.granularity == "tensor":
        return (weight_OI,)
    most = NUMBERS_AT_A_TIME if weight_OI.device.type == "cpu" else ON_A_GPU
    return torch.split(weight_OI, max(1, most // weight_OI.shape[1]))


def _grouped(weight_OI: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """weight_OGS: the numbers that share a scale, S of them; a tensor's scale is that of a single row."""
    if scheme.granularity == "tensor":
        return weight_OI.reshape(1, 1, -1)
    return _in_groups(weight_OI, scheme.group_size)


def _in_groups(weight_OI: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """S inputs of a group, zeros after the last input; one group of all where there are none."""
    size = group_size or weight_OI.shape[1]
    padded = torch.nn.functional.pad(weight_OI, (0, -weight_OI.shape[1] % size))
    return padded.view(len(weight_OI), -1, size)


def _scale(
    low_OG: torch.Tensor, high_OG: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a range, as float32."""
    smallest = torch.finfo(dtype).tiny  # a row of zeros has a scale, too
    if scheme.symmetric:
        largest = torch.maximum(-low_OG, high_OG)
        steps = scheme.high if scheme.kind == "float" else (scheme.high - scheme.low) / 2
        scale = (largest / steps).clamp_(min=smallest).to(dtype).float()
        return scale, torch.zeros_like(scale)
    scale = ((high_OG - low_OG) / (scheme.high - scheme.low)).clamp_(min=smallest).to(dtype).float()
    return scale, (scheme.low - low_OG / scale).round_().clamp_(scheme.low, scheme.high)


def _rounded(groups_OGS: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The stored numbers, in float32."""
    scaled = groups_OGS / scale_OG.unsqueeze(-1)
    if scheme.kind == "float":
        return scaled.clamp_(scheme.low, scheme.high).to(FP8).float()
    return scaled.round_().add_(zero_OG.unsqueeze(-1)).clamp_(scheme.low, scheme.high)


def _error(
    groups_OGS: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor,
    scheme: Scheme,
    weights_OGS: torch.Tensor | None,
) -> torch.Tensor:
    rounded = _rounded(groups_OGS, scale_OG, zero_OG, scheme)
    back = rounded.sub_(zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1))
    error = back.sub_(groups_OGS).square_()
    return (error if weights_OGS is None else error * weights_OGS).sum(-1)


def _for_storage(found: tuple[torch.Tensor, torch.Tensor], scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale, zero = found
    return scale, None if scheme.symmetric else zero
