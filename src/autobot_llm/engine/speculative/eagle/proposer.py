"""EAGLE-3 as a method of the engine: trees for many sequences at once. Knows the draft, features and tokens; knows
nothing of schedules. Its slow twin is EagleDrafter.

Features are taken as the target computes them, and kept until somebody wants a draft: then the layer catches up with
all of them in one pass. What the target does not compute has no features: a prefix that was found in its cache. So a
sequence has a window, from the first token that was computed without a gap since, and the layer attends to that alone.
Its guesses are worse for it where the prefix matters; the answer is not. All of it is bounded in bytes: beyond them the
sequences that were not drafted for lately lose their windows, and begin new ones with the tokens that follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.eagle.cache import DraftCache, Part, run_layer
from autobot_llm.engine.speculative.eagle.growth import Growth
from autobot_llm.engine.speculative.eagle.model import EagleDraft, draft_rope
from autobot_llm.engine.speculative.guesses import rank_guesses
from autobot_llm.engine.speculative.medusa.config import TREE_CANDIDATES
from autobot_llm.engine.speculative.proposer import Computed, Draft

MAX_BRANCHES = 8
"""Tokens that are looked at after each node, and nodes of a level that go on."""
MAX_BYTES = 256 * 2**20
"""Of all windows together: keys and values, and features that the layer has not taken in."""


# T tokens, F three times the target's hidden size, E hidden size, S sequences, W draft vocabulary
@dataclass(slots=True)
class _Window:
    """A sequence's positions from `cache.first_position` on: `num_rows` of them were taken in, and those of `waiting`
    (features TF, each with the tokens after them) were not. `num_bytes` as counted last."""

    cache: DraftCache
    num_rows: int = 0
    num_waiting: int = 0
    waiting: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)
    feature_E: torch.Tensor | None = None  # what the layer returned at the last row
    num_bytes: int = 0

    @property
    def end(self) -> int:
        """The position after the window: the index of the sequence's last token, where nothing is missing."""
        return self.cache.first_position + self.num_rows + self.num_waiting


class _Drafting(NamedTuple):
    """A sequence that is drafted for, and its tree."""

    sequence: Sequence
    window: _Window
    growth: Growth


class EagleProposer:
    """CostlyProposer of the most probable trees.

    A draft that is asked to be d tokens deep has at most `breadth` * d of them, and no more than TREE_CANDIDATES with
    its root; with a `breadth` of 1 it is a chain. `embed_VE` are the target's embeddings, `feature_layers` the layers
    whose streams the draft reads (see EagleConfig); `max_model_len` bounds the positions.
    """

    name = "eagle3"

    def __init__(
        self,
        draft: EagleDraft,
        embed_VE: torch.Tensor,
        feature_layers: tuple[int, ...],
        *,
        max_model_len: int,
        breadth: int = 1,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.wanted: FeatureKinds | None = FeatureKinds(layers=feature_layers)
        self.draft = draft
        self.embed_VE = embed_VE
        self._target_ids_W = draft.target_ids.cpu().numpy()
        self._max_model_len = max_model_len
        self._rope_PD = draft_rope(draft.config, max_model_len, torch.float32, embed_VE.device)
        self._breadth = breadth
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._windows: OrderedDict[int, _Window] = OrderedDict()  # least recently drafted for first

    @property
    def num_bytes(self) -> int:
        """Memory of all windows."""
        return self._num_bytes

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        assert features.streams_TF is not None
        for sequence, start, token_rows, _logit_row in computed:
            window, end = self._windows.get(sequence.id), start + len(token_rows)
            if window is None or not window.cache.first_position <= start <= window.end:
                self.forget(sequence)
                window = self._windows[sequence.id] = _Window(
                    DraftCache(self.draft.config.layer, start, self.embed_VE.device)
                )
            num_known = window.end - start  # computed once more, after a preemption
            if num_known < len(token_rows):
                streams_TF = features.streams_TF[token_rows[num_known:]]  # a copy
                window.waiting.append((streams_TF, sequence.token_ids[start + num_known + 1 : end + 1]))
                window.num_waiting += len(streams_TF)
                self._count(window)
        self._make_room()

    def lag(self, sequence: Sequence) -> int:
        window = self._windows.get(sequence.id)
        return 1 if window is None else max(1, window.num_waiting)

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """One pass over what waits of every sequence, then one for each further level. Nothing for a sequence that
        was not seen, and nothing beyond the context."""
        drafts: list[Draft | None] = [None] * len(sequences)
        places = [i for i, sequence in enumerate(sequences) if self._is_known(sequence, num_tokens)]
        if not places:
            return drafts
        drafting = [
            _Drafting(sequences[i], self._windows[sequences[i].id], Growth(sequences[i].token_ids[-1])) for i in places
        ]
        for sequence, _window, _growth in drafting:
            self._windows.move_to_end(sequence.id)
        self._grow(drafting, num_tokens)
        num_nodes = min(1 + self._breadth * num_tokens, TREE_CANDIDATES)
        for i, (_sequence, window, growth) in zip(places, drafting, strict=True):
            kept = growth.best(num_nodes)[1:]
            drafts[i] = Draft([node.token for node in kept], parents=[node.parent - 1 for node in kept])
            self._count(window)
        self._make_room()
        return drafts

    def num_passes(self, num_tokens: int) -> int:
        return num_tokens

    def forget(self, sequence: Sequence) -> None:
        self._drop(sequence.id)

    def close(self) -> None:
        self._windows.clear()
        self._num_bytes = 0

    def _is_known(self, sequence: Sequence, num_tokens: int) -> bool:
        window, length = self._windows.get(sequence.id), len(sequence.token_ids)
        return window is not None and window.end == length - 1 and length - 1 + num_tokens <= self._max_model_len

    @torch.inference_mode()
    def _catch_up(self, windows: list[_Window]) -> None:
        """Take in what waits of each."""
        if not windows:
            return
        parts = [
            Part(window.cache, window.num_rows, [token_id for _, ids in window.waiting for token_id in ids])
            for window in windows
        ]
        streams_TF = torch.cat([streams_TF for window in windows for streams_TF, _ in window.waiting])
        features_TE = self.draft.fuse(streams_TF)
        returned_TE = run_layer(self.draft, self.embed_VE, self._rope_PD, parts, features_TE)
        end = 0
        for window in windows:
            end += window.num_waiting
            window.feature_E = returned_TE[end - 1].clone()
            window.num_rows += window.num_waiting
            window.num_waiting = 0
            window.waiting = []

    @torch.inference_mode()
    def _grow(self, drafting: list[_Drafting], max_depth: int) -> None:
        """The trees of all, a pass for each level after the first."""
        self._catch_up([window for _, window, _ in drafting if window.waiting])
        features_ME = torch.stack([window.feature_E for _, window, _ in drafting if window.feature_E is not None])
        num_branches, tree_rows = min(self._breadth, MAX_BRANCHES), 0
        for depth in range(max_depth):
            if depth:
                parts, parents, begin = list[Part](), list[int](), 0
                for _sequence, window, growth in drafting:
                    num_before, first_row = len(growth.frontier), window.num_rows + tree_rows
                    parents += [begin + place for place in growth.advance(num_branches, first_row)]
                    begin += num_before
                    ids = [growth.nodes[node].token for node in growth.frontier]
                    visible = None if num_branches == 1 else [growth.rows_to(node) for node in growth.frontier]
                    parts.append(Part(window.cache, first_row, ids, window.num_rows, depth, visible))
                tree_rows += len(parts[0].ids)
                features_ME = run_layer(self.draft, self.embed_VE, self._rope_PD, parts, features_ME[parents])
            self._add_level(drafting, features_ME, depth, num_branches)

    def _add_level(self, drafting: list[_Drafting], features_ME: torch.Tensor, depth: int, num_branches: int) -> None:
        sequences = [sequence for sequence, _, growth in drafting for _ in growth.frontier]
        ids_MN, log_chances_MN = rank_guesses(
            self.draft.logits(features_ME),
            [sequence.params for sequence in sequences],
            [len(sequence.token_ids) + depth for sequence in sequences],
            num_branches,
            ids_V=self._target_ids_W,
        )
        begin = 0
        for _sequence, _window, growth in drafting:
            rows = slice(begin, begin + len(growth.frontier))
            begin += len(growth.frontier)
            growth.add_level(ids_MN[rows].tolist(), log_chances_MN[rows].tolist())

    def _count(self, window: _Window) -> None:
        feature_bytes = window.waiting[0][0].shape[1] * 4 if window.waiting else 0
        num_bytes = window.cache.num_bytes + window.num_waiting * feature_bytes
        self._num_bytes += num_bytes - window.num_bytes
        window.num_bytes = num_bytes

    def _make_room(self) -> None:
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._windows)))

    def _drop(self, sequence_id: int) -> None:
        window = self._windows.pop(sequence_id, None)
        if window is not None:
            self._num_bytes -= window.num_bytes
