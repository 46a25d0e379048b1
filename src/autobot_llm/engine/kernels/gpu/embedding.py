"""Embedding rows of tokens, some of which only the device knows. Knows ids and a table; knows nothing of sequences.

The host plans a step while the device still computes the one before, so the newest token of a sequence is a number in
device memory that the host has not seen. `token_rows` says where: the row of that step's sampled tokens, or -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    first_launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)

_BLOCK = 2048


# T packed tokens, R sampled rows of the step before, V vocabulary, E hidden size
@lean
@triton.jit
def _embed_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, token_rows_ptr, last_tokens_ptr, embed_ptr, out_ptr, out_stride, E, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < E
    wait_for_previous_kernel(PDL)
    row = tl.load(token_rows_ptr + token)
    known_id = tl.load(ids_ptr + token)
    token_id = tl.load(last_tokens_ptr + row, mask=row >= 0, other=0)
    token_id = tl.where(row >= 0, token_id, known_id).to(tl.int64)
    vector = tl.load(embed_ptr + token_id * E + columns, inside, 0.0)
    tl.store(out_ptr + token * out_stride + columns, vector, inside)


def embed(
    ids_T: torch.Tensor,
    token_rows_T: torch.Tensor,
    last_tokens_R: torch.Tensor,
    embed_VE: torch.Tensor,
    out_TE: torch.Tensor,
) -> torch.Tensor:
    """Row t becomes embed[last_tokens[token_rows[t]]], or embed[ids[t]] where token_rows[t] is negative.

    The three index arrays are int32 (or int64), every id they lead to lies in the table. Returns `out_TE`.
    """
    num_tokens, width = out_TE.shape
    assert ids_T.shape == token_rows_T.shape == (num_tokens,) and embed_VE.shape[1] == width
    assert embed_VE.is_contiguous() and out_TE.stride(1) == 1 and embed_VE.dtype == out_TE.dtype
    assert ids_T.is_contiguous() and token_rows_T.is_contiguous() and last_tokens_R.is_contiguous()
    block = min(triton.next_power_of_2(width), _BLOCK)
    if num_tokens:
        _embed_kernel[(num_tokens, triton.cdiv(width, block))](
            ids_T,
            token_rows_T,
            last_tokens_R,
            embed_VE,
            out_TE,
            out_TE.stride(0),
            width,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 4),
            **first_launch_options(out_TE.device),
        )
    return out_TE


def embed_reference(
    ids_T: torch.Tensor, token_rows_T: torch.Tensor, last_tokens_R: torch.Tensor, embed_VE: torch.Tensor
) -> torch.Tensor:
    """The slow twin."""
    ids_T = ids_T.long().clone()
    is_pending_T = token_rows_T >= 0
    ids_T[is_pending_T] = last_tokens_R[token_rows_T[is_pending_T].long()].long()
    return embed_VE[ids_T]
