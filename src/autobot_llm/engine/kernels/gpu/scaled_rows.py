"""Rows of x as streamed_rows.cu multiplies them with quantized weights: 16 bits a number, and scales. Knows that form.

Every 128 inputs of a row share a scale, the largest of them over 32,512. For whole numbers x becomes 16 bits of fixed
point, a high and a low byte, 256 high + low, in rows of their own: products of int8 are exact, so all that is lost is
2^-16 of the largest, where bfloat16 has lost up to 2^-9 of that one number. For float8 it becomes float16, which has
three bits more than bfloat16 and at this scale no number too large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.norm import rms_norm_reference

# T rows, I inputs, G groups of them

X_GROUP = 128
LARGEST = 32512.0  # 127 * 256: the high byte of what is rounded up is no more than 127
_LARGEST = tl.constexpr(LARGEST)
_INPUTS_AT_ONCE = 1024  # of a program, where nothing has to be known of the whole row
_SCALES_ALIGNMENT = 4  # of a row's scales: 16 bytes


def scale_rows(
    x_TI: torch.Tensor, *, integer: bool, unit: float = 1.0, norm: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x_TI`, after RMSNorm where there is a weight for it, and its float32 scales_TG, `unit` times as large.

    `integer`: int8 [T, 2, I], high and low bytes. Otherwise float16 [T, I]. G is rounded up to a multiple of 4; what is
    more holds whatever was there. Numbers that are not finite make their group's scale infinite, so every product with
    it is infinite or NaN. I must be a multiple of 128.
    """
    num_rows, num_inputs = x_TI.shape
    assert num_inputs % X_GROUP == 0 and x_TI.stride(1) == 1
    num_groups = triton.cdiv(num_inputs // X_GROUP, _SCALES_ALIGNMENT) * _SCALES_ALIGNMENT
    shape = (num_rows, 2, num_inputs) if integer else (num_rows, num_inputs)
    out = torch.empty(shape, dtype=torch.int8 if integer else torch.float16, device=x_TI.device)
    scales_TG = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x_TI.device)
    block = _INPUTS_AT_ONCE if norm is None else triton.next_power_of_2(num_inputs)
    scale_rows_kernel[(num_rows, triton.cdiv(num_inputs, block))](
        x_TI,
        x_TI.stride(0),
        norm,
        out,
        scales_TG,
        num_groups,
        num_inputs,
        eps,
        unit,
        NORM=norm is not None,
        INTEGER=integer,
        BLOCK_I=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x_TI.device),
    )
    return out, scales_TG


def scale_rows_reference(
    x_TI: torch.Tensor, *, integer: bool, unit: float = 1.0, norm: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin, in float64; of finite numbers."""
    num_rows = x_TI.shape[0]
    wide = x_TI.double() if norm is None else rms_norm_reference(x_TI, norm, eps)
    groups = wide.view(num_rows, -1, X_GROUP)
    largest_TG = groups.abs().amax(-1)
    scaled = (groups * (LARGEST / largest_TG.clamp(min=1e-30))[:, :, None]).flatten(1)
    scales_TG = torch.nn.functional.pad(largest_TG * (unit / LARGEST), (0, -largest_TG.shape[1] % _SCALES_ALIGNMENT))
    if not integer:
        return scaled.half(), scales_TG.float()
    whole = (scaled + 0.5).floor().int()
    high = (whole + 128) >> 8
    return torch.stack((high, whole - 256 * high), 1).to(torch.int8), scales_TG.float()


@lean
@triton.jit
def scale_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    out_ptr,  # int8 [T, 2, I] if INTEGER, else float16 [T, I]
    scales_ptr,  # float32 [T, G]
    num_groups,
    num_inputs,
    eps,
    unit,
    NORM: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    GROUPS: tl.constexpr = BLOCK_I // 128
    row = tl.program_id(0).to(tl.int64)
    at_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_I = at_I < num_inputs
    norm_I = tl.load(norm_ptr + at_I, inside_I, 0.0).to(tl.float32) if NORM else 1.0
    wait_for_previous_kernel(PDL)
    x_I = tl.load(x_ptr + row * x_stride + at_I, inside_I, 0.0).to(tl.float32)
    if NORM:
        x_I *= tl.rsqrt(tl.sum(x_I * x_I) / num_inputs + eps) * norm_I
    x_GI = tl.reshape(x_I, (GROUPS, 128))
    largest_G = tl.max(tl.where(x_GI == x_GI, tl.abs(x_GI), float("inf")), 1)
    inverse_G = _LARGEST / tl.maximum(largest_G, 1e-30)  # what is smaller has no influence
    scaled_GI = tl.where(largest_G[:, None] < float("inf"), x_GI, 0.0) * inverse_G[:, None]
    if INTEGER:
        whole_GI = tl.floor(scaled_GI + 0.5).to(tl.int32)
        high_GI = (whole_GI + 128) >> 8
        low_I = tl.reshape(whole_GI - high_GI * 256, (BLOCK_I,))
        to = out_ptr + row * 2 * num_inputs + at_I
        tl.store(to, tl.reshape(high_GI, (BLOCK_I,)).to(tl.int8), inside_I)
        tl.store(to + num_inputs, low_I.to(tl.int8), inside_I)
    else:
        tl.store(out_ptr + row * num_inputs + at_I, tl.reshape(scaled_GI, (BLOCK_I,)).to(tl.float16), inside_I)
    at_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    tl.store(scales_ptr + row * num_groups + at_G, largest_G * (unit / _LARGEST), at_G < num_inputs // 128)
