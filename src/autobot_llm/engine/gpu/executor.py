"""Run steps on a CUDA device beside the host. Knows a step's arrays, graphs and copies; knows nothing of scheduling.

A step in which every sequence gets one token is a captured graph, padded to the next captured size; so is one with few
tokens of prompts, which would take longer to launch than to compute; every other step is launched kernel by kernel. All
queue their arrays, the kernels and the sampling, and return: the host plans the next
step meanwhile, and the tokens of this one go into it without ever leaving the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.attention.paged import PagedAttention, PagedBatch, decode_sizes, fill_decode_arrays, max_items
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.description import GpuDescription
from autobot_llm.engine.executor import SampledRows, SamplingArrays
from autobot_llm.engine.gpu.decoder import DecoderInputs, FusedDecoder
from autobot_llm.engine.gpu.graphs import DECODE_SIZES, MAX_PROMPTS, PROMPT_SIZES, CUDAGraphManager, padded_size
from autobot_llm.engine.gpu.options import GpuLimits
from autobot_llm.engine.gpu.staging import FetchedStaging, Layout, Staging
from autobot_llm.engine.gpu.swap import BlockSwapper
from autobot_llm.engine.kernels.gpu.exchange import send
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
    """Page-locked memory for one step's tokens and best logits."""

    def __init__(self, max_rows: int) -> None:
        self.tokens_pinned = torch.zeros(max_rows, dtype=torch.int32, pin_memory=True)
        self.bests_pinned = torch.zeros(max_rows, dtype=torch.float32, pin_memory=True)
        self.tokens, self.bests = self.tokens_pinned.numpy(), self.bests_pinned.numpy()
        self.arrived = torch.cuda.Event()


# T packed tokens, R sampled rows, V vocabulary
class GpuExecutor:
    """PipelinedExecutor and BlockCopier on one CUDA device. `reason` says why it was chosen.

    `device_wait_seconds` adds up the time that the host has waited for the device. `uses_graphs` false launches every
    step kernel by kernel; `captures_prompts` true captures steps with few tokens of prompts, too.
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
        captures_prompts: bool,
        reason: str,
    ) -> None:
        self.reason = reason
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
            self._sampler = DeviceSampler(vocab_size, limits.max_num_seqs, self._device)
            num_processors = torch.cuda.get_device_properties(self._device).multi_processor_count
            self._num_spare_items = max_items(0, storage.num_kv_heads, num_processors)
            captures = uses_graphs and attention.can_capture
            self._decode_sizes = decode_graph_sizes(limits.max_num_seqs) if captures else ()
            self._max_prompts = min(MAX_PROMPTS, limits.max_num_seqs)
            captures_prompts = captures and captures_prompts and isinstance(attention, TritonPagedAttention)
            self._prompt_sizes = prompt_graph_sizes(limits.max_num_batched_tokens) if captures_prompts else ()
            self._staging = Staging(_eager_layout(limits).num_bytes, self._device)
            layouts = {f"decode {n}": self._decode_layout(n) for n in self._decode_sizes}
            layouts |= {f"prompts {n}": self._prompt_layout(n) for n in self._prompt_sizes}
            self._graph_staging = FetchedStaging(
                max((layout.num_bytes for layout in layouts.values()), default=0), self._device
            )
            self._sampling_staging = Staging(_sampling_layout(limits.max_num_seqs).num_bytes, self._device)
            self._graphs = {key: self._graph(key, layout) for key, layout in layouts.items()}
        self._results = [_ResultRows(limits.max_num_seqs) for _ in range(3)]
        self._turn = 0
        self._swapper = BlockSwapper(storage, self._stream)
        self.copy_out = self._swapper.copy_out
        self.copy_in = self._swapper.copy_in

    def capture(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Capture the graph of every decode size; `on_progress` gets (captured, in all). Largest first, because the
        smaller ones then fit into the memory that it left in the pool."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            graphs = sorted(self._graphs.values(), key=lambda graph: len(graph.inputs.ids_T), reverse=True)
            for i, graph in enumerate(graphs):
                padding = np.zeros(graph.layout.num_bytes, np.uint8)
                host = graph.layout.on_host(padding)
                _fill_padding(host)
                self._graph_staging.fill_all(padding)
                self._replay(graph, host)
                self._stream.synchronize()
                if on_progress is not None:
                    on_progress(i + 1, len(graphs))
            if graphs:
                self._graph_staging.resume()

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> _Launched:
        """Queue a step and its sampling, and return at once."""
        num_rows = len(batch.logit_rows_R)
        rows = self._results[self._turn]
        self._turn = (self._turn + 1) % len(self._results)
        with torch.cuda.stream(self._stream), torch.no_grad():
            logits_RV, is_sampled = self._forward(batch)
            if num_rows:
                if sampling.any_drawn:
                    tensors = self._upload_sampling(sampling)
                    self._sampler.sample(logits_RV, tensors, any_drawn=True, any_restricted=sampling.any_restricted)
                elif not is_sampled:
                    self._sampler.sample(logits_RV)
                send(self._sampler.tokens_R, self._sampler.bests_R, rows.tokens_pinned, rows.bests_pinned, num_rows)
            rows.arrived.record()
        return _Launched(self, rows, num_rows)

    def execute(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 logits_RV on the device, valid until the next step."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            logits_RV, _ = self._forward(batch)
        # the caller works on its own stream
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return logits_RV

    def discard(self, block_ids: list[int]) -> None:
        with torch.cuda.stream(self._stream):
            blocks = torch.tensor(block_ids, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)
            self._storage.cache_L2BKPD.index_fill_(2, blocks, 0)

    def close(self) -> None:
        """Give the device's memory back, whoever still holds this object. Closing twice does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stream.synchronize()
        self.graphs.clear()
        del (
            self._decoder,
            self._storage,
            self._graphs,
            self._swapper,
            self.attention,
            self.copy_out,
            self.copy_in,
        )

    def _forward(self, batch: StepBatch) -> tuple[torch.Tensor, bool]:
        """Logits_RV, and whether the graph has taken their best already."""
        graph = self._graph_for(batch)
        if graph is None:
            return self._run_eagerly(batch), False
        host = graph.slots[self._graph_staging.next_slot()]
        if graph.batch is not None:
            fill_decode_arrays(host, batch, window=self._widest_window)
        else:
            assert isinstance(self.attention, TritonPagedAttention)
            self.attention.fill_prompt_arrays(host, batch)
            host["logit_rows"][: len(batch.logit_rows_R)] = batch.logit_rows_R
            host["logit_rows"][len(batch.logit_rows_R) :] = 0
        _fill_tokens(host, batch)
        logits_RV = self._replay(graph, host)
        self._graph_staging.mark_queued()
        return logits_RV[: len(batch.logit_rows_R)], True

    def _graph_for(self, batch: StepBatch) -> _StepGraph | None:
        num_rows = len(batch.logit_rows_R)
        if batch.num_tokens == batch.num_sequences == num_rows:
            size = padded_size(num_rows, self._decode_sizes)
            return None if size is None else self._graphs[f"decode {size}"]
        if max(batch.num_sequences, num_rows) > self._max_prompts:
            return None
        size = padded_size(batch.num_tokens, self._prompt_sizes)
        return None if size is None else self._graphs[f"prompts {size}"]

    def _replay(self, graph: _StepGraph, host: Arrays) -> torch.Tensor:
        metadata = graph.prompts if graph.batch is None else self.attention.prepare_captured(graph.batch, host)

        def step(_buffer: torch.Tensor) -> torch.Tensor:
            self._graph_staging.fetch(graph.layout.num_bytes)
            logits_RV = self._decoder.forward(graph.inputs, metadata)
            self._sampler.sample(logits_RV)
            return logits_RV

        return self.graphs.capture(graph.key, step, self._graph_staging.on_device)

    def _run_eagerly(self, batch: StepBatch) -> torch.Tensor:
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
        return self._decoder.forward(inputs, self.attention.prepare(batch))

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
        if "tiles" not in tensors:
            batch = PagedBatch.over(tensors, max_queries=1)
            return _StepGraph(key, layout, slots, self._inputs(tensors), batch, None)
        assert isinstance(self.attention, TritonPagedAttention)
        prompts = self.attention.prepare_prompts(tensors)
        return _StepGraph(key, layout, slots, self._inputs(tensors), None, prompts)

    def _decode_layout(self, size: int) -> Layout:
        num_items = size + self._num_spare_items
        sizes = decode_sizes(size, max_queries=1, table_width=self._table_width, num_items=num_items)
        return Layout.of({name: (shape, np.int32) for name, shape in sizes.items()} | _token_shapes(size))

    def _prompt_layout(self, num_tokens: int) -> Layout:
        assert isinstance(self.attention, TritonPagedAttention)
        sizes = self.attention.prompt_sizes(num_tokens, self._max_prompts, self._table_width)
        rows = {"logit_rows": ((self._max_prompts,), np.int32)}
        return Layout.of({name: (shape, np.int32) for name, shape in sizes.items()} | _token_shapes(num_tokens) | rows)

    def _upload_sampling(self, sampling: SamplingArrays) -> SamplingTensors:
        layout = _sampling_layout(len(sampling.is_drawn_R))
        host = layout.on_host(self._sampling_staging.next_host_buffer())
        for name, array in host.items():
            values = getattr(sampling, name)
            array[:] = values.view(np.int64) if values.dtype == np.uint64 else values
        self._sampling_staging.upload(layout.num_bytes)
        return SamplingTensors(**layout.on_device(self._sampling_staging.on_device))


def decode_graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The sizes to capture for so many sequences at most: the last one holds them all, up to the largest size."""
    last = padded_size(max_num_seqs) or DECODE_SIZES[-1]
    return tuple(size for size in DECODE_SIZES if size <= last)


def prompt_graph_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """The numbers of tokens to capture a step with prompts for."""
    return tuple(size for size in PROMPT_SIZES if size <= max_num_batched_tokens)


def _eager_layout(limits: GpuLimits) -> Layout:
    """Room for the largest step that is not captured."""
    rows = {"logit_rows": ((limits.max_num_seqs,), np.int32)}
    return Layout.of(_token_shapes(limits.max_num_batched_tokens) | rows)


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


def _fill_padding(host: Arrays) -> None:
    """A step without any sequence: what is captured must be valid, and must not touch the cache."""
    for name, array in host.items():
        array[...] = -1 if name in ("token_rows", "slots", "items") else 0


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
