"""EAGLE-3 as a method of an engine whose device computes beside the host: chains that never leave the device. Knows
features as tensors that it hands on, tokens and blocks; computes nothing. Its twin on a CPU is EagleProposer.

As there, a sequence has a window from the first token on that the target computed without a gap since, and waits with
its features until somebody wants a draft. A window is a sequence of its own, of the tokens *after* each position, with
blocks in a pool of the draft's own; what a draft's passes write behind it is computed again from the target's features.
Where blocks or bytes run out, the sequences that were not drafted for lately lose their windows.

A chain is the likeliest one for sampled requests, too: the device draws with noise that belongs to the index in a row,
which for a draft's vocabulary is another token than the target's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.executor import FeatureKinds, Features, PipelinedExecutor
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sampler import SamplingArraysBuilder
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.chain import Chain, known, make_room
from autobot_llm.engine.speculative.proposer import Computed, Draft

MAX_BYTES = 2**30
"""Of features on the device that the layer has not taken in, of all windows together."""

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


# T tokens, F three times the target's hidden size, E hidden size, W draft vocabulary
class EagleExecutor(PipelinedExecutor, Protocol):
    """Passes of the draft's layer. Tokens of a batch are the target's ids, sampled ones the draft's.

    A token whose row is known (`pending_rows_T`) reads what the layer returned in that row of the pass before; every
    other reads a feature that was set.
    """

    def fuse(self, streams_TF: torch.Tensor) -> torch.Tensor:
        """One feature TE from the target's three streams, queued after whatever computes these."""
        ...

    def set_features(self, parts: SequenceABC[torch.Tensor]) -> None:
        """The features TE of the tokens of the next pass, one part after the other."""
        ...


@dataclass(slots=True)
class _Window:
    """A sequence's positions from `first_position` on. `shadow` holds the token after each of them, and counts as
    computed those that the layer took in; `waiting` are the features of the others. `last` is the feature of the last
    one that was taken in: it is taken in again where nothing new has come."""

    shadow: Sequence
    first_position: int
    waiting: list[torch.Tensor] = field(default_factory=list)
    last: torch.Tensor | None = None

    @property
    def end(self) -> int:
        """The position after the window: the index of the sequence's last token, where nothing is missing."""
        return self.first_position + len(self.shadow.token_ids)

    @property
    def num_waiting(self) -> int:
        return len(self.shadow.token_ids) - self.shadow.num_computed_tokens


class DeviceEagleProposer:
    """CostlyProposer over an executor that nobody else uses. `target_ids_W`: the target's id of each of the draft's.
    `feature_layers` are those whose streams the draft reads; `max_tokens` and `max_model_len` the executor's limits for
    a pass and for a sequence."""

    name = "eagle3"

    def __init__(
        self,
        executor: EagleExecutor,
        pool: BlockPool,
        target_ids_W: npt.NDArray[np.int64],
        feature_layers: tuple[int, ...],
        *,
        max_tokens: int,
        max_model_len: int,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.wanted: FeatureKinds | None = FeatureKinds(layers=feature_layers)
        self.executor = executor
        self.pool = pool
        self._target_ids: list[int] = target_ids_W.tolist()
        self._sampling_arrays = SamplingArraysBuilder(len(target_ids_W))
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._windows: OrderedDict[int, _Window] = OrderedDict()  # least recently drafted for first

    @property
    def num_bytes(self) -> int:
        """Of the features that wait."""
        return self._num_bytes

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        assert features.streams_TF is not None
        fused_TE: torch.Tensor | None = None
        for sequence, start, token_rows, _logit_row in computed:
            window, end = self._windows.get(sequence.id), start + len(token_rows)
            if window is not None and not window.first_position <= start <= window.end:
                self.forget(sequence)
                window = None
            num_known = 0 if window is None else window.end - start  # computed once more, after a preemption
            if num_known >= len(token_rows):
                continue
            if fused_TE is None:
                fused_TE = self.executor.fuse(features.streams_TF)
            next_ids = sequence.token_ids[start + num_known + 1 : end + 1]
            if window is None:
                window = self._windows[sequence.id] = _Window(Sequence(sequence.id, next_ids, _GREEDY), start)
            else:
                window.shadow.token_ids.extend(next_ids)
            parts = _parts(fused_TE, token_rows[num_known:])
            window.waiting.extend(parts)
            self._num_bytes += sum(map(_num_bytes, parts))
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._windows)))

    def lag(self, sequence: Sequence) -> int:
        window = self._windows.get(sequence.id)
        return 1 if window is None else max(1, window.num_waiting)

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """One pass over what waits of every sequence, then one for each further token. Nothing for a sequence that
        was not seen, that has no room, and nothing beyond the context."""
        drafting = {s.id: self._windows[s.id] for s in sequences if self._is_known(s, num_tokens)}
        for sequence_id in drafting:
            self._windows.move_to_end(sequence_id)
        drafting = {i: window for i, window in drafting.items() if self._make_room(window, num_tokens, drafting)}
        drafts: dict[int, list[int]] = {}
        if drafting:
            windows = list(drafting.values())
            lengths = [len(window.shadow.token_ids) for window in windows]
            self._draft(windows, num_tokens)
            for (sequence_id, window), length in zip(drafting.items(), lengths, strict=True):
                drafts[sequence_id] = known(window.shadow.token_ids[length:])
                del window.shadow.token_ids[length:]
        return [Draft(token_ids) if (token_ids := drafts.get(s.id)) else None for s in sequences]

    def num_passes(self, num_tokens: int) -> int:
        return num_tokens

    def forget(self, sequence: Sequence) -> None:
        self._drop(sequence.id)

    def close(self) -> None:
        self._windows.clear()
        self._num_bytes = 0
        self.executor.close()

    def _is_known(self, sequence: Sequence, num_tokens: int) -> bool:
        window, length = self._windows.get(sequence.id), len(sequence.token_ids)
        return window is not None and window.end == length - 1 and length - 1 + num_tokens <= self._max_model_len

    def _make_room(self, window: _Window, num_tokens: int, wanted: dict[int, _Window]) -> bool:
        idle = [other.shadow for i, other in self._windows.items() if i not in wanted and other.shadow.block_ids]
        num_rows = len(window.shadow.token_ids) + num_tokens - 1
        return make_room(self.pool, window.shadow, num_rows, idle, lambda shadow: self._drop(shadow.id))

    def _draft(self, windows: list[_Window], num_tokens: int) -> None:
        """All passes in a row; every sequence gets so many tokens."""
        firsts = np.array([window.first_position for window in windows], np.int32)
        chain = Chain(self.executor, self._sampling_arrays, self._target_ids.__getitem__)
        for chosen, parts in self._catch_up(windows):
            chain.launch(parts, self._batch(parts, firsts[chosen]))
        for _ in range(num_tokens - 1):
            parts = [ScheduledSequence(window.shadow, len(window.shadow.token_ids) - 1, 1, True) for window in windows]
            chain.launch(parts, self._batch(parts, firsts))
        chain.settle()

    def _catch_up(self, windows: list[_Window]) -> Iterator[tuple[list[int], list[ScheduledSequence]]]:
        """What waits of each, in passes that the executor takes, with the features set: the places of the windows in a
        pass, and their parts. All sample in the last one, since the pass after it finds what that returned."""
        for window in windows:
            if not window.num_waiting:
                assert window.last is not None
                window.shadow.num_computed_tokens -= 1
                window.waiting.append(window.last)
                self._num_bytes += _num_bytes(window.last)
        if sum(window.num_waiting for window in windows) > self._max_tokens:
            chosen, parts, budget = list[int](), list[ScheduledSequence](), self._max_tokens
            for i, window in enumerate(windows):
                while (missing := window.num_waiting - 1) > 0:
                    number = min(missing, budget)
                    chosen.append(i)
                    parts.append(ScheduledSequence(window.shadow, window.shadow.num_computed_tokens, number, False))
                    window.shadow.num_computed_tokens += number
                    budget -= number
                    if budget == 0:
                        self._set_features(windows, chosen, parts)
                        yield chosen, parts
                        chosen, parts, budget = [], [], self._max_tokens
            if parts:
                self._set_features(windows, chosen, parts)
                yield chosen, parts
        parts = []
        for window in windows:
            start, number = window.shadow.num_computed_tokens, window.num_waiting
            parts.append(ScheduledSequence(window.shadow, start, number, True))
            window.shadow.num_computed_tokens += number
        chosen = list(range(len(windows)))
        self._set_features(windows, chosen, parts)
        yield chosen, parts

    def _set_features(self, windows: list[_Window], chosen: list[int], parts: list[ScheduledSequence]) -> None:
        """Hand the features of a pass over, and keep the last of each window."""
        found: list[torch.Tensor] = []
        for i, part in zip(chosen, parts, strict=True):
            window, number = windows[i], part.num_tokens
            while number:
                rows_TE = window.waiting.pop(0)
                if len(rows_TE) > number:
                    window.waiting.insert(0, rows_TE[number:])
                    rows_TE = rows_TE[:number]
                found.append(rows_TE)
                number -= len(rows_TE)
                self._num_bytes -= _num_bytes(rows_TE)
            window.last = found[-1][-1:]
        self.executor.set_features(found)

    def _batch(self, parts: list[ScheduledSequence], firsts: npt.NDArray[np.int32]) -> StepBatch:
        """Rows of a cache count from a window's begin, positions from its sequence's."""
        batch = build_batch(parts, self.pool.block_size)
        if not firsts.any():
            return batch
        return replace(batch, positions_T=batch.positions_T + np.repeat(firsts, np.diff(batch.query_starts)))

    def _drop(self, sequence_id: int) -> None:
        window = self._windows.pop(sequence_id, None)
        if window is not None:
            self.pool.free(window.shadow.block_ids)
            self._num_bytes -= sum(map(_num_bytes, window.waiting))


def _parts(features_TE: torch.Tensor, rows: list[int]) -> list[torch.Tensor]:
    """Views of these rows: one, where they lie in a row."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return [features_TE[rows[0] : rows[-1] + 1]]
    return [features_TE[row : row + 1] for row in rows]


def _num_bytes(features_TE: torch.Tensor) -> int:
    return features_TE.numel() * features_TE.element_size()
