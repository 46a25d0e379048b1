"""y = x W^T with W quantized, on a CPU, by torch's own operators. Knows shapes and schemes; knows no models.

Which operator when was measured (docs/results/quantization_cpu.md): they beat dequantizing first wherever they exist.
Each computes what its twin does, `F.linear(rounded x, W.dequantize())`, within the rounding of its arithmetic: int8
times int8 is exact, the other two take their inputs in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.models.linear import Linear
from autobot_llm.engine.quantization.rounding import round_activations
from autobot_llm.engine.quantization.weight import QuantizedWeight

# T rows, I inputs, O outputs
Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""float32 y_TO of float32 x_TI."""

# torch's int8 product of a few rows is slower than as many products of one row.
MAX_SINGLE_ROWS = 16
_INT4_GROUPS = (32, 64, 128, 256)


def with_quantized(linear: Linear) -> Linear:
    """The same route, which also takes quantized matrices."""

    def pack(weight: torch.Tensor) -> Any:
        return _Packed(product_of(weight)) if isinstance(weight, QuantizedWeight) else linear.pack(weight)

    def apply(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(weight, _Packed):
            return linear.apply(x, weight, bias)
        product = weight.product(x)
        return product if bias is None else product.add_(bias)

    def add(residual: torch.Tensor, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        return (
            apply(x, weight, bias).add_(residual)
            if isinstance(weight, _Packed)
            else linear.add(residual, x, weight, bias)
        )

    return Linear(f"{linear.name}, quantized", pack, apply, add)


class _Packed:
    """What `pack` makes of a quantized matrix."""

    def __init__(self, product: Product) -> None:
        self.product = product


def product_of(weight: QuantizedWeight) -> Product:
    """The quickest product there is for this matrix."""
    scheme = weight.scheme
    is_plain = weight.zero_points_OG is None and weight.group_of_input_I is None
    if scheme.kind == "int" and scheme.num_bits == 8 and is_plain and weight.scales_OG.shape[1] == 1:
        return _int8_product(weight) if scheme.activations == "int8" else _int8_weight_product(weight)
    if (
        scheme.kind == "int"
        and scheme.num_bits == 4
        and scheme.activations is None
        and scheme.group_size in _INT4_GROUPS
        and weight.group_of_input_I is None
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % (scheme.group_size or 1) == 0
    ):
        return _int4_product(weight)
    return twin(weight)


def twin(weight: QuantizedWeight) -> Product:
    """Dequantize, then multiply: what every other product must equal."""
    activations = weight.scheme.activations

    def product(x_TI: torch.Tensor) -> torch.Tensor:
        if activations is not None:
            rounded_TI, scale_T1 = round_activations(x_TI, activations)
            x_TI = rounded_TI.float() * scale_T1
        return F.linear(x_TI, weight.dequantize(torch.float32))

    return product


def _int8_product(weight: QuantizedWeight) -> Product:
    columns_IO, scales_O = weight.stored.t(), weight.scales_OG.flatten().float()

    def product(x_TI: torch.Tensor) -> torch.Tensor:
        rounded_TI, scale_T1 = round_activations(x_TI, "int8")
        if 1 < len(rounded_TI) <= MAX_SINGLE_ROWS:
            sums_TO = torch.cat([torch._int_mm(row, columns_IO) for row in torch.split(rounded_TI, 1)])
        else:
            sums_TO = torch._int_mm(rounded_TI, columns_IO)
        return sums_TO.float().mul_(scale_T1).mul_(scales_O)

    return product


def _int8_weight_product(weight: QuantizedWeight) -> Product:
    stored_OI, scales_O = weight.stored, weight.scales_OG.flatten().bfloat16()
    operator = torch.ops.aten._weight_int8pack_mm.default

    def product(x_TI: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = operator(x_TI.bfloat16(), stored_OI, scales_O).float()
        return found

    return product


def _int4_product(weight: QuantizedWeight) -> Product:
    group_size = weight.scheme.group_size
    scales_OG = weight.scales_OG.float()
    offsets_OG = torch.zeros_like(scales_OG) if weight.zero_points_OG is None else -weight.zero_points_OG * scales_OG
    scales_and_offsets_GO2 = torch.stack((scales_OG, offsets_OG), -1).transpose(0, 1).contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default((weight.values_OI + 8).to(torch.int32), 1)
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def product(x_TI: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = operator(x_TI.bfloat16(), packed, group_size, scales_and_offsets_GO2).float()
        return found

    return product
