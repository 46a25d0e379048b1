"""Quantized weights as the GPU's kernels read them. Knows the layout, and what fits it; knows no kernels, no files.

`PackedWeight` is the layout. Its twin is `dequantized()`: the same numbers, one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.engine.quantization.weight import QuantizedWeight

GROUPS = (32, 64, 128)
ZERO_OF_4_BITS = 8  # what a 4-bit weight of value 0 is stored as

# Scales of groups are kept in the activations' dtype. What that rounds off a scale must be no more than bfloat16 does;
# float16 would do worse to scales that are too small for it.
_SCALE_ROUNDING = 2.0**-8
_FLOAT8_CAPABILITY = (8, 9)


# O outputs, I inputs, G groups of inputs
@dataclass(frozen=True, slots=True)
class PackedWeight:
    """W, [O, I], as `values` times `scales`.

    With `group` 0, `values` is int8 or float8_e4m3fn [O, I], and `scales` float32 [O]. Otherwise `group` inputs share a
    scale: `values` is int8 [O, I' / 2], where I' is I rounded up to whole pairs of groups; byte j of a pair holds input
    j of its first group in the low four bits and of its second in the high ones, each plus 8; `scales` is [G, O], in
    the activations' dtype, with G even; so is `offsets` where the zero of a group is not 8: 8 less that zero.
    `activations`: what the scheme rounds x to. Products may, where that is faster; exact ones are always allowed.
    """

    values: torch.Tensor
    scales: torch.Tensor
    num_inputs: int
    group: int = 0
    offsets: torch.Tensor | None = None
    activations: Literal["int8", "fp8"] | None = None

    @property
    def num_outputs(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        parts = (self.values, self.scales) if self.offsets is None else (self.values, self.scales, self.offsets)
        return sum(part.numel() * part.element_size() for part in parts)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] in this dtype, computed in float32."""
        if not self.group:
            return (self.values.float() * self.scales[:, None]).to(dtype)
        pairs = self.values.view(torch.uint8).view(self.num_outputs, -1, self.group).to(torch.int16)
        values_OGI = torch.stack((pairs & 15, pairs >> 4), 2).flatten(1, 2).float() - ZERO_OF_4_BITS
        if self.offsets is not None:
            values_OGI += self.offsets.t().float()[:, :, None]
        values_OGI *= self.scales.t().float()[:, :, None]
        return values_OGI.flatten(1)[:, : self.num_inputs].to(dtype)


def pack_4_bits(
    values_OI: torch.Tensor, scales_OG: torch.Tensor, zeros_OG: torch.Tensor | None = None, *, group: int
) -> PackedWeight:
    """From whole numbers 0 to 15, and for each group of inputs its scale and its zero (8 where None)."""
    num_outputs, num_inputs = values_OI.shape
    missing = -num_inputs % (2 * group)
    padded = torch.nn.functional.pad(values_OI.to(torch.uint8), (0, missing), value=ZERO_OF_4_BITS)
    pairs = padded.view(num_outputs, -1, 2, group)
    values = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1).contiguous().view(torch.int8)
    missing_groups = padded.shape[1] // group - scales_OG.shape[1]

    def by_group(of_groups: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(of_groups, (0, missing_groups)).t().contiguous().to(scales_OG.dtype)

    offsets = None if zeros_OG is None else by_group(ZERO_OF_4_BITS - zeros_OG.to(torch.int16))
    return PackedWeight(values, by_group(scales_OG), num_inputs, group, offsets)


def why_scheme_not_packed(scheme: Scheme, capability: tuple[int, int]) -> str | None:
    """Why no matrix of this scheme fits the kernels on a device of this compute capability; None: its matrices may."""
    if scheme.kind == "float" and capability < _FLOAT8_CAPABILITY:
        return "this GPU has no 8-bit floats"
    if scheme.num_bits == 8 and scheme.granularity == "group":
        return "8 bits in groups"
    if scheme.num_bits == 4 and scheme.activations is not None:
        return "4 bits with rounded activations"
    if scheme.num_bits == 4 and _group_of(scheme) is None:
        return f"groups of {scheme.group_size} inputs, where the kernels take multiples of 128, 64 and 32"
    return None


def why_not_packed(weight: QuantizedWeight, capability: tuple[int, int]) -> str | None:
    """Why this matrix must be dequantized to be multiplied with on a GPU; None: `packed` takes it."""
    scheme = weight.scheme
    if (reason := why_scheme_not_packed(scheme, capability)) is not None:
        return reason
    if weight.group_of_input_I is not None:
        return "inputs that share a scale do not follow each other (g_idx of desc_act)"
    if scheme.num_bits == 8 and weight.zero_points_OG is not None:
        return "8 bits with zero points"
    if scheme.num_bits == 4:
        scales = weight.scales_OG.float()
        rounded = scales.to(weight.dtype).float()
        if not bool(((rounded - scales).abs() <= _SCALE_ROUNDING * scales.abs()).all()):
            return f"scales that {str(weight.dtype).removeprefix('torch.')} does not hold"
    return None


def packed(weight: QuantizedWeight) -> PackedWeight:
    """The same numbers in the kernels' layout, on the same device; for those that `why_not_packed` accepts."""
    scheme = weight.scheme
    if scheme.num_bits == 8:
        scales_O = weight.scales_OG.float().flatten().contiguous()
        return PackedWeight(weight.stored, scales_O, weight.shape[1], activations=scheme.activations)
    group = _group_of(scheme)
    assert group is not None, "its groups were found to fit"
    num_inputs = weight.shape[1]
    size = scheme.group_size or num_inputs
    group_of_G = torch.arange(0, num_inputs, group, device=weight.device) // size
    zeros_OG = None if weight.zero_points_OG is None else weight.zero_points_OG.to(torch.int16) + ZERO_OF_4_BITS
    return pack_4_bits(
        (weight.values_OI + ZERO_OF_4_BITS).view(torch.uint8),
        weight.scales_OG.to(weight.dtype)[:, group_of_G],
        None if zeros_OG is None else zeros_OG[:, group_of_G],
        group=group,
    )


def _group_of(scheme: Scheme) -> int | None:
    """The kernels' groups for those of the scheme, several of which may share a scale; None where none fit."""
    if scheme.group_size is None:
        return GROUPS[-1]
    return next((group for group in reversed(GROUPS) if scheme.group_size % group == 0), None)
