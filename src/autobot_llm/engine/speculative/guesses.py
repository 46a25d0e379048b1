"""Rank guesses at what a target will choose, from the logits of who guesses. Knows logits, sampling parameters and
noise; knows nothing of who guesses.

A target that draws takes argmax of weight / noise, with noise that belongs to (seed, position, token): see
acceptance.py. A guess is best ranked in the same way, with the same noise and the request's temperature and limits.
Whatever is ranked how, the answer stays the same; so a few of the likeliest tokens are looked at, and penalties, bias
and grammars are left to the target.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.noise import exponential_noise, noise_keys
from autobot_llm.engine.sequence import SamplingParams

NUM_CANDIDATES = 64
"""The tokens of a row that are looked at where one is drawn."""

_NEVER = np.float32(-1e30)


# R rows, V the guesser's vocabulary, N ranks, C candidates
def rank_guesses(
    logits_RV: torch.Tensor,
    params: SequenceABC[SamplingParams],
    positions: SequenceABC[int],
    num_ranks: int,
    *,
    ids_V: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """The target's ids_RN, best guess first. Row r is for a request with params[r], at the index positions[r] of its
    sequence. `ids_V` are the target's ids of the guesser's tokens; None: they are the same."""
    is_greedy = [each.is_greedy for each in params]
    num_best = num_ranks if all(is_greedy) else max(num_ranks, NUM_CANDIDATES)
    num_best = min(num_best, logits_RV.shape[1])
    best = logits_RV.topk(num_best, dim=-1)
    ids_RC: npt.NDArray[np.int64] = best.indices.cpu().numpy()
    if ids_V is not None:
        ids_RC = ids_V[ids_RC]
    if all(is_greedy):
        return ids_RC
    scores_RC = best.values.float().cpu().numpy()
    order_RC = np.tile(np.arange(num_best), (len(params), 1))
    for r, each in enumerate(params):
        if not each.is_greedy:
            order_RC[r] = np.argsort(-_drawn(scores_RC[r], ids_RC[r], each, positions[r]), kind="stable")
    ranked: npt.NDArray[np.int64] = np.take_along_axis(ids_RC, order_RC[:, :num_ranks], axis=1)
    return ranked


def _drawn(
    logits_C: npt.NDArray[np.float32], ids_C: npt.NDArray[np.int64], params: SamplingParams, position: int
) -> npt.NDArray[np.float32]:
    """What the target maximizes, as far as the candidates tell: log weight - log noise; last those that it excludes."""
    logits_C = (logits_C - logits_C[0]) / np.float32(max(params.temperature, 1e-6))
    noise_C = exponential_noise(noise_keys([(params.seed, position)]), ids_C[None])[0]
    weights_C = np.exp(logits_C)
    shares_C = weights_C / weights_C.sum()
    is_out_C = (np.cumsum(shares_C) - shares_C >= params.top_p) | (weights_C < params.min_p)
    if params.top_k:
        is_out_C |= np.arange(len(ids_C)) >= params.top_k
    is_out_C[0] = False
    scores_C: npt.NDArray[np.float32] = np.where(is_out_C, _NEVER + logits_C, logits_C - np.log(noise_C))
    return scores_C
