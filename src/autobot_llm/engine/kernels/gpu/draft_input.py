"""What an EAGLE layer reads of each token: its embedding and a feature, both normed, side by side, in one launch. Knows
tables and rows; knows nothing of the layer.

In a chain of drafts neither the token nor its feature ever leaves the device: both are rows that the pass before wrote.
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


# T packed tokens, R rows of the pass before, V the target's vocabulary, W the draft's, E hidden size
@lean
@triton.jit
def _draft_input_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, token_rows_ptr, last_tokens_ptr, target_ids_ptr, embed_ptr, features_ptr, returned_ptr,
    embed_norm_ptr, feature_norm_ptr, both_ptr, residual_ptr, eps, E,
    NORMED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < E
    embed_norm = tl.load(embed_norm_ptr + columns, inside, 0.0).to(tl.float32)
    feature_norm = tl.load(feature_norm_ptr + columns, inside, 0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    row = tl.load(token_rows_ptr + token).to(tl.int64)
    is_drafted = row >= 0
    draft_id = tl.load(last_tokens_ptr + row, mask=is_drafted, other=0)
    drafted_id = tl.load(target_ids_ptr + draft_id, mask=is_drafted, other=0)
    token_id = tl.where(is_drafted, drafted_id, tl.load(ids_ptr + token)).to(tl.int64)
    embedded = tl.load(embed_ptr + token_id * E + columns, inside, 0.0).to(tl.float32)
    given = tl.load(features_ptr + token * E + columns, inside & (row < 0), 0.0)
    returned = tl.load(returned_ptr + row * E + columns, inside & is_drafted, 0.0)
    feature = tl.where(is_drafted, returned, given).to(tl.float32)
    embedded *= tl.rsqrt(tl.sum(embedded * embedded) / E + eps) * embed_norm
    normed = feature * tl.rsqrt(tl.sum(feature * feature) / E + eps) * feature_norm
    out_dtype = both_ptr.dtype.element_ty
    tl.store(both_ptr + token * 2 * E + columns, embedded.to(out_dtype), inside)
    tl.store(both_ptr + token * 2 * E + E + columns, normed.to(out_dtype), inside)
    tl.store(residual_ptr + token * E + columns, (normed if NORMED else feature).to(out_dtype), inside)


def draft_input(
    ids_T: torch.Tensor,
    token_rows_T: torch.Tensor,
    last_tokens_R: torch.Tensor,
    target_ids_W: torch.Tensor,
    embed_VE: torch.Tensor,
    features_TE: torch.Tensor,
    returned_RE: torch.Tensor,
    embed_norm_E: torch.Tensor,
    feature_norm_E: torch.Tensor,
    eps: float,
    *,
    norm_before_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tensors both_TX (X = 2 E: the normed embedding, then the normed feature) and residual_TE.

    Token t is the target's ids[t] with features[t], or where token_rows[t] is not negative, what that row of the pass
    before gave: target_ids[last_tokens[row]] with returned[row]. The residual is the feature, normed or as it is.
    Index arrays are int32; `features_TE` and `returned_RE` may have more rows than are read.
    """
    num_tokens, width = ids_T.shape[0], embed_VE.shape[1]
    both_TX = torch.empty((num_tokens, 2 * width), dtype=embed_VE.dtype, device=embed_VE.device)
    residual_TE = torch.empty((num_tokens, width), dtype=embed_VE.dtype, device=embed_VE.device)
    assert token_rows_T.shape == (num_tokens,) and features_TE.shape[0] >= num_tokens
    assert features_TE.shape[1] == returned_RE.shape[1] == width
    for tensor in (ids_T, token_rows_T, last_tokens_R, target_ids_W, embed_VE, features_TE, returned_RE):
        assert tensor.is_contiguous()
    block = triton.next_power_of_2(width)
    if num_tokens:
        _draft_input_kernel[(num_tokens,)](
            ids_T,
            token_rows_T,
            last_tokens_R,
            target_ids_W,
            embed_VE,
            features_TE,
            returned_RE,
            embed_norm_E,
            feature_norm_E,
            both_TX,
            residual_TE,
            eps,
            width,
            NORMED=norm_before_residual,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **first_launch_options(embed_VE.device),
        )
    return both_TX, residual_TE


def draft_input_reference(
    ids_T: torch.Tensor,
    token_rows_T: torch.Tensor,
    last_tokens_R: torch.Tensor,
    target_ids_W: torch.Tensor,
    embed_VE: torch.Tensor,
    features_TE: torch.Tensor,
    returned_RE: torch.Tensor,
    embed_norm_E: torch.Tensor,
    feature_norm_E: torch.Tensor,
    eps: float,
    *,
    norm_before_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin, in float64."""
    ids_T, features_TE = ids_T.long().clone(), features_TE[: len(ids_T)].double().clone()
    is_drafted_T = token_rows_T >= 0
    rows = token_rows_T[is_drafted_T].long()
    ids_T[is_drafted_T] = target_ids_W[last_tokens_R[rows].long()].long()
    features_TE[is_drafted_T] = returned_RE[rows].double()

    def normed(x: torch.Tensor, norm_E: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_E.double()

    normed_TE = normed(features_TE, feature_norm_E)
    both_TX = torch.cat((normed(embed_VE[ids_T].double(), embed_norm_E), normed_TE), dim=-1)
    return both_TX, normed_TE if norm_before_residual else features_TE
