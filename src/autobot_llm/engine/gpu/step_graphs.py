"""The steps that are captured: which there are, what arrays each reads, and how a batch is written into them. Knows
layouts and work lists; captures and launches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.attention.paged import (
    ItemCut,
    PagedAttention,
    PagedBatch,
    decode_sizes,
    fill_decode_arrays,
)
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.gpu.decoder import DecoderInputs
from autobot_llm.engine.gpu.graph_sizes import (
    LONG_CONTEXT,
    MAX_PROMPTS,
    MAX_ROWS,
    crowd_graph_sizes,
    decode_graph_sizes,
    long_graph_sizes,
    padded_size,
    prompt_graph_sizes,
    tree_graph_sizes,
)
from autobot_llm.engine.gpu.options import GpuLimits
from autobot_llm.engine.gpu.staging import FetchedStaging, Layout

Arrays = dict[str, npt.NDArray[Any]]

DECODE, LONG, PROMPTS, CROWDS, TREES = "decode", "long", "prompts", "crowds", "trees"
"""One token for every sequence; the same after long contexts; few tokens of prompts or of drafts; of prompts beside
more than MAX_PROMPTS sequences; of drafts that may be trees."""


# T packed tokens, R rows whose logits are wanted
@dataclass(frozen=True, slots=True)
class StepGraph:
    """What a captured step reads: its arrays' layout, views of them in every slot of the host's ring, and tensors.

    `batch` is attention's view where every sequence gets one token; for other steps, `prompts` is its metadata.
    """

    key: str
    layout: Layout
    slots: tuple[Arrays, ...]
    inputs: DecoderInputs
    batch: PagedBatch | None
    prompts: Any

    @property
    def num_tokens(self) -> int:
        return self.inputs.ids_T.shape[0]

    @property
    def num_rows(self) -> int:
        rows_R = self.inputs.logit_rows_R
        return self.num_tokens if rows_R is None else rows_R.shape[0]


class StepGraphs:
    """Every step that is worth capturing. Those with prompts or trees need our own attention.

    `window` is the model's widest; `num_spare_items` are the work items that load the device once, and
    `num_spare_items_if_long` those of steps with long contexts. Until `bind` there is nothing to fill, and until
    `is_captured` nothing is found.
    """

    def __init__(
        self,
        limits: GpuLimits,
        attention: PagedAttention,
        *,
        table_width: int,
        num_spare_items: int,
        num_spare_items_if_long: int,
        window: int,
        takes_trees: bool,
    ) -> None:
        self.max_prompts = min(MAX_PROMPTS, limits.max_num_seqs)
        self.is_captured = False
        self._attention = attention
        self._table_width = table_width
        self._num_spare_items = {DECODE: num_spare_items, LONG: num_spare_items_if_long}
        self._window = window
        self._item_cut = ItemCut()
        self._graphs: dict[str, StepGraph] = {}
        sizes = decode_graph_sizes(limits.max_num_seqs)
        self._most_sequences = {PROMPTS: self.max_prompts, TREES: self.max_prompts, CROWDS: sizes[-1]}
        self._sizes: dict[str, tuple[int, ...]] = dict.fromkeys((DECODE, LONG, PROMPTS, CROWDS, TREES), ())
        if attention.can_capture:
            self._sizes[DECODE] = sizes
        if attention.can_capture and isinstance(attention, TritonPagedAttention):
            self._sizes[LONG] = long_graph_sizes(limits.max_num_seqs, limits.max_model_len)
            self._sizes[PROMPTS] = prompt_graph_sizes(limits.max_num_batched_tokens)
            self._sizes[CROWDS] = crowd_graph_sizes(limits.max_num_batched_tokens, limits.max_num_seqs)
            self._sizes[TREES] = tree_graph_sizes(limits.max_num_batched_tokens) if takes_trees else ()
        self._layouts = {
            f"{kind} {size}": self._layout(kind, size) for kind, sizes in self._sizes.items() for size in sizes
        }

    @property
    def num_bytes(self) -> int:
        """Of the largest step's arrays."""
        return max((layout.num_bytes for layout in self._layouts.values()), default=0)

    @property
    def all(self) -> list[StepGraph]:
        return list(self._graphs.values())

    def sizes(self, kind: str) -> tuple[int, ...]:
        """Numbers of tokens of the captured steps of a kind, ascending."""
        return self._sizes[kind] if self.is_captured else ()

    def bind(self, staging: FetchedStaging, last_tokens: torch.Tensor) -> None:
        """Lay the arrays out in the staging's buffers; all steps share them."""
        self._graphs = {key: self._graph(key, layout, staging, last_tokens) for key, layout in self._layouts.items()}

    def find(self, batch: StepBatch) -> StepGraph | None:
        """The captured step that a batch is padded to."""
        num_rows = len(batch.logit_rows_R)
        if batch.num_tokens == batch.num_sequences == num_rows:
            size = padded_size(num_rows, self.sizes(DECODE))
            if size is None:
                return None
            is_long = size in self.sizes(LONG) and int(batch.context_lens.sum()) >= LONG_CONTEXT * num_rows
            return self._graphs[f"{LONG if is_long else DECODE} {size}"]
        kind = TREES
        if batch.tree_masks_T is None:
            kind = PROMPTS if batch.num_sequences <= self.max_prompts else CROWDS
        size, most = padded_size(batch.num_tokens, self.sizes(kind)), self._most_sequences[kind]
        if size is None or batch.num_sequences > most or num_rows > self._num_logit_rows(kind, size):
            return None
        return self._graphs[f"{kind} {size}"]

    def fill(self, graph: StepGraph, slot: int, batch: StepBatch) -> Arrays:
        """Write a batch into the arrays of a slot, and make what it leaves padding."""
        host = graph.slots[slot]
        if graph.batch is not None:
            fill_decode_arrays(host, batch, window=self._window, cut=self._item_cut)
        else:
            assert isinstance(self._attention, TritonPagedAttention)
            self._attention.fill_prompt_arrays(host, batch)
            num_rows = len(batch.logit_rows_R)
            host["logit_rows"][:num_rows] = batch.logit_rows_R
            host["logit_rows"][num_rows:] = 0
        fill_tokens(host, batch)
        return host

    def _layout(self, kind: str, size: int) -> Layout:
        if kind in self._num_spare_items:
            num_items = size + self._num_spare_items[kind]
            sizes = decode_sizes(size, max_queries=1, table_width=self._table_width, num_items=num_items)
        else:
            assert isinstance(self._attention, TritonPagedAttention)
            sizes = self._attention.prompt_sizes(
                size, self._most_sequences[kind], self._table_width, takes_trees=kind == TREES
            ) | {"logit_rows": (self._num_logit_rows(kind, size),)}
        return Layout.of({name: (shape, np.int32) for name, shape in sizes.items()} | token_shapes(size))

    def _num_logit_rows(self, kind: str, num_tokens: int) -> int:
        """Tokens of a step whose logits are computed, whether they are wanted or not: one of each sequence, or all
        where they may be drafts."""
        return num_tokens if num_tokens <= MAX_ROWS else self._most_sequences[kind]

    def _graph(self, key: str, layout: Layout, staging: FetchedStaging, last_tokens: torch.Tensor) -> StepGraph:
        tensors = layout.on_device(staging.on_device)
        slots = tuple(layout.on_host(slot) for slot in staging.slots)
        inputs = inputs_of(tensors, last_tokens)
        if inputs.logit_rows_R is None:
            batch = PagedBatch.over(tensors, max_queries=1, is_long=key.startswith(LONG))
            return StepGraph(key, layout, slots, inputs, batch, None)
        assert isinstance(self._attention, TritonPagedAttention)
        return StepGraph(key, layout, slots, inputs, None, self._attention.prepare_prompts(tensors))


def padding_of(graph: StepGraph) -> tuple[npt.NDArray[np.uint8], Arrays]:
    """The bytes of a step without any sequence, and its arrays: valid, and it leaves the cache alone."""
    padding = np.zeros(graph.layout.num_bytes, np.uint8)
    host = graph.layout.on_host(padding)
    for name, array in host.items():
        array[...] = -1 if name in ("token_rows", "slots", "items") else 0
    return padding, host


def inputs_of(tensors: Mapping[str, torch.Tensor], last_tokens: torch.Tensor) -> DecoderInputs:
    return DecoderInputs(
        ids_T=tensors["ids"],
        token_rows_T=tensors["token_rows"],
        positions_T=tensors["positions"],
        slots_T=tensors["slots"],
        last_tokens=last_tokens,
        logit_rows_R=tensors.get("logit_rows"),
    )


def token_shapes(num_tokens: int) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    return dict.fromkeys(("ids", "token_rows", "positions", "slots"), ((num_tokens,), np.int32))


def fill_tokens(host: Arrays, batch: StepBatch) -> None:
    """Write the step's tokens, and make the rows after them padding, which writes nothing into the cache."""
    num_tokens = batch.num_tokens
    for name, values, padding in (
        ("ids", batch.ids_T, 0),
        ("token_rows", batch.pending_rows_T, -1),
        ("positions", batch.positions_T, 0),
        ("slots", batch.slots_T, -1),
    ):
        array = host[name]
        array[:num_tokens] = values
        array[num_tokens:] = padding
