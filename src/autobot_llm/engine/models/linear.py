"""y = x W^T + b, and the same added to a residual, by torch's fastest route. Knows operators; knows nothing of models.

In float32 on the CPU, torch hands a product of few rows to a matrix-vector routine that reads a large W at a third of
the memory's bandwidth. oneDNN, which comes with torch, is about twice as fast from 1 to 16 rows once W is packed in its
own layout (docs/log.md); its operators are the ones that torch.compile emits. Every other dtype and device, and a torch
without oneDNN, takes torch's own route.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it


# T rows, I inputs, O outputs
@dataclass(frozen=True, slots=True)
class Linear:
    """`apply(x_TI, weight, bias_O)` is the product TO; `add(residual_TO, x_TI, weight, bias_O)` adds it.

    `weight` is what `pack(weight_OI)` returned, once: W in the layout of this route.
    """

    name: str
    pack: Callable[[torch.Tensor], Any]
    apply: Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]
    add: Callable[[torch.Tensor, torch.Tensor, Any, torch.Tensor | None], torch.Tensor]


def choose_linear(dtype: torch.dtype, device: torch.device) -> Linear:
    """The route for weights of this dtype on this device."""
    if dtype == torch.float32 and device.type == "cpu" and _has_onednn_operators():
        return _onednn_linear()
    return TORCH_LINEAR


def _has_onednn_operators() -> bool:
    """They are not part of torch's public interface, so a later torch may name them otherwise."""
    operators = torch.ops.mkldnn
    return (
        torch._C._has_mkldnn
        and hasattr(operators, "_linear_pointwise")
        and hasattr(operators, "_reorder_linear_weight")
    )


def _add(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    added = torch.addmm(residual, x, weight.t())
    return added if bias is None else added.add_(bias)


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


TORCH_LINEAR = Linear("torch", _as_it_is, F.linear, _add)


def _onednn_linear() -> Linear:
    reorder_op = torch.ops.mkldnn._reorder_linear_weight.default
    apply_op = torch.ops.mkldnn._linear_pointwise.default
    add_op = torch.ops.mkldnn._linear_pointwise.binary

    def pack(weight: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = reorder_op(weight, None)
        return packed

    def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = apply_op(x, weight, bias, "none", [], "")
        return product

    def add(
        residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        added: torch.Tensor = add_op(x, residual, weight, bias, "add")
        return added

    return Linear("oneDNN", pack, apply, add)
