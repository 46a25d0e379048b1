"""Load a model folder's weights into the tensors a decoder uses. Knows names and shapes; knows no arithmetic.

Projections that read the same input are stored as one matrix: q, k, v and gate, up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from autobot_llm.engine.models.checkpoint import Checkpoint, open_checkpoint
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.shapes import expected_shapes
from autobot_llm.engine.models.transfer import (
    Carrier,
    CudaTransport,
    HostTransport,
    InPlace,
    Staged,
    Transfer,
    carry,
    plan_spans,
)
from autobot_llm.engine.quantization.packed import PackedWeight
from autobot_llm.engine.quantization.reading import QuantizedReader
from autobot_llm.engine.quantization.weight import QuantizedWeight

MATRICES = ("qkv_weight", "o_weight", "gate_up_weight", "down_weight")
"""The fields of LayerWeights that quantizing is about."""

SPAN_BYTES = 8 * 2**20  # as fast as larger ones, and small enough to share out evenly
MAX_READERS = 8

Convert: TypeAlias = Callable[[torch.Tensor], Any]
"""What a decoder of its own kind reads instead of this matrix."""


# E hidden size, H query heads, K key/value heads, D head size, F feed-forward size, V vocabulary
@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; the rows of `qkv_weight` are q [HD], k [KD], v [KD], in this order,
    and those of `gate_up_weight` gate [F], up [F]. Matrices may be what `convert` of `load_weights` makes."""

    input_norm_E: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    o_weight: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm_E: torch.Tensor
    gate_up_weight: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model. With tied embeddings `lm_head_VE` is the very tensor `embed_VE`."""

    embed_VE: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_E: torch.Tensor
    lm_head_VE: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_VE.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_VE.device

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is a QuantizedWeight."""
        return self.quantization is not None

    @property
    def quantization(self) -> str | None:
        """The scheme of the quantized matrices, in words; None where there are none."""
        return next((tensor.scheme.name for tensor in self._tensors() if isinstance(tensor, QuantizedWeight)), None)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, shared tensors counted once."""
        tensors = {id(t): t for t in self._tensors()}
        return sum(
            t.num_bytes if isinstance(t, QuantizedWeight | PackedWeight) else t.numel() * t.element_size()
            for t in tensors.values()
        )

    def _tensors(self) -> Iterator[torch.Tensor | PackedWeight]:
        yield from (self.embed_VE, self.norm_E, self.lm_head_VE)
        for layer in self.layers:
            for name in LayerWeights.__slots__:
                tensor = getattr(layer, name)
                if tensor is not None:
                    yield tensor


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
    keep_quantized: bool = False,
    convert: Convert | None = None,
) -> DecoderWeights:
    """Load the weights of `folder` onto `device`; peak host memory beside the model is a few small buffers.

    `dtype` None keeps the checkpoint's (where a checkpoint mixes dtypes, the narrowest one that holds them all).
    `on_progress(num_bytes_done, num_bytes_total)` counts bytes of the files, on the calling thread; loading ends at
    once with whatever it raises. A quantized folder's matrices are dequantized, one after the other; with
    `keep_quantized` they stay as they are, as QuantizedWeight. `convert` says what becomes of each layer's matrices as
    soon as the layer is there; so the device holds one layer of what they were, beside what they became.
    Raises ModelLoadError, naming file and tensor, for whatever is missing, truncated, of the wrong shape or dtype, or
    not part of such a model, and for files that change under the reader's hands.
    Format: safetensors, single or sharded, with the tensor names of Hugging Face transformers.
    """
    device = torch.device(device)
    if config.quantization is not None:
        return _load_quantized(folder, config, dtype, device, on_progress, keep_quantized, convert)
    checkpoint = _open_checkpoint(folder, config)
    allocator = _Allocator(checkpoint, dtype or checkpoint.dtype, device, on_progress)
    if convert is None:
        weights = _allocate(allocator, config)
    else:

        def finish(layer: LayerWeights) -> LayerWeights:
            allocator.fill()
            return _converted(layer, convert)

        weights = _allocate(allocator, config, finish)
    allocator.fill()
    checkpoint.refuse_changed_files()
    return weights


def measure_weights(folder: Path, config: ModelConfig, *, dtype: torch.dtype | None) -> int:
    """Bytes that `load_weights` would take up, from the headers alone. Raises what it would raise for them."""
    if config.quantization is not None:  # they are dequantized
        itemsize = (dtype or _dense_dtype(config)).itemsize
        return sum(math.prod(shape) for shape in expected_shapes(config).values()) * itemsize
    checkpoint = _open_checkpoint(folder, config)
    itemsize = (dtype or checkpoint.dtype).itemsize
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) * itemsize


def _load_quantized(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None,
    keep_quantized: bool,
    convert: Convert | None,
) -> DecoderWeights:
    assert config.quantization is not None, "the folder is quantized"
    reader = QuantizedReader(
        folder,
        expected_shapes(config),
        config.quantization,
        model_type=config.model_type,
        may_ignore=_may_ignore(config),
        dtype=dtype or _dense_dtype(config),
        device=device,
        keep_quantized=keep_quantized,
        on_progress=on_progress,
    )
    weights = _allocate(reader, config, _as_it_is if convert is None else lambda layer: _converted(layer, convert))
    reader.checkpoint.refuse_changed_files()
    return weights


def _dense_dtype(config: ModelConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.checkpoint_dtype or "bfloat16")
    return dtype


def _may_ignore(config: ModelConfig) -> frozenset[str]:
    """Some exports store the tied head a second time."""
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())


def _open_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    return open_checkpoint(
        folder, expected_shapes(config), model_type=config.model_type, may_ignore=_may_ignore(config)
    )


class _Source(Protocol):
    """Gives a model's tensors by name."""

    def tensor(self, *names: str) -> torch.Tensor:
        """The named tensors, one below the other."""
        ...


class _Allocator:
    """Makes the tensors of a model, empty, and notes which stored tensor fills which part of which."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._stored = checkpoint.tensors
        self._dtype = dtype
        self._device = device
        self._on_progress = on_progress
        self._num_total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
        self._num_done = 0
        self._transfers: list[Transfer] = []

    def tensor(self, *names: str) -> torch.Tensor:
        """Memory for the named tensors, one below the other."""
        parts = [self._stored[name] for name in names]
        num_rows = sum(part.shape[0] for part in parts)
        fused = torch.empty((num_rows, *parts[0].shape[1:]), dtype=self._dtype, device=self._device)
        row = 0
        for part in parts:
            self._transfers.append(Transfer(part, fused[row : row + part.shape[0]]))
            row += part.shape[0]
        return fused

    def fill(self) -> None:
        """Read what was allocated since the last call."""
        transfers, self._transfers = self._transfers, []
        if not transfers:
            return
        spans = plan_spans(transfers, SPAN_BYTES)
        converts = any(transfer.stored.dtype != transfer.target.dtype for transfer in transfers)
        carry(spans, _carriers(self._device, converts=converts, num_spans=len(spans)), self._tell)
        self._num_done += sum(span.num_bytes for span in spans)

    def _tell(self, num_done: int, num_total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(self._num_done + num_done, self._num_total)


def _carriers(device: torch.device, *, converts: bool, num_spans: int) -> list[Carrier]:
    """One carrier for each reader."""
    num_cores = os.cpu_count() or 1
    if device.type == "cuda":
        num_readers = min(MAX_READERS, num_cores, num_spans)
        return [Staged(CudaTransport(device), SPAN_BYTES) for _ in range(num_readers)]
    if converts or device.type != "cpu":
        return [Staged(HostTransport(), SPAN_BYTES)]  # torch converts on all cores by itself
    return [InPlace() for _ in range(min(MAX_READERS, num_cores, num_spans))]


def _as_it_is(layer: LayerWeights) -> LayerWeights:
    return layer


def _converted(layer: LayerWeights, convert: Convert) -> LayerWeights:
    return replace(layer, **{name: convert(getattr(layer, name)) for name in MATRICES})


def _allocate(
    allocator: _Source, config: ModelConfig, finish: Callable[[LayerWeights], LayerWeights] = _as_it_is
) -> DecoderWeights:
    embed_VE = allocator.tensor("model.embed_tokens.weight")
    return DecoderWeights(
        embed_VE=embed_VE,
        layers=tuple(finish(_allocate_layer(allocator, config, f"model.layers.{i}")) for i in range(config.num_layers)),
        norm_E=allocator.tensor("model.norm.weight"),
        lm_head_VE=embed_VE if config.tie_word_embeddings else allocator.tensor("lm_head.weight"),
    )


def _allocate_layer(allocator: _Source, config: ModelConfig, layer: str) -> LayerWeights:
    qkv = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
    gate_up = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")

    def weight(*modules: str) -> torch.Tensor:
        return allocator.tensor(*(f"{module}.weight" for module in modules))

    def bias(*modules: str) -> torch.Tensor:
        return allocator.tensor(*(f"{module}.bias" for module in modules))

    return LayerWeights(
        input_norm_E=weight(f"{layer}.input_layernorm"),
        qkv_weight=weight(*qkv),
        qkv_bias=bias(*qkv) if config.qkv_bias else None,
        q_norm_D=weight(f"{layer}.self_attn.q_norm") if config.qk_norm else None,
        k_norm_D=weight(f"{layer}.self_attn.k_norm") if config.qk_norm else None,
        o_weight=weight(f"{layer}.self_attn.o_proj"),
        o_bias=bias(f"{layer}.self_attn.o_proj") if config.o_bias else None,
        post_norm_E=weight(f"{layer}.post_attention_layernorm"),
        gate_up_weight=weight(*gate_up),
        gate_up_bias=bias(*gate_up) if config.mlp_bias else None,
        down_weight=weight(f"{layer}.mlp.down_proj"),
        down_bias=bias(f"{layer}.mlp.down_proj") if config.mlp_bias else None,
    )
