"""Gated SiLU of a fused gate and up projection. Knows two halves of a row; knows nothing of the products around it."""

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

_BLOCK = 2048  # two 16-byte loads of each half in each thread of four warps


# T rows, F feed-forward size
@lean
@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, out_ptr, gate_up_stride, out_stride, F, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    wait_for_previous_kernel(PDL)
    gate_row = gate_up_ptr + row * gate_up_stride
    gate = tl.load(gate_row + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_row + F + columns, inside, 0.0).to(tl.float32)
    activated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + columns, activated.to(out_ptr.dtype.element_ty), inside)


def silu_mul(gate_up_T2F: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up for each row, whose first half is gate and second half up.

    Rows may lie any distance apart, but each is contiguous. Returns `out` (T, F), a new tensor by default.
    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    num_rows, width = gate_up_T2F.shape
    size = width // 2
    out = torch.empty((num_rows, size), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device) if out is None else out
    assert width == 2 * size and out.shape == (num_rows, size) and gate_up_T2F.stride(1) == out.stride(1) == 1
    if num_rows:
        _silu_mul_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
            gate_up_T2F,
            out,
            gate_up_T2F.stride(0),
            out.stride(0),
            size,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(gate_up_T2F.device),
        )
    return out


def silu_mul_reference(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """The slow twin, in float64 throughout."""
    gate_TF, up_TF = gate_up_T2F.double().chunk(2, dim=-1)
    return gate_TF * gate_TF.sigmoid() * up_TF
