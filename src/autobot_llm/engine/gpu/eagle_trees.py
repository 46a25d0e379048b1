"""EAGLE-3's drafts on a GPU: one captured graph from the target's features to the finished tree, and one answer to the
host. Knows the draft's passes, its cache and a stream; knows nothing of sequences.

Level after level is one short pass over the draft's layer, and what the next pass reads follows from the last one's
logits on the device (kernels/gpu/draft_tree.py), so nothing waits in between. All runs on the target's own stream: what
the target kept is there, and kernels that split their inputs share memory, which no two of them may use at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, ItemCut, PagedBatch, full_load
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.gpu.eagle_decoder import EagleDecoder, EagleTokens
from autobot_llm.engine.gpu.eagle_steps import (
    MAX_DEPTH,
    NUM_BRANCHES,
    SIZES,
    Arrays,
    draft_layout,
    fill_draft,
    levels_layout,
    num_tree_rows,
    root_rows,
)
from autobot_llm.engine.gpu.graph_sizes import BYTES_PER_GRAPH, MAX_ROWS, padded_size
from autobot_llm.engine.gpu.graphs import CUDAGraphManager
from autobot_llm.engine.gpu.options import DraftPlace
from autobot_llm.engine.gpu.staging import FetchedStaging, Layout, Staging
from autobot_llm.engine.kernels.gpu.draft_levels import write_levels
from autobot_llm.engine.kernels.gpu.draft_tree import CHOICE_FIELDS, Draws, TreeGrower
from autobot_llm.engine.kernels.gpu.launch import compile_ahead
from autobot_llm.engine.kv_cache.storage import PagedStorage, bytes_per_block
from autobot_llm.engine.speculative.eagle.model import EagleDraft
from autobot_llm.engine.speculative.eagle.on_device import Roots, Streams, Taken, Tree
from autobot_llm.errors import ConfigurationError

log = logging.getLogger(__name__)

_SHARE_FOR_CACHE = 4
"""The draft's cache takes a fourth of what the target and the draft's weights leave."""

_MOST_CHOSEN = 63  # nodes of a tree beside its root

_TOKENS = ("ids", "positions", "slots")
_DRAWS = ("is_drawn", "keys", "temperature", "top_k", "top_p", "min_p")


# T packed tokens, F three times the target's hidden size, S sequences
@dataclass(frozen=True, slots=True)
class _Draft:
    """A draft of a size: how many bytes of arrays it brings, views of them in every slot of the host's ring, and its
    passes over them on the device."""

    key: str
    num_bytes: int
    slots: tuple[Arrays, ...]
    padding: npt.NDArray[np.uint8]
    passes: Callable[[torch.Tensor], torch.Tensor]


class EagleTrees:
    """EagleDevice in the fused kernels. `max_tokens` bounds what is taken in at a time, `most_streams` the rows of a
    step whose features a draft finds where they are; positions lie below `max_context`."""

    max_sequences = SIZES[-1]

    def __init__(
        self,
        decoder: EagleDecoder,
        attention: TritonPagedAttention,
        target_ids_W: torch.Tensor,
        *,
        stream: torch.cuda.Stream,
        shape: AttentionShape,
        max_depth: int,
        max_tokens: int,
        max_context: int,
        stream_width: int,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_depth = min(max_depth, MAX_DEPTH)
        self.graphs: CUDAGraphManager[torch.Tensor] = CUDAGraphManager(warmup_steps=1)
        self._uses_graphs = False
        self._decoder = decoder
        self._attention = attention
        self._stream = stream
        self._window = shape.widest_window
        device = decoder.device
        table_width = -(-(max_context + num_tree_rows(self.max_depth)) // BLOCK_SIZE)
        spare_items = full_load(shape.num_kv_heads, torch.cuda.get_device_properties(device).multi_processor_count)
        self._layouts = {size: draft_layout(size, table_width=table_width, spare_items=spare_items) for size in SIZES}
        levels = levels_layout(SIZES[-1], self.max_depth, spare_items=spare_items)
        self._item_cut = ItemCut()
        with torch.cuda.stream(stream):
            self._grower = TreeGrower(
                target_ids_W.int(),
                max_sequences=SIZES[-1],
                num_branches=NUM_BRANCHES,
                max_depth=self.max_depth,
            )
            self._staging = FetchedStaging(self._layouts[SIZES[-1]].num_bytes, device)
            self._tokens_staging = Staging(_tokens_layout(max_tokens).num_bytes, device)
            shape_in = (max(MAX_ROWS, *(size * root_rows(size) for size in SIZES)), stream_width)
            self._streams_in = torch.zeros(shape_in, dtype=decoder.dtype, device=device)
            level_bytes = torch.zeros(levels.num_bytes, dtype=torch.uint8, device=device)
        chosen = torch.zeros((SIZES[-1], _MOST_CHOSEN, CHOICE_FIELDS), dtype=torch.int32, pin_memory=True)
        self._chosen_SN3, self._chosen = chosen, chosen.numpy()
        self._arrived = torch.cuda.Event()
        self._drafts = {
            (size, depth): self._draft(size, depth, levels_layout(size, depth, spare_items=spare_items), level_bytes)
            for size in SIZES
            for depth in range(1, self.max_depth + 1)
        }

    def most_root_rows(self, num_sequences: int) -> int:
        return root_rows(padded_size(num_sequences, SIZES) or SIZES[-1])

    def num_tree_rows(self, depth: int) -> int:
        return num_tree_rows(depth)

    def prepare(self, *, uses_graphs: bool) -> None:
        """Meet every kernel, and capture every draft, the largest first."""
        with compile_ahead(self._decoder.device):
            self._run_all()
            self._take_in_nothing()
        self._take_in_nothing()
        self._uses_graphs = uses_graphs
        self._run_all()

    def keep(self, streams: list[Streams]) -> torch.Tensor:
        with torch.cuda.stream(self._stream), torch.no_grad():
            return torch.cat(_slices(streams))

    def take_in(self, taken: Taken) -> None:
        with torch.cuda.stream(self._stream), torch.no_grad():
            parts = _slices(taken.streams)
            self._take_in(parts[0] if len(parts) == 1 else torch.cat(parts), taken)

    def grow(self, taken: Taken, roots: Roots, depth: int, num_nodes: int) -> list[Tree]:
        num_sequences = len(roots.context_lens_S)
        size = padded_size(num_sequences, SIZES)
        assert size is not None and len(taken.ids_T) <= size * root_rows(size)
        draft = self._drafts[size, depth]
        num_chosen = min(num_nodes, _MOST_CHOSEN, self._grower.num_nodes(depth))
        with torch.cuda.stream(self._stream), torch.no_grad():
            stream_rows = self._bring(taken.streams)
            slot = self._staging.next_slot()
            host = draft.slots[slot]
            fill_draft(host, taken, stream_rows, roots, num_chosen, cut=self._item_cut, window=self._window)
            self._run(draft)
            self._staging.mark_queued()
            self._arrived.record(self._stream)
        self._arrived.synchronize()
        chosen_SN3 = self._chosen[:num_sequences, :num_chosen]
        tokens, parents = chosen_SN3[..., 0].tolist(), chosen_SN3[..., 1].tolist()
        return list(map(Tree, tokens, parents, chosen_SN3[..., 2].view(np.float32).tolist()))

    def close(self) -> None:
        """Give the device's memory back, whoever still holds this object."""
        self._stream.synchronize()
        self.graphs.clear()
        self.__dict__.pop("_decoder", None)
        self.__dict__.pop("_attention", None)

    def _bring(self, streams: list[Streams]) -> list[int]:
        """Queue the copy of features to where drafts read them; returns the tokens' rows there."""
        first = streams[0].streams_TF
        if len(first) <= len(self._streams_in) and all(each.streams_TF is first for each in streams):
            self._streams_in[: len(first)].copy_(first)
            return [row for each in streams for row in each.rows]
        parts = _slices(streams)
        num_rows = sum(map(len, parts))
        torch.cat(parts, out=self._streams_in[:num_rows])
        return list(range(num_rows))

    def _take_in(self, streams_TF: torch.Tensor, taken: Taken) -> None:
        layout = _tokens_layout(len(taken.ids_T))
        host = layout.on_host(self._tokens_staging.next_host_buffer())
        for name, values in zip(_TOKENS, (taken.ids_T, taken.positions_T, taken.slots_T), strict=True):
            host[name][:] = values
        self._tokens_staging.upload(layout.num_bytes)
        arrays = layout.on_device(self._tokens_staging.on_device)
        self._decoder.take_in(streams_TF, EagleTokens(*(arrays[name] for name in _TOKENS)))

    def _draft(self, size: int, depth: int, levels: Layout, level_bytes: torch.Tensor) -> _Draft:
        layout, staging = self._layouts[size], self._staging
        chosen_SN3 = self._chosen_SN3[:size]
        grow = tree_passes(
            self._decoder,
            self._grower,
            self._attention,
            layout.on_device(staging.on_device),
            levels.on_device(level_bytes),
            depth,
        )

        def passes(_buffer: torch.Tensor) -> torch.Tensor:
            staging.fetch(layout.num_bytes)
            grow(self._streams_in, chosen_SN3)
            return chosen_SN3

        slots = tuple(layout.on_host(slot) for slot in staging.slots)
        padding = np.zeros(layout.num_bytes, np.uint8)
        for name, array in layout.on_host(padding).items():
            array[...] = -1 if name in ("items", "slots") else 0
        return _Draft(f"{size} trees of {depth}", layout.num_bytes, slots, padding, passes)

    def _run(self, draft: _Draft) -> None:
        if self._uses_graphs:
            self.graphs.capture(draft.key, draft.passes, self._staging.on_device)
        else:
            draft.passes(self._staging.on_device)

    def _run_all(self) -> None:
        """Every draft, for no sequence."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            for draft in reversed(self._drafts.values()):
                self._staging.fill_all(draft.padding)
                self._run(draft)
                self._stream.synchronize()
            self._staging.resume()

    def _take_in_nothing(self) -> None:
        """Numbers of tokens that lead to kernels of their own, none of which is written to the cache."""
        for num_tokens in {min(1 << i, self.max_tokens) for i in range(self.max_tokens.bit_length() + 1)}:
            zeros = np.zeros(num_tokens, np.int32)
            streams_TF = self._streams_in.new_zeros((num_tokens, self._streams_in.shape[1]))
            self.take_in(Taken([Streams(streams_TF, range(num_tokens))], zeros, zeros, zeros - 1))


def tree_passes(
    decoder: EagleDecoder,
    grower: TreeGrower,
    attention: TritonPagedAttention,
    root: Mapping[str, torch.Tensor],
    levels: Mapping[str, torch.Tensor],
    depth: int,
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A function of features and of where the chosen nodes go (`TreeGrower.choose`): it runs every pass of a draft over
    arrays of `draft_layout` and `levels_layout`, of which it fills the latter, and may be captured."""
    attend = partial(PagedBatch, root["block_tables"])
    root_metadata = attention.prepare_captured(attend(root["items"], 1), {})
    tree_rows, nodes, metadata = list[torch.Tensor](), list[tuple[torch.Tensor, torch.Tensor]](), []
    for level in range(depth - 1):
        tree_rows.append(levels["tree_rows"][level])
        nodes.append((levels["positions"][level], levels["slots"][level]))
        batch = attend(levels["items"][level], NUM_BRANCHES, tree_rows_T4=tree_rows[level])
        metadata.append(attention.prepare_captured(batch, {}))
    tokens = EagleTokens(*(root[name] for name in _TOKENS))
    draws = Draws(*(root[name] for name in _DRAWS))

    def passes(streams_in: torch.Tensor, chosen_SN3: torch.Tensor) -> None:
        if depth > 1:
            write_levels(root, levels, NUM_BRANCHES)
        streams_TF = streams_in.index_select(0, root["stream_rows"])
        logits = decoder.begin(streams_TF, tokens, root["last_rows"], root_metadata)
        for level in range(depth - 1):
            frontier = grower.grow(level, logits, draws, tree_rows[level])
            assert frontier is not None
            logits = decoder.go_on(EagleTokens(frontier.ids_M, *nodes[level]), frontier.rows_M, metadata[level])
        grower.grow(depth - 1, logits, draws, None)
        grower.choose(depth, root["num_chosen"], chosen_SN3)

    return passes


def build_eagle_trees(
    draft: EagleDraft, place: DraftPlace, *, max_depth: int, num_blocks: int, name: str
) -> tuple[EagleTrees, int]:
    """The draft, which is on the device already, and its number of cache blocks: at most `num_blocks`. Raises
    ConfigurationError where what the target left does not suffice."""
    layer, limits = draft.config.layer, place.limits
    embed_VE = place.embeddings.embed_VE
    device, dtype = embed_VE.device, embed_VE.dtype
    block_bytes = bytes_per_block(layer, BLOCK_SIZE, dtype)
    max_depth = min(max_depth, MAX_DEPTH)
    graph_bytes = BYTES_PER_GRAPH * max_depth * len(SIZES) if place.uses_graphs else 0
    room = torch.cuda.mem_get_info(device)[0] - graph_bytes
    num_blocks = min(num_blocks, room // _SHARE_FOR_CACHE // block_bytes)
    least = -(-(limits.max_model_len + num_tree_rows(max_depth)) // BLOCK_SIZE)
    if num_blocks < least:
        raise ConfigurationError(
            f"{name}: the GPU has no room for the draft's cache of {least * block_bytes / 2**20:,.0f} MiB beside the "
            "model: set AUTOBOT_GPU_MEMORY_UTILIZATION or AUTOBOT_MAX_MODEL_LEN lower"
        )
    storage = PagedStorage.allocate(layer, num_blocks, BLOCK_SIZE, dtype, device)
    shape = AttentionShape(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.sliding_windows)
    attention = TritonPagedAttention(
        shape, storage.keys, storage.values, max_sequences=SIZES[-1], reason="trees are attended by our own kernels"
    )
    decoder = EagleDecoder(
        draft,
        embed_VE,
        storage,
        attention,
        max_context=limits.max_model_len,
        max_rows=SIZES[-1] * NUM_BRANCHES,
        rounds=True,
    )
    trees = EagleTrees(
        decoder,
        attention,
        draft.target_ids,
        stream=place.stream,
        shape=shape,
        max_depth=max_depth,
        max_tokens=limits.max_num_batched_tokens,
        max_context=limits.max_model_len,
        stream_width=draft.fc.in_features,
    )
    trees.prepare(uses_graphs=place.uses_graphs)
    log.info("%s: %d cache blocks of %d bytes", name, num_blocks, block_bytes)
    return trees, num_blocks


def _slices(streams: list[Streams]) -> list[torch.Tensor]:
    """Views of the rows: one for each run of them."""
    found = []
    for streams_TF, rows in streams:
        cuts = [0, *(i + 1 for i, (row, after) in enumerate(pairwise(rows)) if after != row + 1), len(rows)]
        found += [streams_TF[rows[start] : rows[end - 1] + 1] for start, end in pairwise(cuts)]
    return found


def _tokens_layout(num_tokens: int) -> Layout:
    return Layout.of(dict.fromkeys(_TOKENS, ((num_tokens,), np.int32)))
