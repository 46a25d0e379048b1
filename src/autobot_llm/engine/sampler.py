"""Choose the next token of each row of logits. Knows logits and sampling parameters; knows nothing of text or of the
model.

Greedy rows take the best of the adjusted logits, the lowest id among equals. The others are restricted in
transformers' order (temperature, top_k, top_p, min_p) and drawn with noise that depends on the sequence alone (see
noise.py). Tokens of equal logits are kept or dropped together, so the outcome never depends on the order in which a
sort happened to leave them.

Log probabilities are those of the model's own distribution, before any adjustment.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.executor import SamplingArrays
from autobot_llm.engine.grammar.masks import Allowed, Masks, make_masks
from autobot_llm.engine.logit_adjuster import LogitAdjuster, needs_adjustment
from autobot_llm.engine.noise import exponential_noise, exponential_noise_on_device, noise_keys
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.errors import EngineError, InvalidRequestError, LLMError

FloatArray = npt.NDArray[np.float32]
KeyArray = npt.NDArray[np.uint64]

_NUM_CANDIDATES = 64
"""How many of the best tokens are looked at first. torch's partial sort is quick up to a 64th of the vocabulary."""

_NUM_NOISES_AT_ONCE = 1 << 16  # 1 MB of arrays, so that they stay in the processor's cache

_LOWEST_TEMPERATURE = 1e-30  # float32 overflows when it divides by less; everything but the best is 0 long before


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token. `logprob` and the `top` alternatives (id, logprob), best first, where they were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """No token could be chosen for this row; other rows are not concerned."""

    error: LLMError


Outcome = SampledToken | SamplingFailure


def needs_host(params: SamplingParams) -> bool:
    """Whether a request's tokens can only be chosen here, from logits: a device samples without looking back."""
    return needs_adjustment(params) or params.num_logprobs is not None or params.grammar is not None


def is_stateless(params: SamplingParams) -> bool:
    """Whether a choice depends on logits and position alone, and not on the tokens before it."""
    return not needs_adjustment(params) and params.grammar is None


class _Row:
    """What the parameters of one sequence mean for the sampler, found out once."""

    __slots__ = ("adjuster", "is_constrained", "is_greedy", "is_plain", "is_restricted", "num_logprobs")

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        params = sequence.params
        self.adjuster = LogitAdjuster(sequence, device) if needs_adjustment(params) else None
        self.is_constrained = params.grammar is not None
        self.is_greedy = params.is_greedy
        self.is_restricted = 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
        self.num_logprobs = params.num_logprobs
        self.is_plain = self.is_greedy and not needs_host(params)


# R rows, one per sampling sequence, V vocabulary, K candidates
class Sampler:
    """Samples batches of rows. It keeps token counts for each sequence it has seen, by id: `forget` those that leave,
    and give no id twice before."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}

    def sample(
        self, logits_RV: torch.Tensor, sequences: SequenceABC[Sequence], offsets: SequenceABC[int] | None = None
    ) -> list[Outcome]:
        """Choose one token for each row. `logits_RV` is float32, row r belongs to sequences[r], and is not changed.

        Row r's token is the one after `offsets[r]` more than the sequence has (None: no more), which only sequences may
        ask for whose choice depends on nothing but logits and position: those that `is_stateless`.

        A row that the model filled with NaN or infinity, or whose request excludes every token, gets a
        SamplingFailure.
        """
        assert logits_RV.shape == (len(sequences), self.vocab_size)
        # Before anything asks for the logits: a GPU is still computing them, and the masks cost no time of their own.
        masks = make_masks(sequences)
        rows = [self._rows.get(s.id) or self._meet(s, logits_RV.device) for s in sequences]
        model_bests, tokens = _best_of_rows(logits_RV)
        if all(row.is_plain for row in rows):
            return [
                SampledToken(token) if math.isfinite(best) else broken_logits(best)
                for token, best in zip(tokens, model_bests, strict=True)
            ]
        adjusted_RV, bests = logits_RV, model_bests
        if masks or any(row.adjuster is not None for row in rows):
            adjusted_RV = _adjust(logits_RV, sequences, rows, masks)
            bests, tokens = _best_of_rows(adjusted_RV)
        positions = [len(s.token_ids) for s in sequences]
        if offsets is not None:
            positions = [position + offset for position, offset in zip(positions, offsets, strict=True)]
        failures = {
            r: broken_logits(model_best)
            if not math.isfinite(model_best)
            else _broken_adjustment(best, sequences[r], masks)
            for r, (model_best, best) in enumerate(zip(model_bests, bests, strict=True))
            if not (math.isfinite(model_best) and math.isfinite(best))
        }
        forced = {r for r, sequence in enumerate(sequences) if _is_forced(masks.get(sequence.id))}
        drawn = [r for r, row in enumerate(rows) if not row.is_greedy and r not in failures and r not in forced]
        draw_freely = draw_from_all if logits_RV.device.type == "cpu" else draw_from_all_on_device
        for is_restricted, draw in ((True, self._draw_restricted), (False, draw_freely)):
            group = [r for r in drawn if rows[r].is_restricted is is_restricted]
            if group:
                keys_R1 = _keys([(sequences[r], positions[r]) for r in group])
                drawn_tokens = draw(_take(adjusted_RV, group), [sequences[r].params for r in group], keys_R1)
                for r, token in zip(group, drawn_tokens, strict=True):
                    tokens[r] = token
        reported = self._report(logits_RV, rows, tokens)
        return [failures.get(r) or reported.get(r) or SampledToken(token) for r, token in enumerate(tokens)]

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has left."""
        self._rows.pop(sequence.id, None)

    def _meet(self, sequence: Sequence, device: torch.device) -> _Row:
        row = self._rows[sequence.id] = _Row(sequence, self.vocab_size, device)
        return row

    def _draw_restricted(
        self, logits_RV: torch.Tensor, all_params: SequenceABC[SamplingParams], keys_R1: KeyArray
    ) -> list[int]:
        """Draw among the best tokens only; look at more of them for rows where those were too few to decide.

        The device finds the candidates and the host draws among them: there are few, and a dozen small operations
        cost least there.
        """
        top_ks = [p.top_k for p in all_params if p.top_k < self.vocab_size]
        num_candidates = max([_NUM_CANDIDATES, *(top_k + 1 for top_k in top_ks)])
        tokens = [0] * len(all_params)
        pending = list(range(len(all_params)))
        while pending:
            num_candidates = min(num_candidates, self.vocab_size)
            rows_RV, params = _take(logits_RV, pending), [all_params[r] for r in pending]
            best_RK = rows_RV.topk(num_candidates)
            logits_RK, ids_RK = best_RK.values.numpy(force=True), best_RK.indices.numpy(force=True)
            weights_RK = np.exp((logits_RK - logits_RK[:, :1]) / _temperatures(params))
            kept_RK, is_open_R = self._kept(rows_RV, logits_RK, weights_RK, params)
            weights_RK *= kept_RK
            weights_RK /= exponential_noise(keys_R1[pending], ids_RK)
            for i, place in enumerate(weights_RK.argmax(-1).tolist()):
                tokens[pending[i]] = int(ids_RK[i, place])
            if num_candidates == self.vocab_size:
                break
            pending = [r for r, is_open in zip(pending, is_open_R.tolist(), strict=True) if is_open]
            num_candidates *= 16
        return tokens

    def _kept(
        self,
        logits_RV: torch.Tensor,
        logits_RK: FloatArray,
        weights_RK: FloatArray,
        params: SequenceABC[SamplingParams],
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which candidates (best first) survive top_k, top_p and min_p, and in which rows that cannot be told yet.

        Weights are relative to the best token's. A row is open while its last candidate is kept: tokens that were not
        looked at may be, too. Where top_k and top_p both restrict, already while the last one is among the top_k: its
        equals that were not looked at would belong to the mass that top_p is a share of.
        """
        num_candidates = logits_RK.shape[1]
        kept_RK = logits_RK > -np.inf
        if any(p.top_k > 0 for p in params):
            ends_R1 = np.array([[min(p.top_k or num_candidates, num_candidates) - 1] for p in params])
            kept_RK &= logits_RK >= np.take_along_axis(logits_RK, ends_R1, 1)
        has_unknown_mass_R = kept_RK[:, -1] & [0 < p.top_k < self.vocab_size and p.top_p < 1.0 for p in params]
        if any(p.top_p < 1.0 for p in params):
            mass_RK = (weights_RK * kept_RK).astype(np.float64)
            sums_RK = mass_RK.cumsum(-1)
            limits_R1 = sums_RK[:, -1:].copy()
            unlimited = [r for r, p in enumerate(params) if p.top_p < 1.0 and not 0 < p.top_k < self.vocab_size]
            if unlimited:
                limits_R1[unlimited] = _total_weights(_take(logits_RV, unlimited), [params[r] for r in unlimited])
            limits_R1 *= [[p.top_p if p.top_p < 1.0 else math.inf] for p in params]
            ends_R1 = np.maximum((sums_RK - mass_RK < limits_R1).sum(-1, keepdims=True) - 1, 0)
            kept_RK &= logits_RK >= np.take_along_axis(logits_RK, ends_R1, 1)
        if any(p.min_p > 0.0 for p in params):
            kept_RK &= weights_RK >= np.array([[p.min_p] for p in params], np.float32)
        return kept_RK, kept_RK[:, -1] | has_unknown_mass_R

    def _report(
        self, logits_RV: torch.Tensor, rows: SequenceABC[_Row], tokens: SequenceABC[int]
    ) -> dict[int, SampledToken]:
        """The tokens of the rows that asked for log probabilities, with them."""
        wanted = {r: row.num_logprobs for r, row in enumerate(rows) if row.num_logprobs is not None}
        if not wanted:
            return {}
        chosen = list(wanted)
        logprobs_RV = _take(logits_RV, chosen).log_softmax(-1)
        ids_R1 = torch.tensor([[tokens[r]] for r in chosen], device=logits_RV.device)
        logprobs = logprobs_RV.gather(1, ids_R1).flatten().tolist()
        best_RK = logprobs_RV.topk(min(max(wanted.values()), self.vocab_size))
        best_ids, best_logprobs = best_RK.indices.tolist(), best_RK.values.tolist()
        return {
            r: SampledToken(tokens[r], logprobs[i], tuple(zip(best_ids[i][:num], best_logprobs[i][:num], strict=True)))
            for i, (r, num) in enumerate(wanted.items())
        }


class SamplingArraysBuilder:
    """Describes rows to an executor that samples by itself. Rows that stay the same from step to step cost little."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._ids: list[int] = []
        self._arrays = _ALL_GREEDY

    def build(self, sequences: SequenceABC[Sequence], offsets: SequenceABC[int] | None = None) -> SamplingArrays:
        """One row for each sequence, each about to draw the token after its last one, be that known or not; with
        `offsets`, the one so many places after that. A sequence may have several rows."""
        ids = [s.id for s in sequences]
        if ids != self._ids:
            self._ids = ids
            self._arrays = self._describe(sequences)
        if not self._arrays.any_drawn:
            return _ALL_GREEDY
        positions = [len(s.token_ids) for s in sequences]
        if offsets is not None:
            positions = [position + offset for position, offset in zip(positions, offsets, strict=True)]
        keys_R1 = _keys(list(zip(sequences, positions, strict=True)))
        return dataclasses.replace(self._arrays, keys_R=keys_R1.ravel())

    def _describe(self, sequences: SequenceABC[Sequence]) -> SamplingArrays:
        params = [s.params for s in sequences]
        if all(p.is_greedy for p in params):
            return _ALL_GREEDY
        drawn = [None if p.is_greedy else p for p in params]
        top_ks = [p.top_k if p and p.top_k < self._vocab_size else 0 for p in drawn]
        top_ps = [p.top_p if p else 1.0 for p in drawn]
        min_ps = [p.min_p if p else 0.0 for p in drawn]
        return SamplingArrays(
            any_drawn=True,
            any_restricted=any(top_ks) or any(min_ps) or min(top_ps) < 1.0,
            is_drawn_R=np.array([p is not None for p in drawn]),
            temperature_R=np.array([max(p.temperature, _LOWEST_TEMPERATURE) if p else 1.0 for p in drawn], np.float32),
            top_k_R=np.array(top_ks, np.int32),
            top_p_R=np.array(top_ps, np.float32),
            min_p_R=np.array(min_ps, np.float32),
            keys_R=np.zeros(len(drawn), np.uint64),
        )


_ALL_GREEDY = SamplingArrays(
    any_drawn=False,
    any_restricted=False,
    is_drawn_R=np.zeros(0, np.bool_),
    temperature_R=np.zeros(0, np.float32),
    top_k_R=np.zeros(0, np.int32),
    top_p_R=np.zeros(0, np.float32),
    min_p_R=np.zeros(0, np.float32),
    keys_R=np.zeros(0, np.uint64),
)


def draw_from_all(logits_RV: torch.Tensor, params: SequenceABC[SamplingParams], keys_R1: KeyArray) -> list[int]:
    """Draw from the whole vocabulary, on the host."""
    ids_V = np.arange(logits_RV.shape[1])
    num_rows = max(1, _NUM_NOISES_AT_ONCE // len(ids_V))
    tokens: list[int] = []
    for start in range(0, len(params), num_rows):
        chosen = slice(start, start + num_rows)
        logits = logits_RV[chosen].numpy()
        weights_RV = logits - logits.max(-1, keepdims=True)
        weights_RV /= _temperatures(params[chosen])
        np.exp(weights_RV, out=weights_RV)
        weights_RV /= exponential_noise(keys_R1[chosen], ids_V)
        tokens += weights_RV.argmax(-1).tolist()
    return tokens


def draw_from_all_on_device(
    logits_RV: torch.Tensor, params: SequenceABC[SamplingParams], keys_R1: KeyArray
) -> list[int]:
    """The same where the logits are: a vocabulary is too much to copy."""
    device = logits_RV.device
    keys_on_device = torch.from_numpy(keys_R1.view(np.int64)).to(device)
    noise_RV = exponential_noise_on_device(keys_on_device, torch.arange(logits_RV.shape[1], device=device))
    weights_RV = _weights_on_device(logits_RV, params)
    return cast(list[int], weights_RV.div_(noise_RV).argmax(-1).tolist())


def _best_of_rows(scores_RV: torch.Tensor) -> tuple[list[float], list[int]]:
    """The best value and its lowest index in each row; a NaN anywhere in a row is its best value."""
    if scores_RV.device.type == "cpu":
        # numpy's argmax uses vector instructions and torch's does not: 1.5 against 8.5 µs for 8,192 values.
        scores = scores_RV.numpy()
        ids = scores.argmax(-1)
        return scores[np.arange(len(ids)), ids].tolist(), ids.tolist()
    best = scores_RV.max(-1)
    return best.values.tolist(), best.indices.tolist()


def _adjust(
    logits_RV: torch.Tensor, sequences: SequenceABC[Sequence], rows: SequenceABC[_Row], masks: Masks
) -> torch.Tensor:
    adjusted_RV = logits_RV.clone()
    for r, row in enumerate(rows):
        if row.adjuster is not None:
            row.adjuster.apply(adjusted_RV[r], sequences[r])
        if row.is_constrained:  # at last, so that nothing brings a token back
            _exclude(adjusted_RV[r], masks[sequences[r].id])
    return adjusted_RV


def _exclude(logits_V: torch.Tensor, allowed: Allowed | InvalidRequestError) -> None:
    """Leave the tokens that a grammar allows; none where it cannot say."""
    if isinstance(allowed, InvalidRequestError):
        logits_V.fill_(-torch.inf)
    else:
        logits_V.masked_fill_(torch.from_numpy(allowed.tokens_V).to(logits_V.device) == 0, -torch.inf)


def _is_forced(allowed: Allowed | InvalidRequestError | None) -> bool:
    """Whether a grammar leaves one token. It is taken undrawn: a noise may be infinite, and then it would not win."""
    return isinstance(allowed, Allowed) and allowed.is_forced


def _take(rows_RV: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    return rows_RV if len(chosen) == len(rows_RV) else rows_RV[chosen]


def _total_weights(logits_RV: torch.Tensor, params: SequenceABC[SamplingParams]) -> npt.NDArray[np.float64]:
    """Sums_R1 over the whole vocabulary of weights relative to the best token's."""
    weights_RV = _weights_on_device(logits_RV, params)
    return cast(npt.NDArray[np.float64], weights_RV.sum(-1, keepdim=True, dtype=torch.float64).numpy(force=True))


def _weights_on_device(logits_RV: torch.Tensor, params: SequenceABC[SamplingParams]) -> torch.Tensor:
    temperatures_R1 = torch.from_numpy(_temperatures(params)).to(logits_RV.device)
    return (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(temperatures_R1).exp_()


def _temperatures(params: SequenceABC[SamplingParams]) -> FloatArray:
    return np.array([[max(p.temperature, _LOWEST_TEMPERATURE)] for p in params], np.float32)


def _keys(places: SequenceABC[tuple[Sequence, int]]) -> KeyArray:
    return noise_keys((s.params.seed, position) for s, position in places)


def broken_logits(best: float) -> SamplingFailure:
    """What a row is whose best logit is not finite."""
    name = "NaN" if math.isnan(best) else "infinity" if best > 0 else "minus infinity for every token"
    return SamplingFailure(EngineError(f"the model's logits for this sequence hold {name}, so no token can be chosen"))


def _broken_adjustment(best: float, sequence: Sequence, masks: Masks) -> SamplingFailure:
    allowed = masks.get(sequence.id)
    if isinstance(allowed, InvalidRequestError):
        return SamplingFailure(allowed)
    if allowed is not None and best == -math.inf:
        assert sequence.matcher is not None
        field = sequence.matcher.field
        message = f"{field}: bias and minimum length exclude every token that the grammar allows"
        return SamplingFailure(InvalidRequestError(message, param=field))
    if best == -math.inf:
        message = "logit_bias and min_tokens together exclude every token of the vocabulary"
    else:
        message = f"logit_bias and penalties make a logit {best}: expected finite values"
    return SamplingFailure(InvalidRequestError(message, param="logit_bias"))
