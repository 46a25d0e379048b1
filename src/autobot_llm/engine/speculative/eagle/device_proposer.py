"""EAGLE-3 as a method of an engine whose device computes beside the host: trees that grow there. Knows features as
tensors that it hands on, tokens and blocks; computes nothing. Its twin on a CPU is EagleProposer.

As there, a sequence has a window from the first token on that the target computed without a gap since, and waits with
its features until somebody wants a draft. A window is a sequence of its own, of the tokens *after* each position, with
blocks in a pool of the draft's own; what a tree writes behind it is computed again from the target's features. Where
blocks or bytes run out, the sequences that were not drafted for lately lose their windows.

For a request that is drawn the device ranks guesses with the target's noise, as on a CPU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import numpy as np
import torch

from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.chain import make_room
from autobot_llm.engine.speculative.eagle.on_device import EagleDevice, Roots, Streams, Taken
from autobot_llm.engine.speculative.proposer import Computed, Draft

MAX_BYTES = 2**30
"""Of features on the device that the layer has not taken in, of all windows together."""

DEVICE_BREADTH = 7
"""Tokens of a draft for each of its levels, where verifying them costs little beside a step: one or two levels fit into
a step of 16 tokens with their root, five into one of 32."""

DEVICE_CANDIDATES = 32
"""Tokens of a tree with its root: 64 cost a step of a 7B model 0.4 ms more on an H200, and found 2 % more tokens."""

MOST_PARTS = 32
"""Steps whose features a window keeps, with those of other sequences in the same tensors, before it copies its own."""

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


# T tokens, F three times the target's hidden size, S sequences, B blocks
@dataclass(slots=True)
class _Window:
    """A sequence's positions from `first_position` on. `shadow` holds the token after each of them, and counts as
    computed those that the layer took in; `waiting` are the features of the others. `draft` is the one that was made
    after so many tokens."""

    shadow: Sequence
    first_position: int
    waiting: list[Streams] = field(default_factory=list)
    draft: tuple[int, Draft | None] | None = None

    @property
    def end(self) -> int:
        """The position after the window: the index of the sequence's last token, where nothing is missing."""
        return self.first_position + len(self.shadow.token_ids)

    @property
    def num_waiting(self) -> int:
        return len(self.shadow.token_ids) - self.shadow.num_computed_tokens


class DeviceEagleProposer:
    """CostlyProposer over a device that nobody else uses. `feature_layers` are those whose streams the draft reads;
    `max_model_len` bounds a sequence.

    A draft that is asked to be d tokens deep has at most `breadth` * d of them, and no more than `tree_candidates` with
    its root; `max_rows`: tokens of all trees of a step with their roots, where the step takes no more.
    """

    name = "eagle3"

    def __init__(
        self,
        device: EagleDevice,
        pool: BlockPool,
        feature_layers: tuple[int, ...],
        *,
        max_model_len: int,
        breadth: int,
        tree_candidates: int = DEVICE_CANDIDATES,
        max_rows: int | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.wanted: FeatureKinds | None = FeatureKinds(layers=feature_layers)
        self.device = device
        self.pool = pool
        self._max_model_len = max_model_len
        self._breadth = breadth
        self._tree_candidates = tree_candidates
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._windows: OrderedDict[int, _Window] = OrderedDict()  # least recently drafted for first
        self.most_read = device.max_sequences

    @property
    def num_bytes(self) -> int:
        """Of the features that wait."""
        return self._num_bytes

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        streams_TF = features.streams_TF
        assert streams_TF is not None
        for sequence, start, token_rows, _logit_row in computed:
            window, end = self._windows.get(sequence.id), start + len(token_rows)
            if window is not None and not window.first_position <= start <= window.end:
                self.forget(sequence)
                window = None
            num_known = 0 if window is None else window.end - start  # computed once more, after a preemption
            if num_known >= len(token_rows):
                continue
            next_ids = sequence.token_ids[start + num_known + 1 : end + 1]
            if window is None:
                window = self._windows[sequence.id] = _Window(Sequence(sequence.id, next_ids, _GREEDY), start)
            else:
                window.shadow.token_ids.extend(next_ids)
            self._wait_with(window, Streams(streams_TF, token_rows[num_known:]))
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._windows)))

    def take_in(self, computed: SequenceABC[Computed], features: Features) -> None:
        self.observe(computed, features)
        windows = [window for each in computed if (window := self._windows.get(each.sequence.id)) is not None]
        if windows := [w for w in windows if make_room(self.pool, w.shadow, len(w.shadow.token_ids))]:
            self._catch_up(windows)

    def lag(self, sequence: Sequence) -> int:
        window = self._windows.get(sequence.id)
        return 1 if window is None else max(1, window.num_waiting)

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """One tree for each. Nothing for a sequence that was not seen, that has no room, and nothing beyond the
        context. Where nothing new was seen since a draft was made, it is that one, as far as it goes."""
        depth = min(num_tokens, self.device.max_depth)
        wanted = {s.id: self._windows[s.id] for s in sequences if self._is_known(s, depth)}
        for sequence_id in wanted:
            self._windows.move_to_end(sequence_id)
        drafting = [w for w in wanted.values() if w.num_waiting and self._make_room(w, depth, wanted)]
        params = {s.id: s.params for s in sequences}
        num_nodes = self.num_nodes(depth, len(wanted))
        for start in range(0, len(drafting), self.device.max_sequences):
            self._grow(drafting[start : start + self.device.max_sequences], params, depth, num_nodes)
        return [self._drafted(wanted.get(s.id), depth, num_nodes) for s in sequences]

    def num_nodes(self, depth: int, num_sequences: int) -> int:
        """Of each tree, without its root."""
        num_nodes = min(1 + self._breadth * depth, self._tree_candidates)
        if self._max_rows is not None and num_sequences:
            num_nodes = min(num_nodes, max(2, self._max_rows // num_sequences))
        return num_nodes - 1

    def num_passes(self, num_tokens: int) -> int:
        return min(num_tokens, self.device.max_depth)

    def forget(self, sequence: Sequence) -> None:
        self._drop(sequence.id)

    def close(self) -> None:
        self._windows.clear()
        self._num_bytes = 0
        self.device.close()

    def _is_known(self, sequence: Sequence, depth: int) -> bool:
        window, length = self._windows.get(sequence.id), len(sequence.token_ids)
        return window is not None and window.end == length - 1 and length - 1 + depth <= self._max_model_len

    def _drafted(self, window: _Window | None, depth: int, num_nodes: int) -> Draft | None:
        """What was made after the window's last token, no larger than that."""
        if window is None or window.draft is None or window.draft[0] != len(window.shadow.token_ids):
            return None
        draft = window.draft[1]
        if draft is None or draft.parents is None:
            return draft
        depths = draft_tree.depths(draft.parents)
        num_kept = min(sum(each <= depth for each in depths), num_nodes)
        return draft if num_kept == len(depths) else draft.first(num_kept)

    def _make_room(self, window: _Window, depth: int, wanted: dict[int, _Window]) -> bool:
        idle = [other.shadow for i, other in self._windows.items() if i not in wanted and other.shadow.block_ids]
        num_rows = len(window.shadow.token_ids) + self.device.num_tree_rows(depth)
        return make_room(self.pool, window.shadow, num_rows, idle, lambda shadow: self._drop(shadow.id))

    def _grow(self, windows: list[_Window], params: dict[int, SamplingParams], depth: int, num_nodes: int) -> None:
        """Take in what waits, and make the drafts of so many windows as the device takes at a time."""
        self._catch_up(windows)
        taken = [self._take(window, window.num_waiting) for window in windows]
        ends_S = np.cumsum([len(each.ids_T) for each in taken], dtype=np.int32)
        tables = [window.shadow.block_ids for window in windows]
        tables_SB = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for s, block_ids in enumerate(tables):
            tables_SB[s, : len(block_ids)] = block_ids
        lens_S = np.array([len(window.shadow.token_ids) for window in windows], np.int32)
        draws = [(params[window.shadow.id], window.end + 1) for window in windows]
        trees = self.device.grow(_joined(taken), Roots(ends_S - 1, lens_S, tables_SB, draws), depth, num_nodes)
        for window, (tokens, parents, log_chances) in zip(windows, trees, strict=True):
            is_good = all(map(math.isfinite, log_chances))
            window.draft = len(window.shadow.token_ids), Draft(tokens, parents=parents) if is_good else None

    def _catch_up(self, windows: list[_Window]) -> None:
        """Take in all that waits but for what a tree's first pass takes."""
        taken, budget = list[Taken](), self.device.max_tokens
        most_root_rows = self.device.most_root_rows(len(windows))
        for window in windows:
            if window.num_waiting <= most_root_rows:
                continue
            while (number := min(window.num_waiting - 1, budget)) > 0:
                taken.append(self._take(window, number))
                budget -= number
                if budget == 0:
                    self.device.take_in(_joined(taken))
                    taken, budget = [], self.device.max_tokens
        if taken:
            self.device.take_in(_joined(taken))

    def _take(self, window: _Window, number: int) -> Taken:
        """The first tokens that wait, which count as computed."""
        shadow, streams = window.shadow, list[Streams]()
        start = shadow.num_computed_tokens
        shadow.num_computed_tokens = end = start + number
        while number:
            streams_TF, rows = window.waiting.pop(0)
            if len(rows) > number:
                window.waiting.insert(0, Streams(streams_TF, rows[number:]))
                rows = rows[:number]
            streams.append(Streams(streams_TF, rows))
            number -= len(rows)
            self._num_bytes -= _num_bytes(streams[-1])
        places = np.arange(start, end, dtype=np.int32)
        blocks = np.array(shadow.block_ids, np.int32)
        size = self.pool.block_size
        return Taken(
            streams,
            np.array(shadow.token_ids[start:end], np.int32),
            places + np.int32(window.first_position),
            blocks[places // size] * np.int32(size) + places % np.int32(size),
        )

    def _wait_with(self, window: _Window, streams: Streams) -> None:
        """Keep a part of a step: as it is, since the next draft takes it in, unless it is a small part of a large step,
        all of which it would keep alive, uncounted. So would many small ones: from time to time they are copied."""
        streams_TF, rows = streams
        most = self.device.max_sequences
        few = most * self.device.most_root_rows(most)
        if len(streams_TF) > 2 * max(len(rows), few):
            streams = _whole(self.device.keep([streams]))
        window.waiting.append(streams)
        if len(window.waiting) > MOST_PARTS:
            window.waiting = [_whole(self.device.keep(window.waiting))]
        self._num_bytes += _num_bytes(streams)

    def _drop(self, sequence_id: int) -> None:
        window = self._windows.pop(sequence_id, None)
        if window is not None:
            self.pool.free(window.shadow.block_ids)
            self._num_bytes -= sum(map(_num_bytes, window.waiting))


def _joined(parts: list[Taken]) -> Taken:
    if len(parts) == 1:
        return parts[0]
    streams, ids, positions, slots = zip(*parts, strict=True)
    return Taken([each for some in streams for each in some], *map(np.concatenate, (ids, positions, slots)))


def _whole(streams_TF: torch.Tensor) -> Streams:
    return Streams(streams_TF, range(len(streams_TF)))


def _num_bytes(streams: Streams) -> int:
    streams_TF, rows = streams
    return len(rows) * streams_TF.shape[1] * streams_TF.element_size()
