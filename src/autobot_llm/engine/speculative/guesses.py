"""Rank guesses at what a target will choose, from the logits of who guesses. Knows logits, sampling parameters and
noise; knows nothing of who guesses.

A target that draws takes argmax of weight / noise, with noise that belongs to (seed, position, token): see
acceptance.py. A guess is best ranked in the same way, with the same noise and the request's temperature and limits.
Whatever is ranked how, the answer stays the same; so a few of the likeliest tokens are looked at, and penalties, bias
and grammars are left to the target.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.noise import exponential_noise, noise_keys
from autobot_llm.engine.sequence import SamplingParams

NUM_CANDIDATES = 64
"""The tokens of a row that are looked at where one is drawn."""

_NEVER = np.float32(-1e30)


class Ranked(NamedTuple):
    """The target's ids_RN, best guess first, and the logarithms of the chances that they are right, in float32: what
    the guesser takes them for, given the noise where they are drawn."""

    ids_RN: npt.NDArray[np.int64]
    log_chances_RN: npt.NDArray[np.float32]


# R rows, V the guesser's vocabulary, N ranks, C candidates
def rank_guesses(
    logits_RV: torch.Tensor,
    params: SequenceABC[SamplingParams],
    positions: SequenceABC[int],
    num_ranks: int,
    *,
    ids_V: npt.NDArray[np.int64] | None = None,
) -> Ranked:
    """The best guesses. Row r is for a request with params[r], at the index positions[r] of its sequence. `ids_V` are
    the target's ids of the guesser's tokens; None: they are the same."""
    logits_RV = logits_RV.float()
    best = logits_RV.topk(min(num_candidates(params, num_ranks), logits_RV.shape[1]), dim=-1)
    ids_RC: npt.NDArray[np.int64] = best.indices.cpu().numpy()
    if ids_V is not None:
        ids_RC = ids_V[ids_RC]
    scores_RC = best.values.cpu().numpy()
    log_chances_RC = (best.values - logits_RV.logsumexp(dim=-1, keepdim=True)).cpu().numpy()
    for r, each in enumerate(params):
        if not each.is_greedy:
            drawn_C = _drawn(scores_RC[r], ids_RC[r], each, positions[r])
            order_C = np.argsort(-drawn_C, kind="stable")
            drawn_C = drawn_C[order_C] - drawn_C[order_C[0]]
            ids_RC[r], log_chances_RC[r] = ids_RC[r][order_C], drawn_C - np.log(np.exp(drawn_C).sum())
    return Ranked(ids_RC[:, :num_ranks], log_chances_RC[:, :num_ranks])


def num_candidates(params: SequenceABC[SamplingParams], num_ranks: int) -> int:
    """C: the best tokens of a row that are looked at."""
    return num_ranks if all(each.is_greedy for each in params) else max(num_ranks, NUM_CANDIDATES)


def rank_candidates(
    ids_RC: npt.NDArray[np.int64],
    scores_RC: npt.NDArray[np.float32],
    params: SequenceABC[SamplingParams],
    positions: SequenceABC[int],
    num_ranks: int,
) -> npt.NDArray[np.int64]:
    """The ids_RN of `rank_guesses` from the best tokens of each row and their logits, the best first."""
    is_drawn = [not each.is_greedy for each in params]
    if not any(is_drawn):
        return ids_RC[:, :num_ranks]
    order_RC = np.tile(np.arange(ids_RC.shape[1]), (len(params), 1))
    for r, each in enumerate(params):
        if is_drawn[r]:
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
