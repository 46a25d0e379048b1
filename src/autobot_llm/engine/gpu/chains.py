"""Passes of a draft that are captured as one: which chains there are, what arrays each reads, and how a batch gets into
them. Knows layouts, work lists and the order of passes; captures and launches nothing.

Of all that a pass after the first one reads, only its tokens depend on the pass before, and these stay on the device:
positions, slots and contexts grow by one. So the host describes all passes at once, and none waits for it. Nor does the
chain have to wait for the verdict on the drafts before it: kernels/gpu/follow.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, ITEM_FIELDS, ItemCut
from autobot_llm.engine.attention.triton_paged import TritonMetadata, TritonPagedAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import SamplingArrays, Unverified
from autobot_llm.engine.gpu.decoder import DecoderInputs, FusedDecoder
from autobot_llm.engine.gpu.graph_sizes import LONGEST_CHAIN, MAX_ROWS, chain_sizes, padded_size
from autobot_llm.engine.gpu.staging import Layout
from autobot_llm.engine.gpu.step_graphs import Arrays, fill_tokens, token_shapes
from autobot_llm.engine.kernels.gpu.follow import MOST_DRAFTS, FollowArrays, follow
from autobot_llm.engine.kernels.gpu.sampling import DeviceSampler, SamplingTensors

MOST_MISSING = 16
"""Query rows of a sequence and key/value head, tokens times heads of a group, that a chain's first pass takes."""

_FOLLOWED = {name: name for name in FollowArrays.__slots__} | {
    "block_tables_SB": "block_tables",
    "items_KI8": "items",
    "keys_KW": "keys_R",
}
"""The fields of FollowArrays by what they are called in a layout."""

_LEAST_ROWS = 4  # of a pass, so that whatever belongs to one begins at a multiple of 16 bytes


# S sequences, K passes, T tokens of the first one, R rows of a pass (S padded)
@dataclass(frozen=True, slots=True)
class _Pass:
    inputs: DecoderInputs
    metadata: TritonMetadata
    sampling: SamplingTensors | None
    into: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ChainGraph:
    """A captured chain of passes over `size` sequences each. Pass k leaves the token of sequence s in row k *
    `rows_per_pass` + s."""

    key: str
    size: int
    layout: Layout
    slots: tuple[Arrays, ...]
    passes: tuple[_Pass, ...]
    follows: FollowArrays

    @property
    def rows_per_pass(self) -> int:
        return rows_per_pass(self.size)

    @property
    def num_rows(self) -> int:
        return len(self.passes) * self.rows_per_pass

    def rows(self, num_sequences: int) -> npt.NDArray[np.int64]:
        """Where the tokens of so many sequences are, the first pass first."""
        firsts = np.arange(len(self.passes), dtype=np.int64) * self.rows_per_pass
        return (firsts[:, None] + np.arange(num_sequences)).ravel()


class ChainGraphs:
    """Every chain of 1 to `longest` passes that is worth capturing, greedy and drawn. Until `bind` there is nothing to
    fill, and until `is_captured` nothing is found. `tokens_R` are the target's; what is drawn goes to those from
    `first_row` on (`drafts_R`), and best logits to a tensor beside it."""

    def __init__(
        self,
        attention: TritonPagedAttention,
        tokens_R: torch.Tensor,
        first_row: int,
        *,
        longest: int,
        max_num_seqs: int,
        table_width: int,
        num_spare_items: int,
    ) -> None:
        self.is_captured = False
        self.tokens_R, self.drafts_R = tokens_R, tokens_R[first_row:]
        self.bests_R = torch.zeros(len(self.drafts_R), dtype=torch.float32, device=tokens_R.device)
        self._attention = attention
        self._num_spare_items = num_spare_items
        self._most_missing = min(attention.max_queries, max(4, MOST_MISSING // attention.group_size))
        self._cut = ItemCut()
        self._sizes = chain_sizes(max_num_seqs, longest)
        self._graphs: dict[tuple[int, int, bool], ChainGraph] = {}
        self._layouts = {
            (size, number, is_drawn): _layout(size, number, table_width, size + num_spare_items, is_drawn=is_drawn)
            for size, longest_of_size in self._sizes.items()
            for number in range(1, longest_of_size + 1)
            for is_drawn in (False, True)
        }

    @property
    def num_bytes(self) -> int:
        """Of the largest chain's arrays."""
        return max((layout.num_bytes for layout in self._layouts.values()), default=0)

    @property
    def all(self) -> list[ChainGraph]:
        return list(self._graphs.values())

    def bind(self, on_host: SequenceABC[npt.NDArray[np.uint8]], on_device: torch.Tensor) -> None:
        """Lay the arrays out in the slots of a staging and in its buffer; all chains share them."""
        for (size, number, is_drawn), layout in self._layouts.items():
            tensors = layout.on_device(on_device)
            passes = tuple(self._pass(tensors, size, k, is_drawn=is_drawn) for k in range(number))
            slots = tuple(layout.on_host(slot) for slot in on_host)
            key = f"{'drawn ' if is_drawn else ''}chain {size} x {number}"
            follows = FollowArrays(**{name: tensors.get(field) for name, field in _FOLLOWED.items()})  # type: ignore[arg-type]
            self._graphs[size, number, is_drawn] = ChainGraph(key, size, layout, slots, passes, follows)

    def find(self, num_missing: SequenceABC[int], num_passes: int, *, is_drawn: bool) -> ChainGraph | None:
        """The captured chain for sequences that miss so many tokens each."""
        size = padded_size(len(num_missing), tuple(self._sizes)) if self.is_captured else None
        if size is None or max(num_missing) > self._most_missing or sum(num_missing) > _num_tokens(size):
            return None
        return self._graphs.get((size, num_passes, is_drawn))

    def fill(
        self,
        chain: ChainGraph,
        slot: int,
        batch: StepBatch,
        sampling: SamplingArrays,
        after: Unverified | None = None,
    ) -> None:
        """Write a chain that begins with a batch into the arrays of a slot, and make what it leaves padding. `after` as
        of ChainExecutor."""
        host = chain.slots[slot]
        num_sequences, num_blocks = batch.block_tables_SB.shape
        number = len(chain.passes)
        host["block_tables"][:num_sequences, :num_blocks] = batch.block_tables_SB
        fill_tokens(host, batch)
        host["logit_rows"][:num_sequences] = batch.logit_rows_R
        host["logit_rows"][num_sequences:] = 0
        places_KS = batch.context_lens + np.arange(number, dtype=np.int32)[:, None]  # of the tokens that are sampled
        num_drafts = 0 if after is None else after.draft_rows_SN.shape[1]
        lens_KS = places_KS + np.int32(num_drafts)  # at most
        num_items = self._cut.write_passes(host["items"], batch.query_starts, lens_KS, self._num_spare_items)
        host["items"][:, num_items:] = -1
        host["first_rows"][:] = -1
        if after is not None:
            host["first_rows"][:num_sequences] = after.first_rows_S
            host["num_drafts"][:num_sequences] = num_drafts
            host["draft_rows"][:num_sequences, :num_drafts] = after.draft_rows_SN
            host["first_positions"][:num_sequences] = batch.context_lens - 1
            host["item_size"][0] = self._cut.size
        if number > 1:
            places_KS = places_KS[:-1]
            blocks_KS = batch.block_tables_SB[np.arange(num_sequences), places_KS // BLOCK_SIZE]
            for name, values, padding in (
                ("next_positions", places_KS, 0),
                ("next_slots", blocks_KS * BLOCK_SIZE + places_KS % BLOCK_SIZE, -1),
            ):
                host[name][:, :num_sequences] = values
                host[name][:, num_sequences:] = padding
            host["next_rows"][:num_sequences] = np.arange(num_sequences)
            host["next_rows"][num_sequences:] = -1
            host["next_ids"][:] = 0
        if "keys_R" in host:
            _fill_sampling(host, sampling, number, num_sequences)

    def _pass(self, tensors: Mapping[str, torch.Tensor], size: int, number: int, *, is_drawn: bool) -> _Pass:
        width = rows_per_pass(size)
        rows = slice(number * width, number * width + size)
        sampling = None
        if is_drawn:
            each = {name: tensors[name][:size] for name in SamplingTensors.__slots__ if name != "keys_R"}
            sampling = SamplingTensors(keys_R=tensors["keys_R"][number, :size], **each)
        most_queries = self._most_missing if number == 0 else 1
        metadata = self._attention.prepare_pass(tensors["block_tables"], tensors["items"][number], most_queries)
        last_tokens = self.drafts_R[max(0, number - 1) * width :][:size]
        if number == 0:
            inputs = DecoderInputs(
                tensors["ids"],
                tensors["token_rows"],
                tensors["positions"],
                tensors["slots"],
                last_tokens,
                tensors["logit_rows"],
            )
        else:
            inputs = DecoderInputs(
                tensors["next_ids"][:size],
                tensors["next_rows"][:size],
                tensors["next_positions"][number - 1, :size],
                tensors["next_slots"][number - 1, :size],
                last_tokens,
                None,
            )
        return _Pass(inputs, metadata, sampling, (self.drafts_R[rows], self.bests_R[rows]))


def run(chain: ChainGraph, decoder: FusedDecoder, sampler: DeviceSampler, tokens_R: torch.Tensor) -> torch.Tensor:
    """Queue all passes; returns the logits of the last one. `tokens_R` are those of ChainGraphs."""
    logits_RV = torch.empty(0)
    follow(tokens_R, chain.follows)
    for one in chain.passes:
        logits_RV = decoder.forward(one.inputs, one.metadata)
        is_drawn = one.sampling is not None
        sampler.sample(logits_RV, one.sampling, any_drawn=is_drawn, any_restricted=is_drawn, into=one.into)
    return logits_RV


def rows_per_pass(size: int) -> int:
    return max(size, _LEAST_ROWS)


def padding_of(chain: ChainGraph) -> npt.NDArray[np.uint8]:
    """The bytes of a chain without any sequence: valid, and it leaves the cache alone."""
    padding = np.zeros(chain.layout.num_bytes, np.uint8)
    for name, array in chain.layout.on_host(padding).items():
        if name in ("token_rows", "slots", "items", "next_rows", "next_slots", "first_rows"):
            array[...] = -1
        elif name in ("temperature_R", "top_p_R"):
            array[...] = 1
    return padding


def _num_tokens(size: int) -> int:
    """Of the first pass: after a step with drafts a sequence misses one or two."""
    return min(max(16, 4 * size), MAX_ROWS)


def _layout(size: int, num_passes: int, table_width: int, num_items: int, *, is_drawn: bool) -> Layout:
    width = rows_per_pass(size)
    shapes: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
        "items": ((num_passes, num_items, ITEM_FIELDS), np.int32),
        "block_tables": ((size, table_width), np.int32),
        **token_shapes(_num_tokens(size)),
        "logit_rows": ((size,), np.int32),
        **dict.fromkeys(("first_rows", "num_drafts", "first_positions"), ((width,), np.int32)),
        "draft_rows": ((width, MOST_DRAFTS), np.int32),
        "item_size": ((1,), np.int32),
    }
    if num_passes > 1:
        shapes |= dict.fromkeys(("next_positions", "next_slots"), ((num_passes - 1, width), np.int32))
        shapes |= dict.fromkeys(("next_rows", "next_ids"), ((width,), np.int32))
    if is_drawn:
        shapes["keys_R"] = (num_passes, width), np.int64
        shapes["keys_table"] = (num_passes + LONGEST_CHAIN, width), np.int64
        shapes |= dict.fromkeys(("temperature_R", "top_p_R", "min_p_R"), ((width,), np.float32))
        shapes |= dict.fromkeys(("top_k_R", "is_drawn_R"), ((width,), np.int32))
    return Layout.of(shapes)


def _fill_sampling(host: Arrays, sampling: SamplingArrays, num_passes: int, num_sequences: int) -> None:
    """Passes differ in their noise alone."""
    keys_PS = sampling.keys_R.view(np.int64).reshape(-1, num_sequences)
    host["keys_table"][: len(keys_PS), :num_sequences] = keys_PS
    host["keys_R"][:, :num_sequences] = keys_PS[:num_passes]
    for name in SamplingTensors.__slots__:
        if name != "keys_R":
            host[name][:num_sequences] = getattr(sampling, name)[:num_sequences]
    host["is_drawn_R"][num_sequences:] = 0
