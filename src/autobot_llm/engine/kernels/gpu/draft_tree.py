"""A draft tree that grows where the logits are, level by level, without a word to the host. Knows logits, nodes and
their chances; knows nothing of the network that gives the logits.

The rule is that of speculative/eagle/growth.py, which is the slow twin, with chances as of speculative/guesses.py: the
best tokens after each node of the frontier are nodes; the most probable of a level are the next frontier; of all nodes
the most probable are the tree. Ties fall as there: to what was found first.

1. best_of_chunks: the best tokens of each chunk of a row, and the chunk's mass.
2. grow: the best tokens of each row as nodes, and of them the next frontier: its tokens, whose features it continues,
   what it sees.
3. choose: the best of all nodes, numbered among themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.numerics import exponential_noise, id_of, order_of, packed, value_of

CHOICE_FIELDS = 3
"""Of each chosen node: its token, its parent's number or -1, and the bits of its logarithmic chance in float32."""

_CHUNK = tl.constexpr(1024)
_NOTHING = tl.constexpr(-(1 << 63))  # below everything packed
_AT_ONCE = tl.constexpr(32)
_DRAWN_FROM = tl.constexpr(32)  # the likeliest tokens of a row that are looked at where one is drawn
_NEVER = tl.constexpr(-1e30)


# S sequences, B branches, R rows of a sequence (1 or B), W the draft's vocabulary, C candidates of a row, N nodes
@lean
@triton.jit
def _best_of_chunks_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bests_ptr, masses_ptr, W, B: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + chunk
    ids = chunk * _CHUNK + tl.arange(0, _CHUNK)
    wait_for_previous_kernel(PDL)
    logits = tl.load(logits_ptr + row * W + ids, ids < W, float("-inf"))
    tl.store(masses_ptr + place, tl.sum(tl.exp(logits - tl.max(logits, 0)), 0))
    values = packed(order_of(logits), ids)
    for rank in tl.static_range(B):
        best = tl.max(values, 0)
        tl.store(bests_ptr + place * B + rank, best)
        values = tl.where(values == best, _NOTHING, values)


@triton.jit
def _best_of_drawn(  # type: ignore[no-untyped-def]
    candidates, target_ids_ptr, key, temperature, top_k, top_p, min_p, W, R: tl.constexpr, B: tl.constexpr
):
    """Ids and chances [R, B] where the target draws: what it will take is weight / noise at its largest, with noise
    that belongs to its token, so that is what guesses are ranked by, among the likeliest that it may take."""
    places_K = tl.arange(0, _DRAWN_FROM)[None, :]
    scale = 1.0 / tl.maximum(temperature, 1e-6)
    high_R = value_of((tl.max(candidates, 1) >> 32).to(tl.int32))
    logits = tl.where(candidates == _NOTHING, float("-inf"), value_of((candidates >> 32).to(tl.int32)))
    mass_R = tl.sum(tl.exp((logits - high_R[:, None]) * scale), 1)
    before_R = tl.zeros((R,), tl.float32)
    ids_RK = tl.zeros((R, _DRAWN_FROM), tl.int32)
    scores_RK = tl.full((R, _DRAWN_FROM), _NEVER, tl.float32)
    for i in tl.range(0, _DRAWN_FROM):
        best_R = tl.max(candidates, 1)
        candidates = tl.where(candidates == best_R[:, None], _NOTHING, candidates)
        id_R = id_of(best_R, W)
        logit_R = (value_of((best_R >> 32).to(tl.int32)) - high_R) * scale
        weight_R = tl.exp(logit_R)
        is_out_R = (before_R >= top_p * mass_R) | (weight_R < min_p) | ((top_k > 0) & (i >= top_k))
        is_out_R = (is_out_R & (i > 0)) | (best_R == _NOTHING)
        before_R += weight_R
        noise_R = exponential_noise(key, tl.load(target_ids_ptr + id_R).to(tl.int64))
        score_R = tl.where(is_out_R, _NEVER, logit_R - tl.log(noise_R))
        ids_RK = tl.where(places_K == i, id_R[:, None], ids_RK)
        scores_RK = tl.where(places_K == i, score_R[:, None], scores_RK)
    best_score_R = tl.max(scores_RK, 1)
    log_mass_R = best_score_R + tl.log(tl.sum(tl.exp(scores_RK - best_score_R[:, None]), 1))
    ranks_B = tl.arange(0, B)[None, :]
    ids_RB = tl.zeros((R, B), tl.int32)
    chances_RB = tl.zeros((R, B), tl.float32)
    values_RK = packed(order_of(scores_RK), places_K + ids_RK * 0)
    for rank in tl.static_range(B):
        best_R = tl.max(values_RK, 1)
        is_best_RK = values_RK == best_R[:, None]
        values_RK = tl.where(is_best_RK, _NOTHING, values_RK)
        id_R = tl.sum(tl.where(is_best_RK, ids_RK, 0), 1)
        chance_R = value_of((best_R >> 32).to(tl.int32)) - log_mass_R
        ids_RB = tl.where(ranks_B == rank, id_R[:, None], ids_RB)
        chances_RB = tl.where(ranks_B == rank, chance_R[:, None], chances_RB)
    return ids_RB, chances_RB


@lean
@triton.jit(do_not_specialize=["level"])
def _grow_kernel(  # type: ignore[no-untyped-def]
    bests_ptr, masses_ptr, target_ids_ptr, before_ptr, before_nodes_ptr, before_masks_ptr,
    chances_ptr, nodes_ptr, masks_ptr, ids_ptr, rows_ptr, tree_rows_ptr,
    all_tokens_ptr, all_chances_ptr, all_parents_ptr,
    is_drawn_ptr, keys_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, level, num_chunks, W, N,
    MAX_DEPTH: tl.constexpr, CHUNKS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    sequence = tl.program_id(0)
    rows_R = sequence * R + tl.arange(0, R)
    ranks_B = tl.arange(0, B)
    c = tl.arange(0, CHUNKS * B)
    chunks = tl.arange(0, CHUNKS)
    wait_for_previous_kernel(PDL)

    # the logarithm of each row's mass
    is_chunk = (chunks < num_chunks)[None, :]
    places = rows_R[:, None] * num_chunks + chunks[None, :]
    chunk_highs = tl.load(bests_ptr + places * B, is_chunk, _NOTHING)
    highs = tl.where(is_chunk, value_of((chunk_highs >> 32).to(tl.int32)), float("-inf"))
    high_R = tl.max(highs, 1)
    masses = tl.load(masses_ptr + places, is_chunk, 0.0)
    log_mass_R = high_R + tl.log(tl.sum(masses * tl.exp(highs - high_R[:, None]), 1))

    # the best tokens of each row
    is_candidate = (c < num_chunks * B)[None, :]
    candidates = tl.load(bests_ptr + rows_R[:, None] * (num_chunks * B) + c[None, :], is_candidate, _NOTHING)
    if tl.load(is_drawn_ptr + sequence) != 0:
        ids_RB, chances_RB = _best_of_drawn(
            candidates, target_ids_ptr, tl.load(keys_ptr + sequence * MAX_DEPTH + level),
            tl.load(temperature_ptr + sequence), tl.load(top_k_ptr + sequence), tl.load(top_p_ptr + sequence),
            tl.load(min_p_ptr + sequence), W, R, B,
        )  # fmt: skip
    else:
        bests_RB = tl.full((R, B), _NOTHING, tl.int64)
        for rank in tl.static_range(B):
            best_R = tl.max(candidates, 1)
            bests_RB = tl.where((ranks_B == rank)[None, :], best_R[:, None], bests_RB)
            candidates = tl.where(candidates == best_R[:, None], _NOTHING, candidates)
        ids_RB = id_of(bests_RB, W)
        chances_RB = value_of((bests_RB >> 32).to(tl.int32)) - log_mass_R[:, None]
    tokens_RB = tl.load(target_ids_ptr + ids_RB)
    r = tl.arange(0, R)
    first_node = 0
    parents_R = tl.full((R,), -1, tl.int32)
    if R > 1:
        first_node = B + (level - 1) * B * B
        parents_R = tl.load(before_nodes_ptr + rows_R)
        chances_RB += tl.load(before_ptr + rows_R)[:, None]
    places_RB = r[:, None] * B + ranks_B[None, :]
    nodes_RB = sequence.to(tl.int64) * N + first_node + places_RB
    tl.store(all_tokens_ptr + nodes_RB, tokens_RB)
    tl.store(all_chances_ptr + nodes_RB, chances_RB)
    tl.store(all_parents_ptr + nodes_RB, tl.broadcast_to(parents_R[:, None], (R, B)))

    if ids_ptr is not None:  # the most probable of them are looked at next
        level_values = tl.reshape(packed(order_of(chances_RB), places_RB), (R * B,))
        chosen_B = tl.full((B,), _NOTHING, tl.int64)
        for rank in tl.static_range(B):
            best = tl.max(level_values, 0)
            chosen_B = tl.where(ranks_B == rank, best, chosen_B)
            level_values = tl.where(level_values == best, _NOTHING, level_values)
        place_B = id_of(chosen_B, R * B)
        is_chosen = place_B[:, None] == tl.arange(0, R * B)[None, :]
        token_B = tl.sum(tl.where(is_chosen, tl.reshape(tokens_RB, (R * B,))[None, :], 0), 1)
        row_B = sequence * R + place_B // B
        mask_B = (ranks_B * 0 + 1).to(tl.int64) << (level * B + ranks_B).to(tl.int64)
        if R > 1:
            mask_B |= tl.load(before_masks_ptr + row_B)
        slots_B = sequence * B + ranks_B
        tl.store(chances_ptr + slots_B, value_of((chosen_B >> 32).to(tl.int32)))
        tl.store(nodes_ptr + slots_B, first_node + place_B)
        tl.store(masks_ptr + slots_B, mask_B)
        tl.store(ids_ptr + slots_B, token_B)
        tl.store(rows_ptr + slots_B, row_B)
        tl.store(tree_rows_ptr + slots_B * 4, mask_B.to(tl.int32))
        tl.store(tree_rows_ptr + slots_B * 4 + 1, (mask_B >> 32).to(tl.int32))


@lean
@triton.jit(do_not_specialize=["num_nodes", "N"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr, chances_ptr, parents_ptr, numbers_ptr, num_chosen_ptr, out_ptr, num_nodes, N, out_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    is_node = n < num_nodes
    first = sequence * N
    wait_for_previous_kernel(PDL)
    num_chosen = tl.load(num_chosen_ptr)
    chances = tl.load(chances_ptr + first + n, is_node, float("-inf"))
    values = packed(order_of(chances), n)
    num_better = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, num_nodes, _AT_ONCE):
        others = start + tl.arange(0, _AT_ONCE)
        other_chances = tl.load(chances_ptr + first + others, others < num_nodes, float("-inf"))
        is_better = packed(order_of(other_chances), others)[None, :] > values[:, None]
        num_better += tl.sum((is_better & (others < num_nodes)[None, :]).to(tl.int32), 1)
    is_chosen = is_node & (num_better < num_chosen)
    number = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(numbers_ptr + first + n, number, is_node)
    tl.debug_barrier()  # every thread's numbers are there before any looks up a parent's
    parents = tl.load(parents_ptr + first + n, is_node, -1)
    parent_numbers = tl.load(numbers_ptr + first + parents, is_chosen & (parents >= 0), -1)
    out_ptrs = out_ptr + sequence * out_stride + number * 3
    tl.store(out_ptrs, tl.load(tokens_ptr + first + n, is_node), is_chosen)
    tl.store(out_ptrs + 1, parent_numbers, is_chosen)
    tl.store(out_ptrs + 2, chances.to(tl.int32, bitcast=True), is_chosen)


@dataclass(frozen=True, slots=True)
class Frontier:
    """What a pass over the next level reads, for each of S * B tokens: its target's id and the row that the feature it
    continues lies in, and where its mask goes (TREE_FIELDS; the other fields are the caller's)."""

    ids_M: torch.Tensor
    rows_M: torch.Tensor
    tree_rows_M4: torch.Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """How the target chooses after each sequence: as SamplingTensors, with the noise key of each level. Where nothing
    is drawn (`is_drawn_S` 0, int32), the rest is not looked at."""

    is_drawn_S: torch.Tensor
    keys_SD: torch.Tensor
    temperature_S: torch.Tensor
    top_k_S: torch.Tensor
    top_p_S: torch.Tensor
    min_p_S: torch.Tensor


class TreeGrower:
    """Trees of up to `max_sequences` at once, `num_branches` (a power of two) wide and at most `max_depth` deep, in
    buffers of its own. `target_ids_W`: the target's id of each of the draft's tokens, int32.

    For each level one `grow`, the first with a row of logits for each sequence, the others with one for each token of
    the frontier that the one before has made; then `choose`. Allocates nothing: it may be captured.
    """

    def __init__(self, target_ids_W: torch.Tensor, *, max_sequences: int, num_branches: int, max_depth: int) -> None:
        assert num_branches == triton.next_power_of_2(num_branches) and len(target_ids_W) >= num_branches
        assert num_branches * (max_depth - 1) <= 64, "a mask has 64 bits"
        self.num_branches = num_branches
        self.max_depth = max_depth
        self._target_ids_W = target_ids_W
        self._options = launch_options(target_ids_W.device)
        self._num_chunks = triton.cdiv(len(target_ids_W), _CHUNK.value)
        num_rows = max_sequences * num_branches

        def buffer(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=target_ids_W.device)

        self._bests = buffer(torch.int64, num_rows, self._num_chunks * num_branches)
        self._masses = buffer(torch.float32, num_rows, self._num_chunks)
        # by level: what is read is never what is written
        self._frontier_chances = buffer(torch.float32, max_depth, num_rows)
        self._frontier_nodes = buffer(torch.int32, max_depth, num_rows)
        self._frontier_masks = buffer(torch.int64, max_depth, num_rows)
        self._ids = buffer(torch.int32, max_depth, num_rows)
        self._rows = buffer(torch.int32, max_depth, num_rows)
        self._tokens = buffer(torch.int32, max_sequences, self.num_nodes(max_depth))
        self._chances = buffer(torch.float32, max_sequences, self.num_nodes(max_depth))
        self._parents = buffer(torch.int32, max_sequences, self.num_nodes(max_depth))
        self._numbers = buffer(torch.int32, max_sequences, self.num_nodes(max_depth))

    def num_nodes(self, depth: int) -> int:
        """That are found in so many levels, the root aside."""
        return self.num_branches + (depth - 1) * self.num_branches**2

    def grow(
        self, level: int, logits_RW: torch.Tensor, draws: Draws, tree_rows_M4: torch.Tensor | None
    ) -> Frontier | None:
        """Take in the logits of a level, counted from 0; with `tree_rows_M4` there is a next one. The float32 rows are
        contiguous; sequence s has row s at first, then rows from s * B on."""
        branches = self.num_branches
        num_rows_each = 1 if level == 0 else branches
        num_rows = logits_RW.shape[0]
        assert logits_RW.is_contiguous() and logits_RW.shape[1] == len(self._target_ids_W)
        _best_of_chunks_kernel[(self._num_chunks, num_rows)](
            logits_RW,
            self._bests,
            self._masses,
            logits_RW.shape[1],
            B=branches,
            num_warps=2,
            **self._options,
        )
        has_next, before = tree_rows_M4 is not None, max(level - 1, 0)
        _grow_kernel[(num_rows // num_rows_each,)](
            self._bests,
            self._masses,
            self._target_ids_W,
            self._frontier_chances[before],
            self._frontier_nodes[before],
            self._frontier_masks[before],
            self._frontier_chances[level],
            self._frontier_nodes[level],
            self._frontier_masks[level],
            self._ids[level] if has_next else None,
            self._rows[level],
            tree_rows_M4,
            self._tokens,
            self._chances,
            self._parents,
            draws.is_drawn_S,
            draws.keys_SD,
            draws.temperature_S,
            draws.top_k_S,
            draws.top_p_S,
            draws.min_p_S,
            level,
            self._num_chunks,
            logits_RW.shape[1],
            self._tokens.shape[1],
            MAX_DEPTH=draws.keys_SD.shape[1],
            CHUNKS=triton.next_power_of_2(self._num_chunks),
            R=num_rows_each,
            B=branches,
            num_warps=4,
            **self._options,
        )
        if tree_rows_M4 is None:
            return None
        num_next = num_rows // num_rows_each * branches
        return Frontier(self._ids[level, :num_next], self._rows[level, :num_next], tree_rows_M4)

    def choose(self, depth: int, num_chosen: torch.Tensor, out_SN3: torch.Tensor) -> None:
        """Write CHOICE_FIELDS of the best nodes of so many levels, `num_chosen` (one int32) of each sequence or all
        that there are, parents before their children and the most probable path first. `out_SN3` (int32) may be
        page-locked memory."""
        num_nodes = self.num_nodes(depth)
        _choose_kernel[(out_SN3.shape[0],)](
            self._tokens,
            self._chances,
            self._parents,
            self._numbers,
            num_chosen,
            out_SN3,
            num_nodes,
            self._tokens.shape[1],
            out_SN3.stride(0),
            BLOCK=triton.next_power_of_2(num_nodes),
            num_warps=8,
            **self._options,
        )
