"""Run steps on a CUDA device beside the host. Knows a step's arrays, graphs and copies; knows nothing of scheduling.

A step in which every sequence gets one token is a captured graph, padded to the next captured size; so is one with few
tokens of prompts, which would take longer to launch than to compute; every other step is launched kernel by kernel. All
queue their arrays, the kernels and the sampling, and return: the host plans the next step meanwhile, and the tokens of
this one go into it without ever leaving the device.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from functools import partial
from typing import Any

import numpy as np
import torch

from autobot_llm.engine.attention.paged import PagedAttention, full_load
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.description import GpuDescription
from autobot_llm.engine.executor import NO_FEATURES, FeatureKinds, Features, SamplingArrays, Unverified
from autobot_llm.engine.gpu.chains import ChainGraph, ChainGraphs, run
from autobot_llm.engine.gpu.chains import padding_of as padding_of_chain
from autobot_llm.engine.gpu.decoder import DecoderInputs, FusedDecoder
from autobot_llm.engine.gpu.features import copy_of, first_of, room_for
from autobot_llm.engine.gpu.graph_sizes import MAX_ROWS, decode_graph_sizes, most_chain_rows
from autobot_llm.engine.gpu.graphs import CUDAGraphManager
from autobot_llm.engine.gpu.moves import SlotMover
from autobot_llm.engine.gpu.options import ChainPlace, GpuLimits
from autobot_llm.engine.gpu.results import LaunchedChainRows, LaunchedRows, ResultRing, ResultRows
from autobot_llm.engine.gpu.staging import FetchedStaging, Layout, Staging
from autobot_llm.engine.gpu.step_graphs import (
    PROMPTS,
    Arrays,
    StepGraph,
    StepGraphs,
    fill_tokens,
    inputs_of,
    padding_of,
    token_shapes,
)
from autobot_llm.engine.gpu.swap import BlockSwapper
from autobot_llm.engine.kernels.gpu.exchange import NUM_SLOTS, send
from autobot_llm.engine.kernels.gpu.sampling import DeviceSampler, SamplingTensors
from autobot_llm.engine.kv_cache.storage import PagedStorage
from autobot_llm.engine.models.embeddings import Embeddings


# T packed tokens, R sampled rows, V vocabulary
class GpuExecutor:
    """ChainExecutor and BlockCopier on one CUDA device. `reason` says why it was chosen.

    Steps keep the `features` that were asked for when this was made; their tensors belong to `stream`, the one that
    runs the steps: who works on them there has nothing to wait for. It is one of its own unless one is given.
    `device_wait_seconds` adds up the time that the
    host has waited for the device. Before `capture`, and with `uses_graphs` false, every step is launched kernel by
    kernel. There are chains where there is a `chain` place for them, from `capture` on.
    """

    name = "gpu"
    description: GpuDescription  # given by the builder, once everything is captured

    def __init__(
        self,
        decoder: FusedDecoder,
        storage: PagedStorage,
        attention: PagedAttention,
        limits: GpuLimits,
        *,
        vocab_size: int,
        widest_window: int,
        uses_graphs: bool,
        reason: str,
        features: FeatureKinds = NO_FEATURES,
        quantization: str | None = None,
        stream: torch.cuda.Stream | None = None,
        chain: ChainPlace | None = None,
    ) -> None:
        self.feature_kinds = features
        self.reason = reason
        self.quantization = quantization
        self._is_closed = False
        self.device_wait_seconds = 0.0
        self.limits = limits
        self.attention = attention
        self.graphs: CUDAGraphManager[torch.Tensor] = CUDAGraphManager(warmup_steps=1)
        self._device = decoder.device
        self._decoder = decoder
        self._storage = storage
        # A stream of our own: on the default one, whatever else the program does would wait for our steps.
        self.stream = stream or (chain and chain.stream) or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self.stream):
            max_rows = max(_most_rows(limits), *decode_graph_sizes(limits.max_num_seqs))  # a graph's padding, too
            self._sampler = DeviceSampler(vocab_size, max_rows, self._device, num_draft_rows=most_chain_rows())
            num_processors = torch.cuda.get_device_properties(self._device).multi_processor_count
            self._staging = Staging(_eager_layout(limits).num_bytes, self._device)
            self._takes_trees = features != NO_FEATURES and isinstance(attention, TritonPagedAttention)
            self._steps = StepGraphs(
                limits,
                attention,
                table_width=-(-limits.max_model_len // storage.block_size),
                num_spare_items=full_load(storage.num_kv_heads, num_processors),
                num_spare_items_if_long=full_load(storage.num_kv_heads, num_processors, is_long=True),
                window=widest_window,
                takes_trees=self._takes_trees,
            )
            self._chain_place, self._chains = chain, None
            if chain is not None and uses_graphs and isinstance(attention, TritonPagedAttention):
                self._chains = ChainGraphs(
                    attention,
                    chain.tokens_R,
                    chain.first_row,
                    longest=chain.longest,
                    max_num_seqs=limits.max_num_seqs,
                    table_width=-(-limits.max_model_len // storage.block_size),
                    num_spare_items=full_load(storage.num_kv_heads, num_processors),
                )
            num_bytes = max(self._steps.num_bytes, 0 if self._chains is None else self._chains.num_bytes)
            self._graph_staging = FetchedStaging(num_bytes if uses_graphs else 0, self._device)
            if uses_graphs:
                self._steps.bind(self._graph_staging, self._sampler.tokens_R)
            if self._chains is not None:
                self._chains.bind(self._graph_staging.slots, self._graph_staging.on_device)
            self._sampling_staging = Staging(_sampling_layout(_most_rows(limits)).num_bytes, self._device)
            # where captured steps keep features: each overwrites those of the one before
            self._kept = self._room_for_features(
                max((graph.num_tokens for graph in self._steps.all), default=0),
                max((graph.num_rows for graph in self._steps.all), default=0),
            )
        self._most_tokens = limits.max_num_batched_tokens
        # What a graph sends goes to the slot that the device counts, so launched steps have slots of their own.
        self._graph_results, self._results = ResultRing(max(max_rows, most_chain_rows())), ResultRing(max_rows)
        self._turn = 0
        self._swapper = BlockSwapper(storage, self.stream)
        self.copy_out = self._swapper.copy_out
        self.copy_in = self._swapper.copy_in
        if self._takes_trees:  # without the method this is no TreeExecutor
            self._mover = SlotMover(storage, decoder.head_size, self.stream)
            self.move = self._mover.move

    @property
    def embeddings(self) -> Embeddings:
        """What the steps embed and project with, on the device."""
        return self._decoder.embeddings

    def capture(self, on_progress: Callable[[int, int], None]) -> None:
        """Capture every size of step that is replayed; `on_progress` gets (captured, in all).

        Largest first, because the smaller ones then fit into the memory that it left in the pool.
        """
        with torch.cuda.stream(self.stream), torch.no_grad():
            graphs = sorted(self._steps.all, key=lambda graph: graph.num_tokens, reverse=True)
            chains = [] if self._chains is None else self._chains.all
            for i, graph in enumerate(graphs):
                self._replay(graph, self._fill_with_padding(graph))
                self.stream.synchronize()
                on_progress(i + 1, len(graphs) + len(chains))
            for i, chain in enumerate(chains, len(graphs)):
                self._graph_staging.fill_all(padding_of_chain(chain))
                self._replay_chain(chain)
                self.stream.synchronize()
                on_progress(i + 1, len(graphs) + len(chains))
            if graphs:
                self._graph_staging.resume()
        self._steps.is_captured = bool(graphs)
        if self._chains is not None:
            self._chains.is_captured = True

    def rehearse(self) -> None:
        """Launch what `capture` would record, and attention of every size, so that their kernels are met."""
        with torch.cuda.stream(self.stream), torch.no_grad():
            if isinstance(self.attention, TritonPagedAttention):
                self.attention.rehearse(self._decoder.dtype)
            for graph in self._steps.all:
                self._recorded_step(graph, self._fill_with_padding(graph))(self._graph_staging.on_device)
            for chain in [] if self._chains is None else self._chains.all:
                self._graph_staging.fill_all(padding_of_chain(chain))
                self._recorded_chain(chain)(self._graph_staging.on_device)
            if self._takes_trees:
                self._mover.rehearse()
            self.stream.synchronize()

    def _note_waited(self, seconds: float) -> None:
        self.device_wait_seconds += seconds

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> LaunchedRows:
        """Queue a step and its sampling, and return at once."""
        num_rows = len(batch.logit_rows_R)
        with torch.cuda.stream(self.stream), torch.no_grad():
            logits_RV, rows, features = self._forward(batch)
            if rows is None or sampling.any_drawn:
                rows = self._sample(logits_RV, sampling, num_rows)
            rows.arrived.record(self.stream)
            return LaunchedRows(rows, num_rows, features, self._note_waited)

    @property
    def tokens(self) -> torch.Tensor:
        """What the last step sampled, and from `first_draft_row` on what a draft leaves for later steps."""
        return self._sampler.tokens_R

    @property
    def first_draft_row(self) -> int:
        return self._sampler.max_rows

    def takes_chain(self, num_missing: SequenceABC[int], num_passes: int) -> bool:
        return self._chains is not None and self._chains.find(num_missing, num_passes, is_drawn=False) is not None

    def launch_chain(
        self,
        batch: StepBatch,
        sampling: SamplingArrays,
        num_passes: int,
        after: Unverified | None = None,
        before: SequenceABC[StepBatch] = (),
    ) -> LaunchedChainRows:
        assert self._chains is not None and self._chain_place is not None
        num_missing = np.diff(batch.query_starts).tolist()
        chain = self._chains.find(num_missing, num_passes, is_drawn=sampling.any_drawn)
        assert chain is not None, f"{num_passes} passes after {num_missing} tokens are not captured"
        with torch.cuda.stream(self.stream), torch.no_grad():
            begun = torch.cuda.Event(enable_timing=True)
            begun.record(self.stream)
            for one in before:
                self._forward(one, copies_features=False)
            slot = self._graph_staging.next_slot()
            self._chains.fill(chain, slot, batch, sampling, after)
            result = self._graph_results.slots[slot]
            self._replay_chain(chain)
            self._graph_staging.mark_queued()
            result.arrived.record(self.stream)
        return LaunchedChainRows(
            result, begun, chain.rows(batch.num_sequences), self._chain_place.first_row, self._note_waited
        )

    def room_for_drafts(self, num_sequences: int) -> int:
        """As many as a captured step has: launching one kernel by kernel takes longer than drafts save."""
        if num_sequences > self._steps.max_prompts:
            return 0
        sizes = [size for size in self._steps.sizes(PROMPTS) if size <= MAX_ROWS] or [min(MAX_ROWS, self._most_tokens)]
        return max(0, sizes[-1] - num_sequences)

    def execute(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 logits_RV on the device, valid until the next step."""
        return self.execute_with_features(batch, NO_FEATURES)[0]

    def execute_with_features(self, batch: StepBatch, wanted: FeatureKinds) -> tuple[torch.Tensor, Features]:
        """The same with the features, which must be those that are kept or none."""
        assert wanted in (self.feature_kinds, NO_FEATURES), f"{wanted} of an executor that keeps {self.feature_kinds}"
        with torch.cuda.stream(self.stream), torch.no_grad():
            logits_RV, _, features = self._forward(batch, copies_features=wanted == self.feature_kinds)
        # the caller works on its own stream
        torch.cuda.current_stream(self._device).wait_stream(self.stream)
        return logits_RV, features

    def hidden(self, batch: StepBatch) -> torch.Tensor:
        """Run one step, not from a graph. Returns float32 hidden_RE on the device, valid until the next step."""
        with torch.cuda.stream(self.stream), torch.no_grad():
            hidden_RE = self._run_eagerly(batch, self._decoder.hidden)
        torch.cuda.current_stream(self._device).wait_stream(self.stream)
        return hidden_RE

    def discard(self, block_ids: list[int]) -> None:
        with torch.cuda.stream(self.stream):
            blocks = torch.tensor(block_ids, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)
            self._storage.cache_L2BK.index_fill_(2, blocks, 0)

    def close(self) -> None:
        """Give the device's memory back, whoever still holds this object. Closing twice does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.stream.synchronize()
        self.graphs.clear()
        del self._decoder, self._storage, self._steps, self._chains, self._kept, self._swapper, self.attention
        del self.copy_out, self.copy_in
        if self._takes_trees:
            del self._mover, self.move

    def _sample(self, logits_RV: torch.Tensor, sampling: SamplingArrays, num_rows: int) -> ResultRows:
        """Queue the sampling of a launched step, or of one that is to be drawn from."""
        rows = self._results.slots[self._turn]
        self._turn = (self._turn + 1) % NUM_SLOTS
        if num_rows:
            tensors = self._upload_sampling(sampling) if sampling.any_drawn else None
            self._sampler.sample(
                logits_RV, tensors, any_drawn=sampling.any_drawn, any_restricted=sampling.any_restricted
            )
            send(self._sampler.tokens_R, self._sampler.bests_R, rows.tokens_pinned, rows.bests_pinned, num_rows)
        return rows

    def _forward(
        self, batch: StepBatch, *, copies_features: bool = True
    ) -> tuple[torch.Tensor, ResultRows | None, Features]:
        """Logits_RV, where a graph sends each row's best token, and features."""
        graph = self._steps.find(batch)
        num_tokens, num_rows = batch.num_tokens, len(batch.logit_rows_R)
        if graph is None:
            features = self._room_for_features(num_tokens, num_rows)
            return self._run_eagerly(batch, partial(self._decoder.forward, kept=features)), None, features
        slot = self._graph_staging.next_slot()
        host = self._steps.fill(graph, slot, batch)
        logits_RV = self._replay(graph, host)
        self._graph_staging.mark_queued()
        features = copy_of(first_of(self._kept, num_tokens, num_rows)) if copies_features else Features()
        return logits_RV[:num_rows], self._graph_results.slots[slot], features

    def _replay(self, graph: StepGraph, host: Arrays) -> torch.Tensor:
        return self.graphs.capture(graph.key, self._recorded_step(graph, host), self._graph_staging.on_device)

    def _replay_chain(self, chain: ChainGraph) -> torch.Tensor:
        return self.graphs.capture(chain.key, self._recorded_chain(chain), self._graph_staging.on_device)

    def _recorded_chain(self, chain: ChainGraph) -> Callable[[torch.Tensor], torch.Tensor]:
        chains = self._chains
        assert chains is not None

        def passes(_buffer: torch.Tensor) -> torch.Tensor:
            self._graph_staging.fetch(chain.layout.num_bytes)
            logits_RV = run(chain, self._decoder, self._sampler, chains.tokens_R)
            ring, turn = self._graph_results, self._graph_staging.device_turn
            send(chains.drafts_R, chains.bests_R, ring.tokens_pinned, ring.bests_pinned, chain.num_rows, turn=turn)
            return logits_RV

        return passes

    def _recorded_step(self, graph: StepGraph, host: Arrays) -> Callable[[torch.Tensor], torch.Tensor]:
        metadata = graph.prompts if graph.batch is None else self.attention.prepare_captured(graph.batch, host)

        def step(_buffer: torch.Tensor) -> torch.Tensor:
            self._graph_staging.fetch(graph.layout.num_bytes)
            kept = first_of(self._kept, graph.num_tokens, graph.num_rows)
            logits_RV = self._decoder.forward(graph.inputs, metadata, kept)
            tokens_R, bests_R = self._sampler.sample(logits_RV)
            ring, turn = self._graph_results, self._graph_staging.device_turn
            send(tokens_R, bests_R, ring.tokens_pinned, ring.bests_pinned, graph.num_rows, turn=turn)
            return logits_RV

        return step

    def _fill_with_padding(self, graph: StepGraph) -> Arrays:
        """A step without any sequence in every slot: what is captured must be valid, and must not touch the cache."""
        padding, host = padding_of(graph)
        self._graph_staging.fill_all(padding)
        return host

    def _run_eagerly(self, batch: StepBatch, compute: Callable[[DecoderInputs, Any], torch.Tensor]) -> torch.Tensor:
        all_rows = len(batch.logit_rows_R) == batch.num_tokens
        shapes = token_shapes(batch.num_tokens)
        if not all_rows:
            shapes["logit_rows"] = ((len(batch.logit_rows_R),), np.int32)
        layout = Layout.of(shapes)
        host = layout.on_host(self._staging.next_host_buffer())
        fill_tokens(host, batch)
        if not all_rows:
            host["logit_rows"][:] = batch.logit_rows_R
        self._staging.upload(layout.num_bytes)
        inputs = inputs_of(layout.on_device(self._staging.on_device), self._sampler.tokens_R)
        return compute(inputs, self.attention.prepare(batch))

    def _room_for_features(self, num_tokens: int, num_rows: int) -> Features:
        decoder = self._decoder
        return room_for(self.feature_kinds, num_tokens, num_rows, decoder.hidden_size, decoder.dtype, self._device)

    def _upload_sampling(self, sampling: SamplingArrays) -> SamplingTensors:
        layout = _sampling_layout(len(sampling.is_drawn_R))
        host = layout.on_host(self._sampling_staging.next_host_buffer())
        for name, array in host.items():
            values = getattr(sampling, name)
            array[:] = values.view(np.int64) if values.dtype == np.uint64 else values
        self._sampling_staging.upload(layout.num_bytes)
        return SamplingTensors(**layout.on_device(self._sampling_staging.on_device))


def _eager_layout(limits: GpuLimits) -> Layout:
    """Room for the largest step that is not captured."""
    rows = {"logit_rows": ((_most_rows(limits),), np.int32)}
    return Layout.of(token_shapes(limits.max_num_batched_tokens) | rows)


def _most_rows(limits: GpuLimits) -> int:
    """Logits that a step may want: one for each sequence, or those of drafts."""
    return max(limits.max_num_seqs, min(MAX_ROWS, limits.max_num_batched_tokens))


def _sampling_layout(num_rows: int) -> Layout:
    shape = (num_rows,)
    return Layout.of(
        {
            "keys_R": (shape, np.int64),
            "is_drawn_R": (shape, np.int32),
            "temperature_R": (shape, np.float32),
            "top_k_R": (shape, np.int32),
            "top_p_R": (shape, np.float32),
            "min_p_R": (shape, np.float32),
        }
    )
