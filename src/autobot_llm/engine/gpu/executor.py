"""Run steps on a CUDA device beside the host. Knows a step's arrays, graphs and copies; knows nothing of scheduling.

A step in which every sequence gets one token is a captured graph, padded to the next captured size; so is one with few
tokens of prompts, which would take longer to launch than to compute; every other step is launched kernel by kernel. All
queue their arrays, the kernels and the sampling, and return: the host plans the next step meanwhile, and the tokens of
this one go into it without ever leaving the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
    max_items,
)
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.description import GpuDescription
from autobot_llm.engine.executor import SampledRows, SamplingArrays
from autobot_llm.engine.gpu.decoder import DecoderInputs, FusedDecoder
from autobot_llm.engine.gpu.graph_sizes import (
    MAX_PROMPTS,
    MAX_ROWS,
    decode_graph_sizes,
    num_logit_rows,
    padded_size,
    prompt_graph_sizes,
)
from autobot_llm.engine.gpu.graphs import CUDAGraphManager
from autobot_llm.engine.gpu.options import GpuLimits
from autobot_llm.engine.gpu.staging import FetchedStaging, Layout, Staging
from autobot_llm.engine.gpu.swap import BlockSwapper
from autobot_llm.engine.kernels.gpu.exchange import NUM_SLOTS, send
from autobot_llm.engine.kernels.gpu.sampling import DeviceSampler, SamplingTensors
from autobot_llm.engine.kv_cache.storage import PagedStorage

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _StepGraph:
    """What a captured step reads: its arrays' layout, views of them in every slot of the host's ring, and tensors.

    `batch` is attention's view where every sequence gets one token; for steps with prompts, `prompts` is its metadata.
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


class _Launched:
    """A queued step. `wait` reads its tokens from the page-locked rows that the device copies them to."""

    def __init__(self, executor: GpuExecutor, rows: _ResultRows, num_rows: int) -> None:
        self._executor = executor
        self._rows = rows
        self._num_rows = num_rows

    def wait(self) -> SampledRows:
        start = time.perf_counter()
        self._rows.arrived.synchronize()
        self._executor.device_wait_seconds += time.perf_counter() - start
        num_rows = self._num_rows
        return SampledRows(self._rows.tokens[:num_rows].tolist(), self._rows.bests[:num_rows].tolist())


class _ResultRows:
    """A step's tokens and best logits in page-locked memory."""

    def __init__(self, tokens_R: torch.Tensor, bests_R: torch.Tensor) -> None:
        self.tokens_pinned, self.bests_pinned = tokens_R, bests_R
        self.tokens, self.bests = tokens_R.numpy(), bests_R.numpy()
        self.arrived = torch.cuda.Event()


class _ResultRing:
    """Room for the results of as many steps as may be under way."""

    def __init__(self, max_rows: int) -> None:
        self.tokens_pinned = torch.zeros((NUM_SLOTS, max_rows), dtype=torch.int32, pin_memory=True)
        self.bests_pinned = torch.zeros((NUM_SLOTS, max_rows), dtype=torch.float32, pin_memory=True)
        self.slots = [_ResultRows(*slot) for slot in zip(self.tokens_pinned, self.bests_pinned, strict=True)]


# T packed tokens, R sampled rows, V vocabulary
class GpuExecutor:
    """PipelinedExecutor and BlockCopier on one CUDA device. `reason` says why it was chosen.

    `device_wait_seconds` adds up the time that the host has waited for the device. Before `capture`, and with
    `uses_graphs` false, every step is launched kernel by kernel.
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
        quantization: str | None = None,
    ) -> None:
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
        self._widest_window = widest_window
        self._table_width = -(-limits.max_model_len // storage.block_size)
        # A stream of our own: on the default one, whatever else the program does would wait for our steps.
        self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            max_rows = max(_most_rows(limits), *decode_graph_sizes(limits.max_num_seqs))  # a graph's padding, too
            self._sampler = DeviceSampler(vocab_size, max_rows, self._device)
            num_processors = torch.cuda.get_device_properties(self._device).multi_processor_count
            self._num_spare_items = max_items(0, storage.num_kv_heads, num_processors)
            self._max_prompts = min(MAX_PROMPTS, limits.max_num_seqs)
            self._staging = Staging(_eager_layout(limits).num_bytes, self._device)
            layouts = self._graph_layouts() if uses_graphs and attention.can_capture else {}
            self._graph_staging = FetchedStaging(
                max((layout.num_bytes for layout in layouts.values()), default=0), self._device
            )
            self._sampling_staging = Staging(_sampling_layout(_most_rows(limits)).num_bytes, self._device)
            self._graphs = {key: self._graph(key, layout) for key, layout in layouts.items()}
        self._most_tokens = limits.max_num_batched_tokens
        self._decode_sizes: tuple[int, ...] = ()  # those that are captured
        self._prompt_sizes: tuple[int, ...] = ()
        self._item_cut = ItemCut()
        # What a graph sends goes to the slot that the device counts, so launched steps have slots of their own.
        self._graph_results, self._results = _ResultRing(max_rows), _ResultRing(max_rows)
        self._turn = 0
        self._swapper = BlockSwapper(storage, self._stream)
        self.copy_out = self._swapper.copy_out
        self.copy_in = self._swapper.copy_in

    def capture(self, on_progress: Callable[[int, int], None]) -> None:
        """Capture every size of step that is replayed; `on_progress` gets (captured, in all).

        Largest first, because the smaller ones then fit into the memory that it left in the pool.
        """
        with torch.cuda.stream(self._stream), torch.no_grad():
            graphs = sorted(self._graphs.values(), key=lambda graph: graph.num_tokens, reverse=True)
            for i, graph in enumerate(graphs):
                self._replay(graph, self._fill_with_padding(graph))
                self._stream.synchronize()
                on_progress(i + 1, len(graphs))
            if graphs:
                self._graph_staging.resume()
        self._decode_sizes = tuple(sorted(graph.num_tokens for graph in graphs if graph.batch is not None))
        self._prompt_sizes = tuple(sorted(graph.num_tokens for graph in graphs if graph.batch is None))

    def rehearse(self) -> None:
        """Launch what `capture` would record, so that its kernels are met."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            for graph in self._graphs.values():
                self._recorded_step(graph, self._fill_with_padding(graph))(self._graph_staging.on_device)
            self._stream.synchronize()

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> _Launched:
        """Queue a step and its sampling, and return at once."""
        num_rows = len(batch.logit_rows_R)
        with torch.cuda.stream(self._stream), torch.no_grad():
            logits_RV, rows = self._forward(batch)
            if rows is None or sampling.any_drawn:
                rows = self._sample(logits_RV, sampling, num_rows)
            rows.arrived.record(self._stream)
        return _Launched(self, rows, num_rows)

    def room_for_drafts(self, num_sequences: int) -> int:
        """As many as a captured step has: launching one kernel by kernel takes longer than drafts save."""
        if num_sequences > self._max_prompts:
            return 0
        sizes = [size for size in self._prompt_sizes if size <= MAX_ROWS] or [min(MAX_ROWS, self._most_tokens)]
        return max(0, sizes[-1] - num_sequences)

    def execute(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 logits_RV on the device, valid until the next step."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            logits_RV, _ = self._forward(batch)
        # the caller works on its own stream
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return logits_RV

    def hidden(self, batch: StepBatch) -> torch.Tensor:
        """Run one step, not from a graph. Returns float32 hidden_RE on the device, valid until the next step."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            hidden_RE = self._run_eagerly(batch, self._decoder.hidden)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return hidden_RE

    def discard(self, block_ids: list[int]) -> None:
        with torch.cuda.stream(self._stream):
            blocks = torch.tensor(block_ids, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)
            self._storage.cache_L2BK.index_fill_(2, blocks, 0)

    def close(self) -> None:
        """Give the device's memory back, whoever still holds this object. Closing twice does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stream.synchronize()
        self.graphs.clear()
        del self._decoder, self._storage, self._graphs, self._swapper, self.attention, self.copy_out, self.copy_in

    def _sample(self, logits_RV: torch.Tensor, sampling: SamplingArrays, num_rows: int) -> _ResultRows:
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

    def _forward(self, batch: StepBatch) -> tuple[torch.Tensor, _ResultRows | None]:
        """Logits_RV, and where a graph sends each row's best token."""
        graph = self._graph_for(batch)
        if graph is None:
            return self._run_eagerly(batch, self._decoder.forward), None
        slot = self._graph_staging.next_slot()
        host = graph.slots[slot]
        if graph.batch is not None:
            fill_decode_arrays(host, batch, window=self._widest_window, cut=self._item_cut)
        else:
            assert isinstance(self.attention, TritonPagedAttention)
            self.attention.fill_prompt_arrays(host, batch)
            host["logit_rows"][: len(batch.logit_rows_R)] = batch.logit_rows_R
            host["logit_rows"][len(batch.logit_rows_R) :] = 0
        _fill_tokens(host, batch)
        logits_RV = self._replay(graph, host)
        self._graph_staging.mark_queued()
        return logits_RV[: len(batch.logit_rows_R)], self._graph_results.slots[slot]

    def _graph_for(self, batch: StepBatch) -> _StepGraph | None:
        num_rows = len(batch.logit_rows_R)
        if batch.num_tokens == batch.num_sequences == num_rows:
            size = padded_size(num_rows, self._decode_sizes)
            return None if size is None else self._graphs[f"decode {size}"]
        size = padded_size(batch.num_tokens, self._prompt_sizes)
        if size is None or batch.num_sequences > self._max_prompts or num_rows > num_logit_rows(size):
            return None
        return self._graphs[f"prompts {size}"]

    def _replay(self, graph: _StepGraph, host: Arrays) -> torch.Tensor:
        return self.graphs.capture(graph.key, self._recorded_step(graph, host), self._graph_staging.on_device)

    def _recorded_step(self, graph: _StepGraph, host: Arrays) -> Callable[[torch.Tensor], torch.Tensor]:
        metadata = graph.prompts if graph.batch is None else self.attention.prepare_captured(graph.batch, host)

        def step(_buffer: torch.Tensor) -> torch.Tensor:
            self._graph_staging.fetch(graph.layout.num_bytes)
            logits_RV = self._decoder.forward(graph.inputs, metadata)
            tokens_R, bests_R = self._sampler.sample(logits_RV)
            ring, turn = self._graph_results, self._graph_staging.device_turn
            send(tokens_R, bests_R, ring.tokens_pinned, ring.bests_pinned, graph.num_rows, turn=turn)
            return logits_RV

        return step

    def _fill_with_padding(self, graph: _StepGraph) -> Arrays:
        """A step without any sequence in every slot: what is captured must be valid, and must not touch the cache."""
        padding = np.zeros(graph.layout.num_bytes, np.uint8)
        host = graph.layout.on_host(padding)
        for name, array in host.items():
            array[...] = -1 if name in ("token_rows", "slots", "items") else 0
        self._graph_staging.fill_all(padding)
        return host

    def _run_eagerly(self, batch: StepBatch, compute: Callable[[DecoderInputs, Any], torch.Tensor]) -> torch.Tensor:
        all_rows = len(batch.logit_rows_R) == batch.num_tokens
        shapes = _token_shapes(batch.num_tokens)
        if not all_rows:
            shapes["logit_rows"] = ((len(batch.logit_rows_R),), np.int32)
        layout = Layout.of(shapes)
        host = layout.on_host(self._staging.next_host_buffer())
        _fill_tokens(host, batch)
        if not all_rows:
            host["logit_rows"][:] = batch.logit_rows_R
        self._staging.upload(layout.num_bytes)
        inputs = self._inputs(layout.on_device(self._staging.on_device))
        return compute(inputs, self.attention.prepare(batch))

    def _inputs(self, tensors: Mapping[str, torch.Tensor]) -> DecoderInputs:
        return DecoderInputs(
            ids_T=tensors["ids"],
            token_rows_T=tensors["token_rows"],
            positions_T=tensors["positions"],
            slots_T=tensors["slots"],
            last_tokens=self._sampler.tokens_R,
            logit_rows_R=tensors.get("logit_rows"),
        )

    def _graph(self, key: str, layout: Layout) -> _StepGraph:
        tensors = layout.on_device(self._graph_staging.on_device)
        slots = tuple(layout.on_host(slot) for slot in self._graph_staging.slots)
        if "logit_rows" not in tensors:
            batch = PagedBatch.over(tensors, max_queries=1)
            return _StepGraph(key, layout, slots, self._inputs(tensors), batch, None)
        assert isinstance(self.attention, TritonPagedAttention)
        prompts = self.attention.prepare_prompts(tensors)
        return _StepGraph(key, layout, slots, self._inputs(tensors), None, prompts)

    def _graph_layouts(self) -> dict[str, Layout]:
        """By key: the arrays of every step that is captured. Those with prompts need our own attention."""
        limits = self.limits
        layouts = {f"decode {n}": self._decode_layout(n) for n in decode_graph_sizes(limits.max_num_seqs)}
        if isinstance(self.attention, TritonPagedAttention):
            sizes = prompt_graph_sizes(limits.max_num_batched_tokens)
            layouts |= {f"prompts {n}": self._prompt_layout(n) for n in sizes}
        return layouts

    def _decode_layout(self, size: int) -> Layout:
        num_items = size + self._num_spare_items
        sizes = decode_sizes(size, max_queries=1, table_width=self._table_width, num_items=num_items)
        return Layout.of({name: (shape, np.int32) for name, shape in sizes.items()} | _token_shapes(size))

    def _prompt_layout(self, num_tokens: int) -> Layout:
        assert isinstance(self.attention, TritonPagedAttention)
        sizes = self.attention.prompt_sizes(num_tokens, self._max_prompts, self._table_width)
        rows = {"logit_rows": ((num_logit_rows(num_tokens),), np.int32)}
        return Layout.of({name: (shape, np.int32) for name, shape in sizes.items()} | _token_shapes(num_tokens) | rows)

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
    return Layout.of(_token_shapes(limits.max_num_batched_tokens) | rows)


def _most_rows(limits: GpuLimits) -> int:
    """Logits that a step may want: one for each sequence, or those of drafts."""
    return max(limits.max_num_seqs, min(MAX_ROWS, limits.max_num_batched_tokens))


def _token_shapes(num_tokens: int) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    return dict.fromkeys(("ids", "token_rows", "positions", "slots"), ((num_tokens,), np.int32))


def _fill_tokens(host: Arrays, batch: StepBatch) -> None:
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
