"""The decoder's products on a GPU: y = x W^T with what surrounds it. Knows operators; knows nothing of layers.

With few rows, a product is one kernel that streams W (streamed.py; skinny.py, whose kernels are Triton's), with bias,
gated SiLU and residual folded in. With many, or where it measured faster, it is cuBLAS's, between the small kernels
(norm.py, activation.py). tiles.py and stream_tiles.py say which. Quantized weights have further kernels (quantized.py,
quantized_many.py) and tables of their own. Each operator has a twin in float64, `*_reference`, to be tested against.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
import triton

from autobot_llm.engine.kernels.gpu.activation import silu_mul
from autobot_llm.engine.kernels.gpu.block_tiles import BlockTile
from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.nvrtc import CompilationError
from autobot_llm.engine.kernels.gpu.quantized import multiply_quantized
from autobot_llm.engine.kernels.gpu.quantized_many import multiply_many
from autobot_llm.engine.kernels.gpu.quantized_tiles import choose_quantized_tile
from autobot_llm.engine.kernels.gpu.row_launch import (
    ALIGNMENT,
    capability_of,
    prefetchable,
    split_inputs,
    workspace,
)
from autobot_llm.engine.kernels.gpu.skinny import matvec_kernel, rows_kernel
from autobot_llm.engine.kernels.gpu.stream_tiles import StreamTile, choose_stream_tile
from autobot_llm.engine.kernels.gpu.streamed import Weight, format_of, multiply_streamed, why_not_streamed
from autobot_llm.engine.kernels.gpu.streamed_blocks import block_tile_for, multiply_blocks, rounds
from autobot_llm.engine.kernels.gpu.tiles import Kind, MatvecTile, RowsTile, Tile, choose_tile
from autobot_llm.engine.quantization.packed import PackedWeight

# T rows, I inputs, O outputs, F feed-forward size (W is [2F, I]: gate rows, then up rows)

_MIN_PADDED_ROWS = 16  # below it, Triton leaves Hopper's matrix instructions for older, slower ones


def linear(
    x_TI: torch.Tensor,
    weight_OI: Weight,
    bias_O: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x W^T + bias. Rows of `x_TI` and `out` may lie any distance apart. Returns `out`, a new tensor by default."""
    out = _output(x_TI, _num_outputs(weight_OI), out, out_dtype)
    return _by_table(Kind.PLAIN, x_TI, weight_OI, out, bias=bias_O)


def linear_add(
    x_TI: torch.Tensor,
    weight_OI: Weight,
    bias_O: torch.Tensor | None,
    residual_TO: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + x W^T + bias. `out` may be `residual_TO` itself; it is a new tensor by default."""
    out = _output(x_TI, _num_outputs(weight_OI), out, None)
    return _by_table(Kind.PLAIN, x_TI, weight_OI, out, bias=bias_O, residual=residual_TO)


def norm_linear(
    x_TI: torch.Tensor,
    norm_I: torch.Tensor,
    eps: float,
    weight_OI: Weight,
    bias_O: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """RMSNorm(x) W^T + bias. Rows of `x_TI` and `out` may lie any distance apart. Returns `out`, new by default."""
    out = _output(x_TI, _num_outputs(weight_OI), out, out_dtype)
    return _by_table(Kind.NORM, x_TI, weight_OI, out, norm=norm_I, eps=eps, bias=bias_O)


def norm_linear_gated(
    x_TI: torch.Tensor,
    norm_I: torch.Tensor,
    eps: float,
    weight_2FI: Weight,
    bias_2F: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(gate) * up, TF, where gate and up are the halves of RMSNorm(x) W^T + bias. Returns `out`, new by default.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    out = _output(x_TI, _num_outputs(weight_2FI) // 2, out, None)
    return _by_table(Kind.GATED, x_TI, weight_2FI, out, norm=norm_I, eps=eps, bias=bias_2F, gated=True)


def feed_forward_add(
    x_TI: torch.Tensor,
    norm_I: torch.Tensor,
    eps: float,
    gate_up_2FI: Weight,
    gate_up_bias_2F: torch.Tensor | None,
    down_OF: Weight,
    down_bias_O: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """x + W f + bias with f = `norm_linear_gated`, whose numbers lie as W's product wants them where both have the same
    kernel. Returns `out`, which may be `x_TI`."""
    inner_TF = _output(x_TI, _num_outputs(gate_up_2FI) // 2, None, None)
    tile, down_tile = _tile_for(Kind.GATED, x_TI, gate_up_2FI, inner_TF), _tile_for(Kind.PLAIN, inner_TF, down_OF, out)
    around: dict[str, Any] = {"norm": norm_I, "eps": eps, "bias": gate_up_bias_2F, "gated": True}
    try:
        if isinstance(tile, BlockTile) and isinstance(down_tile, BlockTile):
            assert isinstance(gate_up_2FI, PackedWeight) and isinstance(down_OF, PackedWeight), (
                "the kernel knows no other"
            )
            if not rounds(down_OF, x_TI.shape[0]):
                multiply_blocks(tile, x_TI, gate_up_2FI, inner_TF, arranges=True, **around)
                return multiply_blocks(
                    down_tile, inner_TF, down_OF, out, bias=down_bias_O, residual=x_TI, is_arranged=True
                )
        product(tile, x_TI, gate_up_2FI, inner_TF, **around)
        return product(down_tile, inner_TF, down_OF, out, bias=down_bias_O, residual=x_TI)
    except CompilationError:  # of a kernel in CUDA C++, which is not chosen again; nothing was added yet
        return feed_forward_add(x_TI, norm_I, eps, gate_up_2FI, gate_up_bias_2F, down_OF, down_bias_O, out=out)


def _by_table(kind: Kind, x_TI: torch.Tensor, weight: Weight, out: torch.Tensor, **around: Any) -> torch.Tensor:
    """The product with what surrounds it, by the tile of the tables."""
    try:
        return product(_tile_for(kind, x_TI, weight, out), x_TI, weight, out, **around)
    except CompilationError:  # of a kernel in CUDA C++, which is not chosen again
        return _by_table(kind, x_TI, weight, out, **around)


def product(
    tile: Tile | StreamTile | BlockTile | None,
    x_TI: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it, by this tile, or by torch where it is None."""
    if isinstance(tile, StreamTile):
        return multiply_streamed(tile, x_TI, weight, out, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated)
    if isinstance(tile, BlockTile):
        assert isinstance(weight, PackedWeight), "the kernel knows no other"
        return multiply_blocks(tile, x_TI, weight, out, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated)
    if isinstance(weight, PackedWeight):
        return _quantized_product(
            tile, x_TI, weight, out, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated
        )
    if norm is not None and not (tile is not None and _folds_norm(tile, x_TI.dtype)):
        x_TI, norm = rms_norm(x_TI, norm, eps), None
    if tile is not None:
        return multiply(tile, x_TI, weight, out, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated)
    if gated:
        gate_up_T2F = _output(x_TI, weight.shape[0], None, None)
        return silu_mul(_torch_product(x_TI, weight, bias, gate_up_T2F), out)
    if residual is None:
        return _torch_product(x_TI, weight, bias, out)
    torch.addmm(residual, x_TI, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def _quantized_product(
    tile: Tile | None, x_TI: torch.Tensor, weight: PackedWeight, out: torch.Tensor, *, norm: torch.Tensor | None,
    eps: float, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool,
) -> torch.Tensor:  # fmt: skip
    """By this tile, or where it is None as many rows: there activations may be rounded, if the scheme says so."""
    if tile is None:
        may_round = weight.activations is not None
        return multiply_many(
            x_TI,
            weight,
            out,
            norm=norm,
            eps=eps,
            bias=bias,
            residual=residual,
            gated=gated,
            round_activations=may_round,
        )
    assert isinstance(tile, RowsTile), "a quantized weight's table has no other"
    if norm is not None and not _folds_norm(tile, x_TI.dtype):
        x_TI, norm = rms_norm(x_TI, norm, eps), None
    return multiply_quantized(tile, x_TI, weight, out, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated)


def multiply(
    tile: Tile,
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The product by one Triton kernel with this tile. Allocates nothing, except once for each device if it splits.

    Kernels that split the inputs share memory, so all of a device's must run on one stream.
    """
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight.shape[0] // (2 if gated else 1)
    assert weight.is_contiguous() and weight.shape[1] == num_inputs and x_TI.dtype == weight.dtype
    assert out.shape == (num_rows, num_outputs) and x_TI.stride(1) == out.stride(1) == 1
    assert norm is None or norm.shape == (num_inputs,)
    assert bias is None or bias.shape == (weight.shape[0],)
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    if num_rows == 0:
        return out
    num_tiles = triton.cdiv(num_outputs, tile.block_o)
    common = {
        "x_ptr": x_TI,
        "norm_ptr": norm,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "out_ptr": out,
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "eps": eps,
        "NORM": norm is not None,
        "GATED": gated,
        "BIAS": bias is not None,
        "ADD": residual is not None,
        "WHOLE_TILES": num_inputs % tile.block_i == 0,
        "EVICT_FIRST": tile.evict_first,
        "BLOCK_O": tile.block_o,
        "BLOCK_I": tile.block_i,
        "num_warps": tile.num_warps,
        **launch_options(x_TI.device),
    }
    if isinstance(tile, MatvecTile):
        assert num_rows == 1, f"a matrix-vector product of {num_rows} rows"
        prefetch_bytes = prefetchable(weight, tile.prefetch_bytes, num_inputs - tile.block_i)
        matvec_kernel[(num_tiles,)](**common, PREFETCH_BYTES=prefetch_bytes, num_stages=1)
        return out
    padded_rows = max(triton.next_power_of_2(num_rows), _MIN_PADDED_ROWS)
    num_sums = num_tiles * ((2 if gated else 1) * tile.block_o + 1) * padded_rows
    num_splits, shortest = split_inputs(tile.num_splits, tile.block_i, num_tiles, num_inputs, num_sums)
    partial, arrivals = workspace(x_TI.device) if num_splits > 1 else (None, None)
    rows_kernel[(num_tiles * num_splits,)](
        **common,
        x_stride=x_TI.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        out_stride=out.stride(0),
        partial_ptr=partial,
        arrivals_ptr=arrivals,
        num_rows=num_rows,
        PREFETCH_TILE=tile.prefetch_tile,
        PREFETCH_BYTES=prefetchable(weight, tile.prefetch_bytes, shortest - tile.prefetch_tile * tile.block_i),
        NUM_SPLITS=num_splits,
        PADDED_ROWS=padded_rows,
        num_stages=tile.num_stages,
    )
    return out


def _num_outputs(weight: Weight) -> int:
    return weight.num_outputs if isinstance(weight, PackedWeight) else weight.shape[0]


def _tile_for(
    kind: Kind, x_TI: torch.Tensor, weight: Weight, out: torch.Tensor
) -> Tile | StreamTile | BlockTile | None:
    """The tile of the table, or None where only torch's product is possible or worthwhile."""
    halves = 2 if kind is Kind.GATED else 1
    if why_not_streamed(x_TI, weight, out.dtype) is None and (
        tile := choose_stream_tile(
            kind, x_TI.shape[0], _num_outputs(weight) // halves, x_TI.shape[1], format_of(weight)
        )
    ):
        return tile
    if isinstance(weight, PackedWeight):
        if blocks := block_tile_for(x_TI, weight, out):
            return blocks
        num_outputs, num_bits = weight.num_outputs // halves, 4 if weight.group else 8
        may_round = weight.activations is not None
        return choose_quantized_tile(kind, x_TI.shape[0], num_outputs, weight.num_inputs, num_bits, may_round=may_round)
    num_outputs, num_inputs = weight.shape
    possible = (
        weight.dtype in (torch.bfloat16, torch.float16)
        and x_TI.dtype == weight.dtype
        and weight.is_contiguous()
        and num_inputs * weight.element_size() % ALIGNMENT == 0
        and x_TI.shape[0] > 0
    )
    if not possible:
        return None
    return choose_tile(kind, x_TI.shape[0], num_outputs // halves, num_inputs, capability_of(weight.device))


def _folds_norm(tile: Tile, dtype: torch.dtype) -> bool:
    """`rows_kernel` rounds x * g before dividing by the root mean square: too large a number for float16, at times."""
    return tile.fold_norm and (isinstance(tile, MatvecTile) or dtype != torch.float16)


def _output(x_TI: torch.Tensor, num_outputs: int, out: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    shape = (x_TI.shape[0], num_outputs)
    if out is None:
        return torch.empty(shape, dtype=dtype or x_TI.dtype, device=x_TI.device)
    assert out.shape == shape and dtype in (None, out.dtype), f"out is {out.dtype} {tuple(out.shape)}, not {shape}"
    return out


def _torch_product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    if out.dtype == x_TI.dtype:
        if bias_O is None:
            return torch.mm(x_TI, weight_OI.t(), out=out)
        return torch.addmm(bias_O, x_TI, weight_OI.t(), out=out)
    if x_TI.is_cuda:
        torch.mm(x_TI, weight_OI.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(x_TI.to(out.dtype), weight_OI.t().to(out.dtype), out=out)
    return out if bias_O is None else out.add_(bias_O)


# --- the slow twins: float64 whatever goes in -------------------------------------------------------------------------


def linear_reference(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """What `linear` computes, in float64."""
    return F.linear(x_TI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())


def linear_add_reference(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, residual_TO: torch.Tensor
) -> torch.Tensor:
    """What `linear_add` computes, in float64."""
    return residual_TO.double() + linear_reference(x_TI, weight_OI, bias_O)


def norm_linear_reference(
    x_TI: torch.Tensor,
    norm_I: torch.Tensor,
    eps: float,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `norm_linear` computes, in float64."""
    x_TI = x_TI.double()
    normed_TI = x_TI * torch.rsqrt(x_TI.square().mean(-1, keepdim=True) + eps) * norm_I.double()
    return linear_reference(normed_TI, weight_OI, bias_O)


def norm_linear_gated_reference(
    x_TI: torch.Tensor,
    norm_I: torch.Tensor,
    eps: float,
    weight_2FI: torch.Tensor,
    bias_2F: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `norm_linear_gated` computes, in float64."""
    gate_TF, up_TF = norm_linear_reference(x_TI, norm_I, eps, weight_2FI, bias_2F).chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
