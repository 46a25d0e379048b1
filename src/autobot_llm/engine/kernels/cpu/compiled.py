"""The compiled step as an executor. Knows how step.cpp wants its weights and how to call it; knows no scheduling."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from autobot_llm.engine.batching.plan import Int64Array, StepBatch
from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.kernels.cpu.build import CannotCompileError
from autobot_llm.engine.kernels.cpu.cache import STORED_AS, CompiledCache
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.decoder import rope_tables
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights
from autobot_llm.engine.quantization.weight import QuantizedWeight

log = logging.getLogger(__name__)

THREAD_TRIAL_SECONDS = 0.25
THREAD_TRIAL_STEPS = 40


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_void_p) for name in ("scale", "offset")),
        ("group", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        ("window", ctypes.c_int64),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
                "num_blocks", "max_tokens", "bf16_weights", "matrix_bits",
            )
        ),
        ("rms_norm_eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("layers", "embedding", "norm")),
        ("lm_head", _Linear),
        *(
            (name, ctypes.c_void_p)
            for name in ("cos", "sin", "keys", "values", "key_scales", "value_scales", "attention")
        ),
        ("stored", ctypes.c_int64),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "ids", "slots", "logit_rows", "positions", "query_starts", "context_lens", "block_tables",
            )
        ),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_sequences", "max_blocks", "num_logit_rows")),
        *((name, ctypes.c_void_p) for name in ("logits", "hidden", "streams", "stream_layers")),
        ("num_stream_layers", ctypes.c_int64),
        ("tree_masks", ctypes.c_void_p),
    )  # fmt: skip


class _Packer:
    """Lays weights out for step.cpp, in panels of `width` outputs, and keeps every tensor it hands a pointer of."""

    def __init__(self, dtype: torch.dtype, width: int, matrix_bits: int) -> None:
        self.dtype = dtype
        self.width = width
        self.matrix_bits = matrix_bits
        self._kept: list[torch.Tensor] = []

    def pointer(self, tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().to("cpu", dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    # N outputs, K inputs, P panels of W outputs, G groups of inputs
    def linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> _Linear:
        if isinstance(weight_NK, QuantizedWeight) and self.matrix_bits:
            return self._quantized(weight_NK, bias_N, weight_NK.shape[0], self._padded)
        return self._dense(weight_NK, bias_N, weight_NK.shape[0], self._padded)

    def gated(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> _Linear:
        """Gates and ups side by side in each panel, so that one thread has both halves of its outputs."""
        num_outputs = -(-weight_NK.shape[0] // self.width) * self.width
        if isinstance(weight_NK, QuantizedWeight) and self.matrix_bits:
            return self._quantized(weight_NK, bias_N, num_outputs, self._interleaved)
        return self._dense(weight_NK, bias_N, num_outputs, self._interleaved)

    def _dense(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, num_outputs: int, arrange: Arrange
    ) -> _Linear:
        weight = self.pointer(self._panels(arrange(weight_NK.to(self.dtype))), self.dtype)
        bias = self.pointer(None if bias_N is None else arrange(bias_N.float()))
        return _Linear(weight, bias, num_outputs, weight_NK.shape[1])

    def _quantized(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, num_outputs: int, arrange: Arrange
    ) -> _Linear:
        """int8, or pairs of numbers from 0 to 15; see linear.h."""
        scales_NG, num_inputs = weight.scales_OG.float(), weight.shape[1]
        scale = self.pointer(arrange(scales_NG).t())
        bias = self.pointer(None if bias_N is None else arrange(bias_N.float()))
        if self.matrix_bits == 8:
            values = self.pointer(self._panels(arrange(weight.values_OI)), torch.int8)
            return _Linear(values, bias, num_outputs, num_inputs, scale, None, num_inputs)
        first, second = self._panels(arrange(weight.values_OI + 8)).to(torch.uint8).chunk(2, dim=-1)
        values = self.pointer(first | (second << 4), torch.uint8)
        zeros_NG = torch.zeros_like(scales_NG) if weight.zero_points_OG is None else weight.zero_points_OG.float()
        offset = self.pointer(arrange(-(8 + zeros_NG) * scales_NG).t())
        return _Linear(values, bias, num_outputs, num_inputs, scale, offset, weight.scheme.group_size or num_inputs)

    def _panels(self, rows: torch.Tensor) -> torch.Tensor:
        """panels_PKW of rows that fill them."""
        return rows.view(-1, self.width, rows.shape[1]).transpose(1, 2)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        return _with_more_rows(rows, -len(rows) % self.width)

    def _interleaved(self, rows: torch.Tensor) -> torch.Tensor:
        half, size = self.width // 2, len(rows) // 2
        gate, up = (
            _with_more_rows(part, -size % half).view(-1, half, *part.shape[1:]) for part in (rows[:size], rows[size:])
        )
        return torch.stack((gate, up), 1).flatten(0, 2)

    def layer(self, weights: LayerWeights, window: int) -> _Layer:
        return _Layer(
            qkv=self.linear(weights.qkv_weight, weights.qkv_bias),
            o=self.linear(weights.o_weight, weights.o_bias),
            gate_up=self.gated(weights.gate_up_weight, weights.gate_up_bias),
            down=self.linear(weights.down_weight, weights.down_bias),
            input_norm=self.pointer(weights.input_norm_E),
            post_norm=self.pointer(weights.post_norm_E),
            q_norm=self.pointer(weights.q_norm_D),
            k_norm=self.pointer(weights.k_norm_D),
            window=window,
        )


Arrange = Callable[[torch.Tensor], torch.Tensor]


def _with_more_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, count))


def quantized_bits(weights: DecoderWeights) -> int:
    """8 or 4 where the step can read the layers' matrices as they are; 0: they are to be dequantized.

    It reads int8 with one scale an output, and 4 bits in groups, with zero points or without.
    """
    found = set()
    for layer in weights.layers:
        for matrix in (layer.qkv_weight, layer.o_weight, layer.gate_up_weight, layer.down_weight):
            if not isinstance(matrix, QuantizedWeight) or matrix.group_of_input_I is not None:
                return 0
            scheme, is_plain = matrix.scheme, matrix.zero_points_OG is None and matrix.scales_OG.shape[1] == 1
            reads = scheme.kind == "int" and (scheme.num_bits == 4 or is_plain)
            found.add(scheme.num_bits if reads else 0)
    return found.pop() if len(found) == 1 else 0


class CompiledExecutor:
    """Runs steps through step.cpp: float32 arithmetic over the checkpoint's bfloat16, float32 or quantized weights.

    Quantized matrices are read as they are where `quantized_bits` says so, and their activations stay float32; others
    are dequantized.

    `library` is the compiled step (build.py). Raises CannotCompileError for a model whose shapes it does not cover.
    `num_threads` None: the quickest count for one-token steps, found by trying. Memory: the packed weights, and
    `num_blocks` blocks of 16 tokens of keys and values, touched when first used; of `cache_dtype`, which is float32 or
    one of QUANTIZED_DTYPES. With `sums_attention` it is an Evictor, and a sequence's tokens attend on one thread.
    """

    name = "compiled"

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        library: ctypes.CDLL,
        *,
        num_blocks: int,
        max_tokens: int,
        max_model_len: int,
        num_threads: int | None = None,
        cache_dtype: torch.dtype = torch.float32,
        sums_attention: bool = False,
    ) -> None:
        check_coverage(config)
        self._library = library
        self._hidden_size = config.hidden_size
        self._vocab_size = config.vocab_size
        # float16 is widened (exactly): a half's conversion is not as cheap everywhere as a shift.
        keeps_bf16 = weights.embed_VE.dtype == torch.bfloat16
        bits = quantized_bits(weights)
        packer = _Packer(torch.bfloat16 if keeps_bf16 else torch.float32, self._library.autobot_panel_width(), bits)
        layers = (_Layer * config.num_layers)(
            *(packer.layer(*pair) for pair in zip(weights.layers, config.sliding_windows, strict=True))
        )
        cos_PD, sin_PD = rope_tables(config, max_model_len)
        half = config.head_size // 2  # both halves of a row are alike
        self.cache = cache = CompiledCache.allocate(config, num_blocks, cache_dtype, sums_attention=sums_attention)
        self._config = _Config(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            num_blocks=num_blocks,
            max_tokens=max_tokens,
            bf16_weights=keeps_bf16,
            matrix_bits=bits,
            rms_norm_eps=config.rms_norm_eps,
            layers=ctypes.addressof(layers),
            embedding=packer.pointer(weights.embed_VE, packer.dtype),
            norm=packer.pointer(weights.norm_E),
            lm_head=packer.linear(weights.lm_head_VE, None),
            cos=packer.pointer(cos_PD[:, :half]),
            sin=packer.pointer(sin_PD[:, :half]),
            keys=cache.keys_LBKDP.data_ptr(),
            values=cache.values_LBKPD.data_ptr(),
            key_scales=None if cache.key_scales_LBKP is None else cache.key_scales_LBKP.data_ptr(),
            value_scales=None if cache.value_scales_LBKP is None else cache.value_scales_LBKP.data_ptr(),
            attention=None if cache.attention_LBKP is None else cache.attention_LBKP.data_ptr(),
            stored=STORED_AS[cache_dtype],
        )
        self._kept = (layers, packer)
        self.num_threads = num_threads or fastest_num_threads(self._time_with, max_num_threads())
        self._model: int | None = self._create(self.num_threads)
        self.quantization = weights.quantization
        kind = f"{bits}-bit" if bits else "bfloat16" if keeps_bf16 else "float32"
        widened = f" ({weights.quantization}, dequantized)" if weights.is_quantized and not bits else ""
        self.reason = f"{kind} weights{widened}, {self.num_threads} threads"

    def execute(self, batch: StepBatch) -> torch.Tensor:
        logits_RV = torch.empty(len(batch.logit_rows_R), self._vocab_size)
        self._run(self._model, batch, logits_RV=logits_RV)
        return logits_RV

    def hidden(self, batch: StepBatch) -> torch.Tensor:
        hidden_RE = torch.empty(len(batch.logit_rows_R), self._hidden_size)
        self._run(self._model, batch, hidden_RE=hidden_RE)
        return hidden_RE

    def evict(self, block_ids: Sequence[int], num_kept: int, num_candidates: int) -> None:
        """See Evictor; for a cache that sums attention."""
        self.cache.evict(block_ids, num_kept, num_candidates)

    def execute_with_features(self, batch: StepBatch, wanted: FeatureKinds) -> tuple[torch.Tensor, Features]:
        logits_RV = torch.empty(len(batch.logit_rows_R), self._vocab_size)
        hidden_RE = torch.empty(len(batch.logit_rows_R), self._hidden_size) if wanted.hidden else None
        streams_TF = torch.empty(batch.num_tokens, len(wanted.layers) * self._hidden_size) if wanted.layers else None
        self._run(
            self._model, batch, logits_RV=logits_RV, hidden_RE=hidden_RE, streams_TF=streams_TF, layers=wanted.layers
        )
        return logits_RV, Features(hidden_RE, streams_TF)

    def discard(self, block_ids: list[int]) -> None:
        """Nothing to do: step.cpp never reads a position beyond a sequence's own."""

    def move(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        self._library.autobot_move(self._model, slots_from_M.ctypes.data, slots_to_M.ctypes.data, len(slots_from_M))

    def close(self) -> None:
        if self._model:
            self._library.autobot_destroy(self._model)
            self._model = None

    def _create(self, num_threads: int) -> int:
        model: int | None = self._library.autobot_create(ctypes.byref(self._config), num_threads)
        if not model:
            raise MemoryError(f"no memory or threads for a step of {self._config.max_tokens} tokens")
        return model

    def _run(
        self,
        model: int | None,
        batch: StepBatch,
        *,
        logits_RV: torch.Tensor | None = None,
        hidden_RE: torch.Tensor | None = None,
        streams_TF: torch.Tensor | None = None,
        layers: tuple[int, ...] = (),
    ) -> None:
        assert model, "the executor is closed"
        stream_layers = (ctypes.c_int64 * len(layers))(*layers)
        arguments = _Batch(
            batch.ids_T.ctypes.data,
            batch.slots_T.ctypes.data,
            batch.logit_rows_R.ctypes.data,
            batch.positions_T.ctypes.data,
            batch.query_starts.ctypes.data,
            batch.context_lens.ctypes.data,
            batch.block_tables_SB.ctypes.data,
            batch.num_tokens,
            batch.num_sequences,
            batch.block_tables_SB.shape[1],
            len(batch.logit_rows_R),
            None if logits_RV is None else logits_RV.data_ptr(),
            None if hidden_RE is None else hidden_RE.data_ptr(),
            None if streams_TF is None else streams_TF.data_ptr(),
            ctypes.addressof(stream_layers),
            len(layers),
            None if batch.tree_masks_T is None else batch.tree_masks_T.ctypes.data,
        )
        if self._library.autobot_run(model, ctypes.byref(arguments)) != 0:
            raise MemoryError(f"no memory for a step of {batch.num_tokens} tokens")

    def _time_with(self, num_threads: int) -> float:
        """Seconds of a one-token step with this many threads: the best of a short trial, as others disturb it."""
        zero = np.zeros(1, np.int64)
        small = np.zeros(1, np.int32)
        batch = StepBatch(
            ids_T=zero,
            positions_T=small,
            slots_T=zero,
            query_starts=np.array([0, 1], np.int32),
            context_lens=np.ones(1, np.int32),
            block_tables_SB=np.zeros((1, 1), np.int32),
            logit_rows_R=zero,
            pending_rows_T=np.full(1, -1, np.int32),
        )
        logits_RV = torch.empty(1, self._vocab_size)
        model = self._create(num_threads)
        try:
            self._run(model, batch, logits_RV=logits_RV)  # touches every page once
            best = float("inf")
            deadline = time.perf_counter() + THREAD_TRIAL_SECONDS
            for _ in range(THREAD_TRIAL_STEPS):
                start = time.perf_counter()
                self._run(model, batch, logits_RV=logits_RV)
                end = time.perf_counter()
                best = min(best, end - start)
                if end > deadline:
                    break
            return best
        finally:
            self._library.autobot_destroy(model)


def check_coverage(config: ModelConfig) -> None:
    """Raise CannotCompileError for a model that step.cpp does not compute."""
    if config.head_size % BLOCK_SIZE:
        raise CannotCompileError(f"head size {config.head_size} is not a multiple of {BLOCK_SIZE}")


def fastest_num_threads(seconds_with: Callable[[int], float], limit: int) -> int:
    """The smallest count within 5 % of the best one, of 1, 2, 4 ... `limit`.

    Past the memory's bandwidth more threads only disturb each other, so the search ends where they clearly do.
    """
    seconds = {1: seconds_with(1)}
    candidate = 1
    while candidate < limit and seconds[candidate] < 1.3 * min(seconds.values()):
        candidate = min(candidate * 2, limit)
        seconds[candidate] = seconds_with(candidate)
    log.debug("milliseconds of a one-token step by threads: %s", {n: round(s * 1e3, 3) for n, s in seconds.items()})
    good = 1.05 * min(seconds.values())
    return next(count for count, took in seconds.items() if took <= good)


def max_num_threads() -> int:
    """Cores this process may use, less one for the event loop: a thread that loses its core holds up all the others.

    Of two cores both are taken, because half of them is more than the event loop costs (docs/log.md).
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return num_cores if num_cores <= 2 else num_cores - 1
