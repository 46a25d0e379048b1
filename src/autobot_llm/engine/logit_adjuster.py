"""Change a row of logits as its request asks: bias, minimum length, penalties. Knows one sequence's tokens; knows
nothing of temperature or of drawing.

The order is fixed: logit_bias, then the stop tokens of an answer still too short, then the repetition penalty
(Keskar et al., CTRL, 2019: over prompt and answer, as in transformers), then presence and frequency penalties (over
the answer alone, as in OpenAI's API).
"""

from __future__ import annotations

import torch

from autobot_llm.engine.sequence import SamplingParams, Sequence


def needs_adjustment(params: SamplingParams) -> bool:
    """Whether a request ever changes its logits."""
    return bool(params.logit_bias) or params.min_tokens > 0 or _has_penalty(params)


# V vocabulary, U different tokens of a sequence
class LogitAdjuster:
    """The changes one sequence asks for. Its token counts grow with the sequence: a step costs what is new in it."""

    def __init__(self, sequence: Sequence, device: torch.device) -> None:
        params = sequence.params
        self._params = params
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._stop_ids = torch.tensor(sorted(params.stop_token_ids), dtype=torch.int64, device=device)
        self._counts = _TokenCounts(sequence, device) if _has_penalty(params) else None

    def apply(self, logits_V: torch.Tensor, sequence: Sequence) -> None:
        """Change one row in place."""
        params = self._params
        if params.logit_bias:
            logits_V.index_add_(0, self._bias_ids, self._biases)
        if sequence.num_output_tokens < params.min_tokens:
            logits_V.index_fill_(0, self._stop_ids, -torch.inf)
        if self._counts is None:
            return
        ids_U, counts_U = self._counts.update(sequence)
        values_U = logits_V.index_select(0, ids_U)
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            values_U = torch.where(values_U < 0, values_U * penalty, values_U / penalty)
        if params.presence_penalty != 0.0:
            values_U = values_U - params.presence_penalty * (counts_U > 0)
        if params.frequency_penalty != 0.0:
            values_U = values_U - params.frequency_penalty * counts_U
        logits_V.index_copy_(0, ids_U, values_U)


class _TokenCounts:
    """Which tokens a sequence holds, and how often each occurs in its answer."""

    def __init__(self, sequence: Sequence, device: torch.device) -> None:
        prompt_ids = list(dict.fromkeys(sequence.token_ids[: sequence.num_prompt_tokens]))
        capacity = len(prompt_ids) + sequence.params.max_tokens
        self._place_of = {token_id: place for place, token_id in enumerate(prompt_ids)}
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._ids[: len(prompt_ids)] = torch.tensor(prompt_ids, dtype=torch.int64)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._num_counted = sequence.num_prompt_tokens

    def update(self, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the tokens that are new since the last call; returns ids_U and the answer's counts_U."""
        for i in range(self._num_counted, len(sequence.token_ids)):
            token_id = sequence.token_ids[i]
            place = self._place_of.setdefault(token_id, len(self._place_of))
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_counted = len(sequence.token_ids)
        num_unique = len(self._place_of)
        return self._ids[:num_unique], self._counts[:num_unique]


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
