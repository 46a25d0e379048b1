"""Speculation as a part of its own, for programs that run their model themselves: drafts for given token ids, and the
bookkeeping of what became of them. The engine uses the parts directly (speculator.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobot_llm.engine.load import load_draft_model
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.measurements import ENOUGH, HISTORY
from autobot_llm.engine.speculative.ngram import LOOKUP_MAX, NgramProposer
from autobot_llm.engine.speculative.pairs import find_draft
from autobot_llm.errors import ConfigurationError, InvalidRequestError, ModelLoadError


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How `SpeculativeDecoder` drafts. `draft_model` is a folder; None takes the one recommended for the main model,
    where it lies beside it. Below `min_acceptance_rate`, measured over the last 100 drafts once there are 20, it stops,
    and tries again after as many calls as it remembers drafts."""

    draft_model: str | None = None
    num_speculative_tokens: int = 5
    use_ngram: bool = False
    ngram_prompt_lookup_max: int = LOOKUP_MAX
    min_acceptance_rate: float = 0.6
    draft_tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name, value in (
            ("num_speculative_tokens", self.num_speculative_tokens),
            ("ngram_prompt_lookup_max", self.ngram_prompt_lookup_max),
        ):
            if not 1 <= value <= 64:
                raise ConfigurationError(f"{name}={value}: expected 1 to 64")
        if not 0.0 <= self.min_acceptance_rate <= 1.0:
            raise ConfigurationError(f"min_acceptance_rate={self.min_acceptance_rate}: expected 0 to 1")
        if self.draft_tensor_parallel_size != 1:
            raise ConfigurationError(
                f"draft_tensor_parallel_size={self.draft_tensor_parallel_size}: expected 1, a draft runs on one device"
            )


class SpeculativeDecoder:
    """Greedy drafts for a text that grows. Not thread-safe. `options` say where and how a draft model runs."""

    def __init__(self, config: SpeculativeConfig | None = None, options: EngineOptions | None = None) -> None:
        self.config = SpeculativeConfig() if config is None else config
        self._options = options
        self._ngram = NgramProposer(_unheard, self.config.ngram_prompt_lookup_max) if self.config.use_ngram else None
        self._draft: DraftModel | None = None
        self._draft_folder: Path | None = None
        self._drafts: deque[tuple[int, int]] = deque(maxlen=HISTORY)
        self._num_calls_off = 0
        self._sequence: Sequence | None = None
        self._num_texts = 0

    async def initialize_draft_model(self, main_model: str) -> bool:
        """Load the draft for the model in folder `main_model`; False where none lies beside it.

        Raises ConfigurationError for a draft that was named and cannot be used: another vocabulary, a broken folder.
        """
        folder = Path(main_model)
        named = self.config.draft_model
        draft = Path(named) if named else find_draft(folder)
        if draft is None:
            return False
        options = self._options or EngineOptions(folder=folder, cache_dir=Path.home() / ".cache" / "autobot_llm")
        try:
            self._draft = await asyncio.to_thread(load_draft_model, folder, draft, options)
        except (ConfigurationError, ModelLoadError):
            if named:
                raise
            return False
        self._draft_folder = draft
        return True

    def speculate(self, input_ids: list[int], past_key_values: Any = None) -> tuple[list[int], int]:
        """Tokens that may follow, and how many there are; none while it is switched off.

        A text's repetition goes before the draft model. The keys and values of a text that goes on are kept inside, so
        `past_key_values` must be None. Raises InvalidRequestError.
        """
        if past_key_values is not None:
            raise InvalidRequestError("past_key_values: expected None; a draft model keeps its own", param=None)
        if not input_ids:
            raise InvalidRequestError("input_ids: expected at least one token", param=None)
        if not self._is_enabled():
            return [], 0
        sequence = self._follow(input_ids)
        number = self.config.num_speculative_tokens
        draft = None if self._ngram is None else self._ngram.propose(sequence, number)
        if draft is None and self._draft is not None:
            (draft,) = self._draft.propose([sequence], number)
        token_ids = [] if draft is None else draft.token_ids
        return token_ids, len(token_ids)

    def record_acceptance(self, proposed: int, accepted: int) -> float:
        """Tell what became of a draft; returns the share of accepted tokens over the last 100 drafts."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"accepted={accepted}: expected 0 to proposed={proposed}")
        self._drafts.append((proposed, accepted))
        return self._rate()

    def get_metrics(self) -> dict[str, Any]:
        """`enabled`, `acceptance_rate` (0 to 1) of so many `measurements`, `mode`, `draft_model` (its folder)."""
        modes = [name for name, part in (("ngram", self._ngram), ("draft", self._draft)) if part is not None]
        return {
            "enabled": bool(modes) and not self._is_below_floor(),
            "acceptance_rate": self._rate(),
            "measurements": len(self._drafts),
            "mode": "+".join(modes) or "none",
            "draft_model": None if self._draft_folder is None else str(self._draft_folder),
        }

    def close(self) -> None:
        """Free the draft model."""
        if self._draft is not None:
            self._draft.close()
            self._draft = None

    def _rate(self) -> float:
        return sum(accepted for _, accepted in self._drafts) / max(1, sum(proposed for proposed, _ in self._drafts))

    def _is_below_floor(self) -> bool:
        return len(self._drafts) >= ENOUGH and self._rate() < self.config.min_acceptance_rate

    def _is_enabled(self) -> bool:
        if not self._is_below_floor():
            return True
        self._num_calls_off += 1
        if self._num_calls_off <= HISTORY:
            return False
        self._num_calls_off = 0
        self._drafts.clear()
        return True

    def _follow(self, input_ids: list[int]) -> Sequence:
        """The text as a sequence: the one before, where it goes on."""
        sequence = self._sequence
        if sequence is not None and input_ids[: len(sequence.token_ids)] == sequence.token_ids:
            sequence.token_ids.extend(input_ids[len(sequence.token_ids) :])
            return sequence
        for part in (self._ngram, self._draft):
            if sequence is not None and part is not None:
                part.forget(sequence)
        self._num_texts += 1
        params = SamplingParams(max_tokens=1, temperature=0.0)
        self._sequence = Sequence(self._num_texts, input_ids, params)
        return self._sequence


def _unheard(kind: str, tried: int, passed: int) -> None:
    """Acceptance is what the caller records."""
