"""Turn a model folder into a quantized one, layer by layer. Knows the order of the work; each step is elsewhere.

Every layer is read through the layers before it as they are after quantization, so that its scales and its rounding
answer to what it will really see. In memory are the hidden states of the calibration text and the layer at hand.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.quantization.gptq import gptq
from autobot_llm.engine.quantization.layerwise import MATRICES, DenseLayer, InputStatistics, LayerMath
from autobot_llm.engine.quantization.reading import decode_module
from autobot_llm.engine.quantization.rounding import round_to_nearest
from autobot_llm.engine.quantization.scaling import scale_for_activations, smooth
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType, Scheme, scheme_of
from autobot_llm.engine.quantization.source import StoredModel, modules_of
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.engine.quantization.writing import (
    FolderWriter,
    quantization_config,
    stored_quantization,
    stored_tensors,
)
from autobot_llm.errors import ConfigurationError

BATCH_TOKENS = 4096  # of one forward pass through a layer
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass(frozen=True, slots=True)
class QuantizedFolder:
    """What was made. `by` is whose quantizer it was; bytes are those of all tensors and of the quantized matrices."""

    folder: Path
    scheme: Scheme
    by: str
    seconds: float
    num_resumed_layers: int
    num_bytes: int
    num_bytes_before: int
    num_linear_bytes: int
    num_linear_bytes_before: int


# B sequences, L tokens of each, E hidden size
def quantize_folder(
    source: Path,
    folder: Path,
    config: QuantizationConfig,
    *,
    sequences_BL: torch.Tensor | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> QuantizedFolder:
    """Quantize the model in `source` into the new `folder`, which appears when it is whole.

    `sequences_BL` are token ids to calibrate with. `on_progress(what, done, in all)` hears of every layer. After a
    crash the same call goes on where the work stopped; Ctrl-C removes it. Raises ConfigurationError for a model that
    is quantized already or whose shapes do not fit, ModelLoadError for a folder that is no model.
    """
    start = time.monotonic()
    tell = on_progress or (lambda what, done, total: None)
    model = load_config(source)
    scheme = scheme_of(config)
    _check(model, config, scheme, source, sequences_BL)
    stored_model = StoredModel(source, model)
    num_layers, num_resumed = model.num_layers, 0
    fingerprint = _fingerprint(source, config, sequences_BL)
    with FolderWriter(folder, fingerprint, num_layers).opened() as writer, _freed_memory_given_back():
        rest = stored_model.rest()
        writer.write_layer(num_layers, rest)
        work = _Work(model, config, scheme, stored_model, rest.pop("model.embed_tokens.weight"), sequences_BL)
        rest.clear()
        for index in range(num_layers):
            tell("layers quantized", index, num_layers)
            if (stored := writer.stored_layer(index)) is not None:
                work.replay(index, stored)
                num_resumed += 1
            else:
                writer.write_layer(index, work.quantize(index))
        stored_model.refuse_changed_files()
        tell("layers quantized", num_layers, num_layers)
        num_bytes = writer.finish(source, quantization_config(scheme))
    return QuantizedFolder(
        folder=folder,
        scheme=scheme,
        by="autobot_llm",
        seconds=time.monotonic() - start,
        num_resumed_layers=num_resumed,
        num_bytes=num_bytes,
        num_bytes_before=stored_model.num_bytes,
        num_linear_bytes=work.num_linear_bytes,
        num_linear_bytes_before=work.num_linear_bytes_before,
    )


def describe(source: Path, folder: Path, *, by: str, seconds: float) -> QuantizedFolder:
    """The same of a folder that somebody else quantized. Raises ModelLoadError for one that we cannot read."""
    before = StoredModel(source, load_config(source))
    model = load_config(folder)
    if model.quantization is None:
        raise ConfigurationError(f"{folder} is not quantized")
    after = load_weights(folder, model, dtype=None, device="cpu", keep_quantized=True)
    matrices = [getattr(layer, f"{name}_weight") for layer in after.layers for name in MATRICES]
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedWeight)]
    return QuantizedFolder(
        folder=folder,
        scheme=model.quantization.scheme,
        by=by,
        seconds=seconds,
        num_resumed_layers=0,
        num_bytes=after.num_bytes,
        num_bytes_before=before.num_bytes,
        num_linear_bytes=sum(matrix.num_bytes for matrix in quantized),
        num_linear_bytes_before=sum(matrix.numel() * before.dtype.itemsize for matrix in quantized),
    )


@contextmanager
def _freed_memory_given_back() -> Iterator[None]:
    """Let glibc give the system what is freed in blocks of a megabyte or more; other systems' libraries are let be.

    It learns to keep blocks of up to 32 MB for itself, and the holes between a layer's matrices grow with every layer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it would have come to by itself


class _Work:
    """The layers of one model on their way, and the hidden states that enter the next one."""

    def __init__(
        self,
        model: ModelConfig,
        config: QuantizationConfig,
        scheme: Scheme,
        source: StoredModel,
        embed_VE: torch.Tensor,
        sequences_BL: torch.Tensor | None,
    ) -> None:
        self._model = model
        self._config = config
        self._scheme = scheme
        self._source = source
        # In the model's own type, as the model itself passes them on: the largest thing in memory here.
        self._hidden_BLE: torch.Tensor | None = None
        self.num_linear_bytes = self.num_linear_bytes_before = 0
        if config.type.reads_calibration and sequences_BL is not None:
            self._hidden_BLE = torch.nn.functional.embedding(sequences_BL, embed_VE)
            self._math = LayerMath(model, sequences_BL.shape[1])
            self._batch_size = max(1, BATCH_TOKENS // sequences_BL.shape[1])

    @torch.inference_mode()
    def quantize(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer, by the names that they are stored under."""
        layer, dtype = self._source.layer(index), self._source.dtype
        seen: dict[str, InputStatistics] = {}
        if self._hidden_BLE is not None:
            seen = {name: InputStatistics(layer.matrices[name].shape[1]) for name in MATRICES}
            self._pass_on(layer, index, seen, keep=False)
        if self._config.type is QuantizationType.W8A8 and self._config.smooth_quant_alpha:
            smooth(layer, seen, self._config.smooth_quant_alpha, dtype)
        elif self._config.type is QuantizationType.AWQ:
            scale_for_activations(layer, seen, self._scheme, self._model, dtype)
        quantized = {name: self._rounded(layer.matrices[name], seen.pop(name, None), dtype) for name in MATRICES}
        tensors = _layer_tensors(self._model, index, layer, quantized, dtype)
        self._finish(layer, index, quantized)
        return tensors

    @torch.inference_mode()
    def replay(self, index: int, stored: Mapping[str, torch.Tensor]) -> None:
        """Pass the hidden states through a layer that an earlier run quantized."""
        prefix, layer, dtype = f"model.layers.{index}.", self._source.layer(index), self._source.dtype
        quantized = {}
        for name, modules in modules_of(self._model).items():
            parts = []
            for module, rows in modules.items():
                own = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{prefix}{module}.weight")}
                shape = (rows.stop - rows.start, layer.matrices[name].shape[1])
                parts.append(decode_module(own, stored_quantization(self._scheme), *shape, dtype))
                if (bias := stored.get(f"{prefix}{module}.bias")) is not None and layer.biases[name] is not None:
                    layer.biases[name][rows] = bias.float()  # type: ignore[index]
            joined = QuantizedWeight.below_each_other(parts)
            assert joined is not None, "what we write has no map of groups"
            quantized[name] = joined
        layer.input_norm_E = stored[f"{prefix}input_layernorm.weight"].float()
        layer.post_norm_E = stored[f"{prefix}post_attention_layernorm.weight"].float()
        self._finish(layer, index, quantized)

    def _rounded(self, weight_OI: torch.Tensor, seen: InputStatistics | None, dtype: torch.dtype) -> QuantizedWeight:
        if seen is None:
            return round_to_nearest(weight_OI, self._scheme, dtype)
        if self._config.type is QuantizationType.AWQ:
            importance_I = seen.hessian_II.diagonal() / seen.hessian_II.diagonal().mean().clamp(min=1e-20)
            return round_to_nearest(weight_OI, self._scheme, dtype, importance_I=importance_I)
        act_order = self._config.desc_act or self._config.type is not QuantizationType.GPTQ
        return gptq(weight_OI, seen.hessian_II, self._scheme, dtype, act_order=act_order)

    def _finish(self, layer: DenseLayer, index: int, quantized: Mapping[str, QuantizedWeight]) -> None:
        for name, weight in quantized.items():
            self.num_linear_bytes += weight.num_bytes
            self.num_linear_bytes_before += weight.numel() * self._source.dtype.itemsize
            if self._hidden_BLE is not None:
                layer.matrices[name] = weight.dequantize(self._source.dtype).float()
        self._pass_on(layer, index, None, keep=True)

    def _pass_on(
        self, layer: DenseLayer, index: int, seen: Mapping[str, InputStatistics] | None, *, keep: bool
    ) -> None:
        if self._hidden_BLE is None:
            return
        for batch in torch.split(self._hidden_BLE, self._batch_size):
            after = self._math.forward(layer, index, batch.float(), seen)
            if keep:
                batch.copy_(after)


def _layer_tensors(
    model: ModelConfig,
    index: int,
    layer: DenseLayer,
    quantized: Mapping[str, QuantizedWeight],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}"
    norms = {
        "input_layernorm": layer.input_norm_E,
        "post_attention_layernorm": layer.post_norm_E,
        "self_attn.q_norm": layer.q_norm_D,
        "self_attn.k_norm": layer.k_norm_D,
    }
    tensors = {f"{prefix}.{name}.weight": norm.to(dtype) for name, norm in norms.items() if norm is not None}
    for name, modules in modules_of(model).items():
        for module, rows in modules.items():
            tensors |= stored_tensors(f"{prefix}.{module}", quantized[name].rows(rows.start, rows.stop))
            if (bias := layer.biases[name]) is not None:
                tensors[f"{prefix}.{module}.bias"] = bias[rows].to(dtype)
    return tensors


def _check(
    model: ModelConfig,
    config: QuantizationConfig,
    scheme: Scheme,
    source: Path,
    sequences_BL: torch.Tensor | None,
) -> None:
    if model.quantization is not None:
        raise ConfigurationError(f"{source} is quantized already ({model.quantization.scheme.name})")
    if config.type.needs_calibration and sequences_BL is None:
        raise ConfigurationError(f"{config.type.value} needs a text to calibrate with; w8, w4 and fp8 need none")
    for name, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size),
                       ("attention's width", model.num_heads * model.head_size)):  # fmt: skip
        if scheme.group_size and size % scheme.group_size:
            fitting = [g for g in (32, 64, 128) if size % g == 0]
            advice = f"expected a group size of {', '.join(map(str, fitting))}" if fitting else "w8, w8a8 or fp8 fit"
            raise ConfigurationError(f"{name} {size} is not a multiple of group_size={scheme.group_size}: {advice}")


def _fingerprint(source: Path, config: QuantizationConfig, sequences_BL: torch.Tensor | None) -> dict[str, object]:
    """What a finished layer depends on: if it is the same, the layer may be kept."""
    files = {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(source.iterdir())
        if path.suffix in (".safetensors", ".json")
    }
    read = b"" if sequences_BL is None else sequences_BL.numpy().tobytes()
    return {
        "format": 2,
        "source": str(source.resolve()),
        "files": files,
        "config": asdict(config),
        "calibration": hashlib.blake2b(read, digest_size=16).hexdigest(),
    }
