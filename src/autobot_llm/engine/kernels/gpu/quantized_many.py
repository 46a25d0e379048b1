"""Products of quantized weights with many rows: prompts and large batches. Knows operators; knows nothing of layers.

With many rows arithmetic is the limit, and there are two ways to do it. What is stored in 8 bits can be multiplied in 8
bits, at twice the speed, if the activations are rounded, too (`round_activations`): each row with a scale of its own.
Schemes that round activations (W8A8, FP8 dynamic) allow that; they may still keep them whole where rows are few, which
is closer to the unrounded model, so a row's outputs depend a little on how many rows there are. Everything else gives
the numbers that the weights stand for with the activations as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton

from autobot_llm.engine.kernels.gpu.activation import silu_mul
from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.kernels.gpu.many_kernels import dequantize_kernel
from autobot_llm.engine.kernels.gpu.norm import rms_norm

if TYPE_CHECKING:
    from autobot_llm.engine.kernels.gpu.quantized import PackedWeight

# T rows, O outputs, I inputs

WORKSPACE_BYTES = 32 << 20
"""Of each device, for a part of a weight in numbers: what is written there is read before it leaves the second-level
cache."""


def multiply_many(
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    round_activations: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it, as `multiply` in linear.py, of any number of rows. Returns `out`.

    `round_activations`: rows in the 8 bits of the weight, int8 or float8, where it has 8 bits.
    """
    num_rows, num_inputs = x_TI.shape
    assert weight.num_inputs == num_inputs and out.shape == (num_rows, weight.num_outputs // (2 if gated else 1))
    assert x_TI.stride(1) == out.stride(1) == 1
    if num_rows == 0:
        return out
    if norm is not None:
        x_TI = rms_norm(x_TI, norm, eps)
    product = torch.empty((num_rows, weight.num_outputs), dtype=x_TI.dtype, device=x_TI.device) if gated else out
    _by_parts(x_TI, weight, product, bias, residual)
    return silu_mul(product, out) if gated else out


def _by_parts(
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Some outputs after the other: their weights in numbers, then torch's product."""
    space = workspace(x_TI.device)
    most = space.numel() // (weight.num_inputs * x_TI.element_size())
    assert most > 0, f"{weight.num_inputs} inputs do not fit the workspace"
    for start in range(0, weight.num_outputs, most):
        stop = min(start + most, weight.num_outputs)
        part = space[: (stop - start) * weight.num_inputs * x_TI.element_size()].view(x_TI.dtype)
        columns = dequantize(weight, start, part.view(stop - start, weight.num_inputs)).t()
        to = out[:, start:stop]
        if residual is not None:
            torch.addmm(residual[:, start:stop], x_TI, columns, out=to)
            if bias is not None:
                to += bias[start:stop]
        elif bias is not None:
            torch.addmm(bias[start:stop], x_TI, columns, out=to)
        else:
            torch.mm(x_TI, columns, out=to)


def dequantize(weight: PackedWeight, start: int, out: torch.Tensor) -> torch.Tensor:
    """Outputs `start` and so on of the weight in numbers, as many as `out` has rows: `weight.dequantized()` there."""
    num_outputs, num_inputs = out.shape
    assert out.is_contiguous() and start + num_outputs <= weight.num_outputs and num_inputs == weight.num_inputs
    row_bytes = weight.values.stride(0)
    block_i = weight.group or 512
    block_o = max(1, 4096 // block_i)
    dequantize_kernel[(triton.cdiv(num_outputs, block_o), triton.cdiv(weight.values.shape[1], block_i))](
        weight.values[start:],
        row_bytes,
        weight.scales[..., start:],
        None if weight.offsets is None else weight.offsets[..., start:],
        weight.num_outputs,
        out,
        num_outputs,
        num_inputs,
        GROUP=weight.group,
        OFFSETS=weight.offsets is not None,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


@lru_cache
def workspace(device: torch.device) -> torch.Tensor:
    """Bytes that never move, because captured graphs hold their address."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the memory for weights in numbers would belong to a CUDA graph: run a step before capturing"
        )
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
