"""RMSNorm of many rows in one launch. Knows rows and a weight; knows nothing of the layers around it.

For steps with many rows, whose products are cuBLAS's. With few rows the norm is folded into the product instead
(linear.py). Everything is float32 until the one rounding at the end.
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

_MAX_WIDTH = 16_384  # a row is one program's registers


# T rows, E their width
@lean
@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, x_stride, out_stride, eps, E, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < E
    weight = tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    x = tl.load(x_ptr + row * x_stride + columns, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / E + eps)
    tl.store(out_ptr + row * out_stride + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), inside)


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for each row.

    Rows may lie any distance apart, but each is contiguous. Returns `out`, a new tensor by default; it may be `x_TE`.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """
    num_rows, width = x_TE.shape
    assert width <= _MAX_WIDTH, f"rows of {width} entries do not fit in a program: at most {_MAX_WIDTH}"
    out = torch.empty((num_rows, width), dtype=x_TE.dtype, device=x_TE.device) if out is None else out
    assert weight_E.shape == (width,) and out.shape == x_TE.shape
    assert x_TE.stride(1) == out.stride(1) == weight_E.stride(0) == 1
    block = triton.next_power_of_2(width)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            x_TE,
            weight_E,
            out,
            x_TE.stride(0),
            out.stride(0),
            eps,
            width,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),  # two 16-byte loads in flight in each thread
            **launch_options(x_TE.device),
        )
    return out


def rms_norm_reference(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """The slow twin, in float64 throughout."""
    x_TE = x_TE.double()
    return x_TE * (x_TE.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_E.double()
