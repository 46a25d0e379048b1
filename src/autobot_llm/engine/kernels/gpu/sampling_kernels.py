"""The kernels that choose tokens where the logits are. Knows one row's logits and parameters; knows nothing of
sequences or of what the host does with a token.

What is kept is defined without an order among equals, so no row is ever sorted. A token stays if fewer than top_k
logits are above its own; of those, if the mass above its own is less than top_p of all; of those, if its weight is
at least min_p. Whether that is decided among the best hundred or so, or by bisection over all, the answer is the same.

1. best_of_chunks: the best of each chunk, and the best of each of its 128 groups.
2. best_of_rows: the best of each row, and a bar that 96 to 128 groups reach: so at least as many tokens do.
3. collect_candidates: the tokens over the bar, and the row's mass.
4. restrict_rows: draws among the candidates where the restriction drops all the others. Else a threshold.
5. draw_from_chunks, draw_from_rows: for rows that are not decided yet, and for unrestricted ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.numerics import (
    MINUS_INFINITY_ORDER,
    exponential,
    exponential_noise,
    id_of,
    order_of,
    packed,
    value_of,
)

CHUNK = tl.constexpr(4096)
GROUPS_PER_CHUNK = tl.constexpr(128)
DRAW_CHUNK = tl.constexpr(1024)
NUM_CANDIDATES = tl.constexpr(256)

_LANES = tl.constexpr(512)  # 16 bytes for each thread of four warps
_MIN_GROUPS_OVER_BAR = tl.constexpr(96)  # three eighths of the groups where there are fewer than 256
_MAX_GROUPS_OVER_BAR = tl.constexpr(128)  # and half of them
_CANDIDATES_AT_ONCE = tl.constexpr(32)
_BISECTION_BLOCK = tl.constexpr(4096)
_LOWEST_TEMPERATURE = tl.constexpr(1e-30)  # as the host's sampler
_NOTHING = tl.constexpr(-(1 << 63))  # below everything packed
_LOWEST_ORDER = tl.constexpr(-(1 << 31))


# R rows, V vocabulary, C chunks of a row, G groups of a row, N candidates of a row
@lean
@triton.jit
def best_of_chunks_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, chunk_bests_ptr, group_bests_ptr, V, WITH_GROUPS: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_chunks = tl.num_programs(0)
    tile_rows = tl.arange(0, CHUNK // _LANES)[:, None]
    ids = chunk * CHUNK + tile_rows * _LANES + tl.arange(0, _LANES)[None, :]
    wait_for_previous_kernel(PDL)
    orders = order_of(tl.load(logits_ptr + row * logits_stride + ids, ids < V, float("-inf")))
    best = tl.max(tl.max(packed(orders, ids), 0), 0)
    tl.store(chunk_bests_ptr + row * num_chunks + chunk, best)
    if WITH_GROUPS:
        group_bests = tl.max(tl.reshape(tl.max(orders, 0), (GROUPS_PER_CHUNK, _LANES // GROUPS_PER_CHUNK)), 1)
        groups = (row * num_chunks + chunk) * GROUPS_PER_CHUNK + tl.arange(0, GROUPS_PER_CHUNK)
        tl.store(group_bests_ptr + groups, group_bests)


@lean
@triton.jit
def best_of_rows_kernel(  # type: ignore[no-untyped-def]
    chunk_bests_ptr, group_bests_ptr, tokens_ptr, values_ptr, bars_ptr, num_candidates_ptr, V, C,
    CHUNKS: tl.constexpr, WITH_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    wait_for_previous_kernel(PDL)
    best = tl.max(tl.load(chunk_bests_ptr + row * C + chunks, chunks < C, _NOTHING), 0)
    tl.store(tokens_ptr + row, id_of(best, V))
    tl.store(values_ptr + row, value_of((best >> 32).to(tl.int32)))
    if WITH_GROUPS:
        groups = tl.arange(0, CHUNKS * GROUPS_PER_CHUNK)
        num_groups = C * GROUPS_PER_CHUNK
        group_bests = tl.load(group_bests_ptr + row * num_groups + groups, groups < num_groups, _LOWEST_ORDER)
        # At least the minimum of them reach the bar, and fewer reach the ceiling.
        bar = tl.full((), MINUS_INFINITY_ORDER, tl.int64)
        ceiling = (best >> 32) + 1
        minimum = tl.minimum(3 * num_groups // 8, _MIN_GROUPS_OVER_BAR)
        maximum = tl.minimum(num_groups // 2, _MAX_GROUPS_OVER_BAR)
        num_over_bar = tl.zeros((), tl.int32) + num_groups
        while (ceiling - bar > 1) & (num_over_bar > maximum):
            middle = (bar + ceiling) >> 1
            num_reaching = tl.sum((group_bests >= middle.to(tl.int32)).to(tl.int32), 0)
            if num_reaching >= minimum:
                bar = middle
                num_over_bar = num_reaching
            else:
                ceiling = middle
        tl.store(bars_ptr + row, bar.to(tl.int32))
        tl.store(num_candidates_ptr + row, 0)


@triton.jit
def _is_restricted(top_k, top_p, min_p, V):  # type: ignore[no-untyped-def]
    return ((top_k > 0) & (top_k < V)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _weights(logits, best, temperature):  # type: ignore[no-untyped-def]
    """Relative to the best token's."""
    return exponential(tl.div_rn(logits - best, tl.maximum(temperature, _LOWEST_TEMPERATURE)))


@triton.jit
def _best_draw(weights, key, ids, is_kept):  # type: ignore[no-untyped-def]
    """The packed (weight / noise, id) of the winner."""
    scores = tl.div_rn(weights, exponential_noise(key, ids.to(tl.int64)))
    return tl.max(tl.where(is_kept, packed(scores.to(tl.int32, bitcast=True), ids), _NOTHING), 0)


@lean
@triton.jit
def collect_candidates_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, values_ptr, bars_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, is_drawn_ptr,
    chunk_masses_ptr, num_candidates_ptr, candidate_logits_ptr, candidate_ids_ptr, V,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    wait_for_previous_kernel(PDL)
    is_restricted = _is_restricted(tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), V)
    if (tl.load(is_drawn_ptr + row) != 0) & is_restricted:
        logits = tl.load(logits_ptr + row * logits_stride + ids, ids < V, float("-inf"))
        weights = _weights(logits, tl.load(values_ptr + row), tl.load(temperature_ptr + row))
        weights = tl.where(ids < V, weights, 0.0)
        lane_masses = tl.sum(tl.reshape(weights, (CHUNK // _LANES, _LANES)), 0)
        tl.store(chunk_masses_ptr + row * tl.num_programs(0) + chunk, tl.sum(lane_masses.to(tl.float64), 0))
        is_candidate = ((ids < V) & (order_of(logits) >= tl.load(bars_ptr + row))).to(tl.int32)
        num_candidates = tl.sum(is_candidate, 0)
        if num_candidates > 0:
            start = tl.atomic_add(num_candidates_ptr + row, num_candidates)
            places = start + tl.cumsum(is_candidate, 0) - 1
            is_stored = (is_candidate != 0) & (places < NUM_CANDIDATES)
            tl.store(candidate_logits_ptr + row * NUM_CANDIDATES + places, logits, is_stored)
            tl.store(candidate_ids_ptr + row * NUM_CANDIDATES + places, ids, is_stored)


@triton.jit
def _draw_among_candidates(  # type: ignore[no-untyped-def]
    logits_ptr, ids_ptr, num_candidates, best, total_mass, temperature, top_k, top_p, min_p, key, V
):
    """The winner's id, and whether it is certain that no other token of the row is kept.

    `top_k` is V and `top_p` is infinite where they restrict nothing. Every token that is no candidate is below them.
    """
    places = tl.arange(0, NUM_CANDIDATES)
    is_candidate = places < num_candidates
    logits = tl.load(logits_ptr + places, is_candidate, float("-inf"))
    ids = tl.load(ids_ptr + places, is_candidate, 0)
    weights = tl.where(is_candidate, _weights(logits, best, temperature), 0.0)

    num_above = tl.zeros((NUM_CANDIDATES,), tl.int32)
    if top_k < V:
        for start in range(0, NUM_CANDIDATES, _CANDIDATES_AT_ONCE):
            others = start + tl.arange(0, _CANDIDATES_AT_ONCE)
            other_logits = tl.load(logits_ptr + others, others < num_candidates, float("-inf"))
            num_above += tl.sum((other_logits[None, :] > logits[:, None]).to(tl.int32), 1)
    is_kept = is_candidate & (num_above < top_k)
    lowest_kept = tl.min(tl.where(is_kept, logits, float("inf")), 0)
    has_enough = (num_candidates >= top_k) | (num_candidates == V)  # or there are no more tokens
    is_final = has_enough | (tl.min(tl.where(is_candidate, weights, 1.0), 0) < min_p)
    if top_p < float("inf"):
        kept_mass = tl.sum(tl.where(is_kept, weights, 0.0).to(tl.float64), 0)
        limit = tl.where(top_k < V, kept_mass, total_mass) * top_p
        mass_above = tl.zeros((NUM_CANDIDATES,), tl.float64)
        for start in range(0, NUM_CANDIDATES, _CANDIDATES_AT_ONCE):
            others = start + tl.arange(0, _CANDIDATES_AT_ONCE)
            other_logits = tl.load(logits_ptr + others, others < num_candidates, float("-inf"))
            counts = (others < num_candidates) & (other_logits >= lowest_kept)
            other_weights = tl.where(counts, _weights(other_logits, best, temperature), 0.0).to(tl.float64)
            is_above = other_logits[None, :] > logits[:, None]
            mass_above += tl.sum(tl.where(is_above, other_weights[None, :], 0.0), 1)
        is_kept &= (mass_above < limit) | (logits == best)
        is_final |= kept_mass >= limit
        is_final &= (top_k >= V) | has_enough  # else the mass that top_p is a share of is not known
    is_kept &= weights >= min_p
    return id_of(_best_draw(weights, key, ids, is_kept), V), is_final


@triton.jit
def _amounts_over(  # type: ignore[no-untyped-def]
    logits_ptr, V, threshold_1, threshold_2, threshold_3, best, temperature, BY_MASS: tl.constexpr
):
    """What of a row is at or over each of three thresholds: the mass of tokens, or their number."""
    columns = tl.arange(0, _BISECTION_BLOCK)
    over_1 = tl.zeros((_BISECTION_BLOCK,), tl.float32)
    over_2 = tl.zeros((_BISECTION_BLOCK,), tl.float32)
    over_3 = tl.zeros((_BISECTION_BLOCK,), tl.float32)
    for start in range(0, V, _BISECTION_BLOCK):
        ids = start + columns
        logits = tl.load(logits_ptr + ids, ids < V, float("-inf"))
        orders = tl.where(ids < V, order_of(logits), _LOWEST_ORDER)
        amounts = _weights(logits, best, temperature) if BY_MASS else 1.0
        over_1 += tl.where(orders >= threshold_1, amounts, 0.0)
        over_2 += tl.where(orders >= threshold_2, amounts, 0.0)
        over_3 += tl.where(orders >= threshold_3, amounts, 0.0)
    # A lane adds few numbers, so float32 is enough for it; the sum of all lanes wants more.
    return tl.sum(over_1.to(tl.float64), 0), tl.sum(over_2.to(tl.float64), 0), tl.sum(over_3.to(tl.float64), 0)


@triton.jit
def _bisect(  # type: ignore[no-untyped-def]
    logits_ptr, V, floor, ceiling, limit, best, temperature, BY_MASS: tl.constexpr
):
    """The lowest order whose tokens are kept: what lies above it is less than the limit.

    The amount at or over `floor` reaches the limit, that at or over `ceiling` (the highest order + 1) does not.
    Two bits are found in each pass over the row.
    """
    while ceiling - floor > 1:
        gap = ceiling - floor
        first, second, third = floor + (gap >> 2), floor + (gap >> 1), floor + ((3 * gap) >> 2)
        over_first, over_second, over_third = _amounts_over(
            logits_ptr, V, first.to(tl.int32), second.to(tl.int32), third.to(tl.int32), best, temperature, BY_MASS
        )
        under_third = tl.where(over_third < limit, third, ceiling)
        under_second = tl.where(over_second < limit, second, under_third)
        reaching_first = tl.where(over_first < limit, floor, first)
        reaching_second = tl.where(over_second < limit, reaching_first, second)
        floor = tl.where(over_third < limit, reaching_second, third)  # a NaN ends the search, too
        ceiling = tl.where(over_first < limit, first, under_second)
    return floor.to(tl.int32)


@triton.jit
def _threshold(logits_ptr, V, best, total_mass, temperature, top_k, top_p):  # type: ignore[no-untyped-def]
    """The lowest order that top_k and top_p keep; `top_k` is V and `top_p` infinite where they restrict nothing."""
    lowest = tl.full((), MINUS_INFINITY_ORDER, tl.int32)
    ceiling = order_of(best).to(tl.int64) + 1
    if top_k < V:
        limit = top_k.to(tl.float64)
        lowest = _bisect(logits_ptr, V, lowest.to(tl.int64), ceiling, limit, best, temperature, False)
        total_mass, _, _ = _amounts_over(logits_ptr, V, lowest, lowest, lowest, best, temperature, True)
    if top_p < float("inf"):
        # V tokens of less than a V-th of the mass to drop are less than that together, so the search can start there.
        droppable = ((1.0 - top_p) * total_mass / V).to(tl.float32)
        safe = order_of(best + tl.maximum(temperature, _LOWEST_TEMPERATURE) * (tl.log(droppable) - 0.01))
        floor = tl.maximum(safe, lowest).to(tl.int64)
        limit = total_mass * top_p
        lowest = _bisect(logits_ptr, V, floor, ceiling, limit, best, temperature, True)
    return lowest


@lean
@triton.jit
def restrict_rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, values_ptr, chunk_masses_ptr, num_candidates_ptr, candidate_logits_ptr,
    candidate_ids_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, keys_ptr, is_drawn_ptr,
    tokens_ptr, is_pending_ptr, thresholds_ptr, V, C, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    wait_for_previous_kernel(PDL)
    is_pending = tl.load(is_drawn_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    threshold = tl.full((), _LOWEST_ORDER, tl.int32)
    if (is_pending != 0) & _is_restricted(top_k, top_p, min_p, V):
        best, temperature = tl.load(values_ptr + row), tl.load(temperature_ptr + row)
        top_k = tl.where((top_k > 0) & (top_k < V), top_k, V)
        share = tl.where(top_p < 1.0, top_p, float("inf")).to(tl.float64)
        total_mass = tl.sum(tl.load(chunk_masses_ptr + row * C + chunks, chunks < C, 0.0), 0)
        num_candidates = tl.load(num_candidates_ptr + row)
        if num_candidates <= NUM_CANDIDATES:
            token, is_final = _draw_among_candidates(
                candidate_logits_ptr + row * NUM_CANDIDATES, candidate_ids_ptr + row * NUM_CANDIDATES, num_candidates,
                best, total_mass, temperature, top_k, share, min_p, tl.load(keys_ptr + row), V,
            )  # fmt: skip
            tl.store(tokens_ptr + row, token, is_final)
            is_pending = tl.where(is_final, 0, is_pending)
        if is_pending != 0:
            threshold = _threshold(logits_ptr + row * logits_stride, V, best, total_mass, temperature, top_k, share)
    tl.store(is_pending_ptr + row, is_pending)
    tl.store(thresholds_ptr + row, threshold)


@lean
@triton.jit
def draw_from_chunks_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, values_ptr, temperature_ptr, min_p_ptr, keys_ptr, is_pending_ptr, thresholds_ptr,
    chunk_draws_ptr, V, RESTRICTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = chunk * DRAW_CHUNK + tl.arange(0, DRAW_CHUNK)
    wait_for_previous_kernel(PDL)
    if tl.load(is_pending_ptr + row) != 0:
        logits = tl.load(logits_ptr + row * logits_stride + ids, ids < V, float("-inf"))
        weights = _weights(logits, tl.load(values_ptr + row), tl.load(temperature_ptr + row))
        is_kept = ids < V
        if RESTRICTED:
            is_kept &= order_of(logits) >= tl.load(thresholds_ptr + row)
            is_kept &= weights >= tl.load(min_p_ptr + row)
        best = _best_draw(weights, tl.load(keys_ptr + row), ids, is_kept)
        tl.store(chunk_draws_ptr + row * tl.num_programs(0) + chunk, best)


@lean
@triton.jit
def draw_from_rows_kernel(  # type: ignore[no-untyped-def]
    chunk_draws_ptr, is_pending_ptr, tokens_ptr, V, C, CHUNKS: tl.constexpr, PDL: tl.constexpr
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    wait_for_previous_kernel(PDL)
    if tl.load(is_pending_ptr + row) != 0:
        best = tl.max(tl.load(chunk_draws_ptr + row * C + chunks, chunks < C, _NOTHING), 0)
        tl.store(tokens_ptr + row, id_of(best, V))
