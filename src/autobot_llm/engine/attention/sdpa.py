"""Paged attention on torch's scaled_dot_product_attention. Knows the cache's slots; knows nothing of models' weights.

Three shapes of work, decided once per step and shared by every layer:

- one sequence that decodes, alone in the step: its keys are a slice of the cache where its blocks lie in a row;
- many sequences that decode: gathered in groups of similar length, padded and masked, one call for each group;
- a sequence with more than one new token: one call, causal from the bottom right, or as the masks of a tree say.

A decoding query has one position, so its H heads become K heads of H/K positions each: no key is copied for the
grouped heads, and no mask is needed within the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.batching.plan import Int32Array, Int64Array, StepBatch, UInt64Array
from autobot_llm.engine.kv_cache.storage import KVStorage, SlotCache
from autobot_llm.engine.models.config import ModelConfig

MAX_PADDING = 2
"""In one group, the longest context has at most so many times the blocks of the shortest."""


# T packed tokens, H query heads, K key/value heads, G = H/K, D head size, L context positions, S sequences in a group
@dataclass(frozen=True, slots=True)
class _Context:
    """Where the keys of one sequence, or of a group padded to one length, lie in the cache.

    Either slots [first_slot, first_slot + num_slots), or the first num_slots slots of `blocks`, to be gathered.
    """

    num_slots: int
    first_slot: int
    blocks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one query each. `rows` None: they are all the rows of the step, in order.

    `masks` holds one additive mask S11L for each sliding window of the model, None where every position is seen.
    """

    rows: torch.Tensor | None
    num_sequences: int
    num_positions: int
    context: _Context
    masks: dict[int, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence with the queries of rows [start, stop). A mask is TL; None stands for plain causal from (0, 0)."""

    start: int
    stop: int
    context: _Context
    masks: dict[int, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class SdpaMetadata:
    """One step's layout: where new keys go, and which rows are computed together."""

    slots_T: torch.Tensor
    single: _Context | None
    groups: tuple[_DecodeGroup, ...]
    spans: tuple[_Span, ...]


@dataclass(frozen=True, slots=True)
class HostBlocks:
    """SwappedBlocks: of each tensor of the cache B blocks as they lay there."""

    content: tuple[torch.Tensor, ...]


class SdpaAttention:
    """AttentionBackend for any device that torch has. It owns a cache of num_blocks * block_size slots.

    `dtype` is what it computes in, `cache_dtype` what keys and values are stored as, if that is something else.
    """

    name = "sdpa"

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        cache_dtype: torch.dtype | None = None,
        sums_attention: bool = False,
    ) -> None:
        self.storage = storage = KVStorage.allocate(
            config, num_blocks, block_size, cache_dtype or dtype, device, sums_attention=sums_attention
        )
        self._block_size = block_size
        self._dtype = dtype
        self._device = torch.device(device)
        self._num_kv_heads = config.num_kv_heads
        self._group_size = config.num_heads // config.num_kv_heads
        self._head_size = config.head_size
        self._window_of = config.sliding_windows
        self._windows = sorted(set(config.sliding_windows))
        self._keys = storage.keys
        self._values = storage.values
        # each with all slots in its first dimension
        parts = [cache for pair in zip(self._keys, self._values, strict=True) for cache in pair]
        self._tensors = [cache.numbers_NKD for cache in parts]
        self._tensors += [cache.scales_NK for cache in parts if cache.scales_NK is not None]
        self._tensors += [] if storage.attention_LNK is None else list(storage.attention_LNK)

    def prepare(self, batch: StepBatch) -> SdpaMetadata:
        slots_T = torch.from_numpy(batch.slots_T).to(self._device)
        if batch.num_sequences == 1 and batch.num_tokens == 1:
            single = self._context(batch.block_tables_SB[0], int(batch.context_lens[0]))
            return SdpaMetadata(slots_T=slots_T, single=single, groups=(), spans=())
        query_lens = np.diff(batch.query_starts)
        spans = tuple(self._span(batch, int(s)) for s in np.flatnonzero(query_lens > 1))
        groups = self._decode_groups(batch, np.flatnonzero(query_lens == 1), is_whole_step=not spans)
        return SdpaMetadata(slots_T=slots_T, single=None, groups=groups, spans=spans)

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, metadata: SdpaMetadata
    ) -> torch.Tensor:
        keys, values, window = self._keys[layer], self._values[layer], self._window_of[layer]
        keys.write(metadata.slots_T, k_TKD)
        values.write(metadata.slots_T, v_TKD)
        if metadata.single is not None:
            return self._attend_single(q_THD, keys, values, metadata.single, window)
        if len(metadata.groups) == 1 and metadata.groups[0].rows is None:
            return self._attend_group(q_THD, keys, values, metadata.groups[0], window)
        out_THD = torch.empty_like(q_THD)
        for group in metadata.groups:
            q_SHD = q_THD if group.rows is None else q_THD.index_select(0, group.rows)
            out_SHD = self._attend_group(q_SHD, keys, values, group, window)
            out_THD.index_copy_(0, group.rows, out_SHD) if group.rows is not None else out_THD.copy_(out_SHD)
        for span in metadata.spans:
            out_THD[span.start : span.stop] = self._attend_span(q_THD, keys, values, span, window)
        return out_THD

    def discard(self, block_ids: list[int]) -> None:
        """Zero these blocks: a masked position still enters attention as 0 * value, which must not be 0 * NaN."""
        blocks = self._to_device(block_ids)
        for tensor in self._tensors:
            self._by_block(tensor).index_fill_(0, blocks, 0)

    def move(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        """Copy slots of every layer to others, all at once."""
        slots_from, slots_to = self._to_device(slots_from_M), self._to_device(slots_to_M)
        for tensor in self._tensors:
            tensor.index_copy_(0, slots_to, tensor.index_select(0, slots_from))

    def copy_out(self, block_ids: Sequence[int]) -> HostBlocks:
        """Copy blocks of every layer to host memory."""
        blocks = self._to_device(block_ids)
        return HostBlocks(tuple(self._by_block(tensor).index_select(0, blocks).cpu() for tensor in self._tensors))

    def copy_in(self, swapped: HostBlocks, block_ids: Sequence[int]) -> None:
        """Write blocks that were copied out to these, as many."""
        blocks = self._to_device(block_ids)
        for tensor, content in zip(self._tensors, swapped.content, strict=True):
            self._by_block(tensor).index_copy_(0, blocks, content.to(self._device))

    def _by_block(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, self._block_size, *tensor.shape[1:])

    def _attend_single(
        self, q_1HD: torch.Tensor, keys: SlotCache, values: SlotCache, context: _Context, window: int
    ) -> torch.Tensor:
        k_LKD, v_LKD = self._gather(keys, context), self._gather(values, context)
        if 0 < window < context.num_slots:
            k_LKD, v_LKD = k_LKD[-window:], v_LKD[-window:]
        q_1KGD = q_1HD.view(1, self._num_kv_heads, self._group_size, self._head_size)
        out_1KGD = F.scaled_dot_product_attention(
            q_1KGD, k_LKD.transpose(0, 1).unsqueeze(0), v_LKD.transpose(0, 1).unsqueeze(0)
        )
        return out_1KGD.reshape(q_1HD.shape)

    def _attend_group(
        self, q_SHD: torch.Tensor, keys: SlotCache, values: SlotCache, group: _DecodeGroup, window: int
    ) -> torch.Tensor:
        num_sequences = group.num_sequences
        shape_SLKD = (num_sequences, group.num_positions, self._num_kv_heads, self._head_size)
        k_SKLD = self._gather(keys, group.context).view(shape_SLKD).transpose(1, 2)
        v_SKLD = self._gather(values, group.context).view(shape_SLKD).transpose(1, 2)
        q_SKGD = q_SHD.view(num_sequences, self._num_kv_heads, self._group_size, self._head_size)
        out_SKGD = F.scaled_dot_product_attention(q_SKGD, k_SKLD, v_SKLD, attn_mask=group.masks[window])
        return out_SKGD.reshape(q_SHD.shape)

    def _attend_span(
        self, q_THD: torch.Tensor, keys: SlotCache, values: SlotCache, span: _Span, window: int
    ) -> torch.Tensor:
        mask_TL = span.masks[window]
        out_1HTD = F.scaled_dot_product_attention(
            q_THD[span.start : span.stop].transpose(0, 1).unsqueeze(0),
            self._gather(keys, span.context).transpose(0, 1).unsqueeze(0),
            self._gather(values, span.context).transpose(0, 1).unsqueeze(0),
            attn_mask=mask_TL,
            is_causal=mask_TL is None,
            enable_gqa=True,
        )
        return out_1HTD[0].transpose(0, 1)

    def _gather(self, cache: SlotCache, context: _Context) -> torch.Tensor:
        """Keys or values of a context, one sequence below the other; a view where they lie in a row."""
        if context.blocks is None:
            return cache.row_of_slots(context.first_slot, context.num_slots)
        return cache.slots_of_blocks(context.blocks, self._block_size).narrow(0, 0, context.num_slots)

    def _context(self, block_table_B: Int32Array, num_positions: int) -> _Context:
        """One sequence's context: a slice of the cache where its blocks lie in a row."""
        num_blocks = -(-num_positions // self._block_size)
        blocks = block_table_B[:num_blocks]
        first = int(blocks[0])
        if int(blocks[-1]) == first + num_blocks - 1 and (num_blocks <= 2 or bool((np.diff(blocks) == 1).all())):
            return _Context(num_positions, first * self._block_size, None)
        return _Context(num_positions, 0, self._to_device(blocks))

    def _decode_groups(
        self, batch: StepBatch, sequences: np.ndarray[tuple[int, ...], np.dtype[np.int64]], *, is_whole_step: bool
    ) -> tuple[_DecodeGroup, ...]:
        if len(sequences) == 0:
            return ()
        num_blocks = -(-batch.context_lens[sequences] // self._block_size)
        order = np.argsort(num_blocks, kind="stable")
        groups: list[_DecodeGroup] = []
        start = 0
        for stop in range(1, len(order) + 1):
            if stop < len(order) and num_blocks[order[stop]] <= MAX_PADDING * num_blocks[order[start]]:
                continue
            members = np.sort(sequences[order[start:stop]])
            groups.append(self._decode_group(batch, members, is_whole_step and len(members) == len(sequences)))
            start = stop
        return tuple(groups)

    def _decode_group(
        self,
        batch: StepBatch,
        members: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        is_whole_step: bool,
    ) -> _DecodeGroup:
        context_lens = batch.context_lens[members]
        num_blocks = -(-int(context_lens.max()) // self._block_size)
        # entries after a sequence's own blocks are 0: some block's finite values, which the mask hides
        blocks = self._to_device(batch.block_tables_SB[members, :num_blocks].ravel())
        num_positions = num_blocks * self._block_size
        last_S1 = torch.from_numpy(context_lens).unsqueeze(1) - 1
        masks = {
            window: self._mask(last_S1, num_positions, window)[:, None, None, :]
            if window or int(context_lens.min()) < num_positions
            else None
            for window in self._windows
        }
        rows = None if is_whole_step else self._to_device(batch.query_starts[members])
        return _DecodeGroup(
            rows=rows,
            num_sequences=len(members),
            num_positions=num_positions,
            context=_Context(len(members) * num_positions, 0, blocks),
            masks=masks,
        )

    def _span(self, batch: StepBatch, sequence: int) -> _Span:
        start, stop = int(batch.query_starts[sequence]), int(batch.query_starts[sequence + 1])
        num_positions = int(batch.context_lens[sequence])
        first_position = num_positions - (stop - start)
        context = self._context(batch.block_tables_SB[sequence], num_positions)
        if batch.tree_masks_T is not None and batch.tree_masks_T[start]:
            masks = self._tree_masks(batch.places[start:stop], batch.tree_masks_T[start:stop], first_position)
            return _Span(start=start, stop=stop, context=context, masks=masks)
        last_T1 = torch.arange(first_position, num_positions).unsqueeze(1)
        masks = {
            window: None
            if first_position == 0 and not 0 < window < num_positions
            else self._mask(last_T1, num_positions, window)
            for window in self._windows
        }
        return _Span(start=start, stop=stop, context=context, masks=masks)

    # T new tokens of one sequence, L slots: those of the first positions, then one for each new token
    def _tree_masks(
        self, places_T: Int32Array, masks_T: UInt64Array, num_before: int
    ) -> dict[int, torch.Tensor | None]:
        """Additive masks TL of a tree, for each sliding window, which counts places on a path, not slots."""
        sees_TT = masks_T[:, None] >> np.arange(len(masks_T), dtype=np.uint64) & np.uint64(1) == 1
        sees_TL = np.concatenate((np.ones((len(masks_T), num_before), np.bool_), sees_TT), axis=1)
        distances_TL = places_T[:, None] - np.concatenate((np.arange(num_before), places_T))
        return {
            window: self._additive(torch.from_numpy(~(sees_TL & (distances_TL < window)) if window else ~sees_TL))
            for window in self._windows
        }

    def _mask(self, last_R1: torch.Tensor, num_positions: int, window: int) -> torch.Tensor:
        """Additive mask RL: row r sees positions up to last_R1[r], and with a window only that many of them."""
        positions_L = torch.arange(num_positions)
        hidden_RL = positions_L > last_R1
        if window:
            hidden_RL |= positions_L <= last_R1 - window
        return self._additive(hidden_RL)

    def _additive(self, hidden_RL: torch.Tensor) -> torch.Tensor:
        mask_RL = torch.zeros(hidden_RL.shape, dtype=self._dtype).masked_fill_(hidden_RL, float("-inf"))
        return mask_RL.to(self._device)

    def _to_device(self, indices: Int32Array | Int64Array | Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(indices, np.int64)).to(self._device)
