"""What an EAGLE layer reads of each token: its embedding and a feature, both normed, side by side, in one launch. Knows
tables and rows; knows nothing of the layer.
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


# T packed tokens, F rows of features, V the target's vocabulary, E hidden size
@lean
@triton.jit
def _draft_input_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, rows_ptr, embed_ptr, features_ptr, embed_norm_ptr, feature_norm_ptr, both_ptr, residual_ptr, eps, E,
    NORMED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < E
    embed_norm = tl.load(embed_norm_ptr + columns, inside, 0.0).to(tl.float32)
    feature_norm = tl.load(feature_norm_ptr + columns, inside, 0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    row = token
    if rows_ptr is not None:
        row = tl.load(rows_ptr + token).to(tl.int64)
    token_id = tl.load(ids_ptr + token).to(tl.int64)
    embedded = tl.load(embed_ptr + token_id * E + columns, inside, 0.0).to(tl.float32)
    feature = tl.load(features_ptr + row * E + columns, inside, 0.0).to(tl.float32)
    embedded *= tl.rsqrt(tl.sum(embedded * embedded) / E + eps) * embed_norm
    normed = feature * tl.rsqrt(tl.sum(feature * feature) / E + eps) * feature_norm
    out_dtype = both_ptr.dtype.element_ty
    tl.store(both_ptr + token * 2 * E + columns, embedded.to(out_dtype), inside)
    tl.store(both_ptr + token * 2 * E + E + columns, normed.to(out_dtype), inside)
    tl.store(residual_ptr + token * E + columns, (normed if NORMED else feature).to(out_dtype), inside)


def draft_input(
    ids_T: torch.Tensor,
    rows_T: torch.Tensor | None,
    embed_VE: torch.Tensor,
    features_FE: torch.Tensor,
    embed_norm_E: torch.Tensor,
    feature_norm_E: torch.Tensor,
    eps: float,
    *,
    norm_before_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tensors both_TX (X = 2 E: the normed embedding, then the normed feature) and residual_TE.

    Token t is ids[t] with the feature in row rows[t], or in row t where `rows_T` is None. The residual is the feature,
    normed or as it is. Index arrays are int32, and may be written by the kernel before.
    """
    num_tokens, width = ids_T.shape[0], embed_VE.shape[1]
    both_TX = torch.empty((num_tokens, 2 * width), dtype=embed_VE.dtype, device=embed_VE.device)
    residual_TE = torch.empty((num_tokens, width), dtype=embed_VE.dtype, device=embed_VE.device)
    assert features_FE.shape[1] == width and (rows_T is not None or features_FE.shape[0] >= num_tokens)
    for tensor in (ids_T, embed_VE, features_FE):
        assert tensor.is_contiguous()
    block = triton.next_power_of_2(width)
    if num_tokens:
        _draft_input_kernel[(num_tokens,)](
            ids_T,
            rows_T,
            embed_VE,
            features_FE,
            embed_norm_E,
            feature_norm_E,
            both_TX,
            residual_TE,
            eps,
            width,
            NORMED=norm_before_residual,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(embed_VE.device),
        )
    return both_TX, residual_TE


def draft_input_reference(
    ids_T: torch.Tensor,
    rows_T: torch.Tensor | None,
    embed_VE: torch.Tensor,
    features_FE: torch.Tensor,
    embed_norm_E: torch.Tensor,
    feature_norm_E: torch.Tensor,
    eps: float,
    *,
    norm_before_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin, in float64."""
    features_TE = (features_FE[: len(ids_T)] if rows_T is None else features_FE[rows_T.long()]).double()

    def normed(x: torch.Tensor, norm_E: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_E.double()

    normed_TE = normed(features_TE, feature_norm_E)
    both_TX = torch.cat((normed(embed_VE[ids_T.long()].double(), embed_norm_E), normed_TE), dim=-1)
    return both_TX, normed_TE if norm_before_residual else features_TE
