"""Read a quantized folder's matrices, one after the other. Knows formats and shapes; knows no models, no products.

Which modules are quantized is seen by the tensors that are stored for them; every name, shape and dtype is checked
against the headers before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from autobot_llm.engine.models.checkpoint import Checkpoint, StoredTensor, open_checkpoint, stored_shapes
from autobot_llm.engine.quantization.detection import StoredQuantization
from autobot_llm.engine.quantization.packing import unpack_awq, unpack_columns, unpack_rows
from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.errors import ModelLoadError

Shape = tuple[int, ...]
# the tensor that shows that a module is quantized
_MARKS = {"packed": "weight_packed", "plain": "weight_scale", "gptq": "qweight", "gptq_v2": "qweight", "awq": "qweight"}


class _Part(NamedTuple):
    """One stored tensor of a quantized module: the shapes it may have, and whether it may be missing."""

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    is_optional: bool = False


_BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)  # what a QuantizedWeight stores
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedReader:
    """Gives the tensors of a quantized folder by the names that its unquantized model would have.

    `shapes` are those of the unquantized model. With `keep_quantized` a quantized matrix comes as a QuantizedWeight,
    else as `dtype`. Raises ModelLoadError, naming file and tensor. `on_progress` counts bytes of the files.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Shape],
        quantization: StoredQuantization,
        *,
        model_type: str,
        may_ignore: frozenset[str],
        dtype: torch.dtype,
        device: torch.device,
        keep_quantized: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._shapes = shapes
        self._quantization = quantization
        self._dtype = dtype
        self._device = device
        self._keep_quantized = keep_quantized
        # what is to be dequantized is so on the host, where it needs no more of the device than it fills
        self._decoding_device = device if keep_quantized else torch.device("cpu")
        self._parts, wanted = _plan(folder, shapes, quantization)
        self.checkpoint: Checkpoint = open_checkpoint(
            folder, wanted, model_type=model_type, may_ignore=may_ignore, packed=True
        )
        self._check_dtypes(folder)
        self._on_progress = on_progress
        self._num_total = sum(tensor.num_bytes for tensor in self.checkpoint.tensors.values())
        self._num_done = 0

    def tensor(self, *names: str) -> torch.Tensor:
        """The named matrices, one below the other."""
        if all(name in self._parts for name in names):
            parts = [self._quantized(name) for name in names]
            # the head and the embedding are shared with, or read by, code that takes whole matrices
            keep = self._keep_quantized and names[0].startswith("model.layers.")
            joined = QuantizedWeight.below_each_other(parts) if keep else None
            if joined is not None:
                return joined
            return torch.cat([part.dequantize() for part in parts]).to(self._device)
        dense = [self._dense(name) for name in names]
        return (torch.cat(dense) if len(dense) > 1 else dense[0]).to(self._device)

    def _dense(self, name: str) -> torch.Tensor:
        if name in self._parts:
            return self._quantized(name).dequantize()
        return self._read(self.checkpoint.tensors[name]).to(self._dtype)

    def _quantized(self, name: str) -> QuantizedWeight:
        module = name.removesuffix(".weight")
        stored = {part: self._read(self.checkpoint.tensors[f"{module}.{part}"]) for part in self._parts[name]}
        num_outputs, num_inputs = self._shapes[name]
        try:
            return decode_module(stored, self._quantization, num_outputs, num_inputs, self._dtype)
        except ValueError as error:
            raise ModelLoadError(f"{module}: {error}") from error

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.start)
                view = memoryview(raw.numpy().data)
                while len(view) and (num_read := file.readinto(view)):
                    view = view[num_read:]
        except OSError as error:
            raise ModelLoadError(f"{stored.path}: {error}") from error
        if len(view):
            raise ModelLoadError(f"{stored.path}: truncated while it was read")
        self._num_done += stored.num_bytes
        if self._on_progress is not None:
            self._on_progress(self._num_done, self._num_total)
        return raw.to(self._decoding_device).view(stored.dtype).view(stored.shape)

    def _check_dtypes(self, folder: Path) -> None:
        for name, stored in self.checkpoint.tensors.items():
            module, _, last = name.rpartition(".")
            parts = self._parts.get(f"{module}.weight", {})
            accepted = parts[last].dtypes if last in parts else _FLOATS
            if stored.dtype not in accepted:
                has, *names = (str(dtype).removeprefix("torch.") for dtype in (stored.dtype, *accepted))
                raise ModelLoadError(f"{stored.path}: tensor {name} has dtype {has}; expected {', '.join(names)}")


def decode_module(
    stored: Mapping[str, torch.Tensor], quantization: StoredQuantization, num_outputs: int, num_inputs: int,
    dtype: torch.dtype,
) -> QuantizedWeight:  # fmt: skip
    """The matrix that a module's stored tensors stand for. Raises ValueError where they contradict each other."""
    return _DECODERS[quantization.packing](stored, quantization, num_outputs, num_inputs, dtype)


def _plan(
    folder: Path, shapes: Mapping[str, Shape], quantization: StoredQuantization
) -> tuple[dict[str, dict[str, _Part]], dict[str, Shape]]:
    """The parts of every quantized matrix by its name, and the shape of every tensor to be read."""
    found = stored_shapes(folder)
    quantized: dict[str, dict[str, _Part]] = {}
    wanted: dict[str, Shape] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or f"{module}.{_MARKS[quantization.packing]}" not in found:
            wanted[name] = shape
            continue
        parts = {}
        for part in _parts(quantization, *shape):
            stored_name = f"{module}.{part.name}"
            if part.is_optional and stored_name not in found:
                continue
            stored_shape = found.get(stored_name)
            # the one it has, if it may have it; else the first, so that the mistake is told by name
            wanted[stored_name] = stored_shape if stored_shape in part.shapes and stored_shape else part.shapes[0]
            parts[part.name] = part
        quantized[name] = parts
    if not quantized:
        raise ModelLoadError(f"{folder}: config.json says that it is quantized, and no quantized matrix is stored")
    return quantized, wanted


def _parts(quantization: StoredQuantization, num_outputs: int, num_inputs: int) -> tuple[_Part, ...]:
    scheme, per_word = quantization.scheme, 32 // quantization.scheme.num_bits
    groups = scheme.num_groups(num_inputs)
    int32, words = (torch.int32,), -(-num_inputs // per_word)
    if quantization.packing in ("gptq", "gptq_v2"):
        return (
            _Part("qweight", ((words, num_outputs),), int32),
            _Part("qzeros", ((groups, -(-num_outputs // per_word)),), int32),
            _Part("scales", ((groups, num_outputs),), _FLOATS),
            _Part("g_idx", ((num_inputs,),), int32, is_optional=True),
        )
    if quantization.packing == "awq":
        return (
            _Part("qweight", ((num_inputs, num_outputs // per_word),), int32),
            _Part("qzeros", ((groups, num_outputs // per_word),), int32, is_optional=scheme.symmetric),
            _Part("scales", ((groups, num_outputs),), _FLOATS),
        )
    scales: tuple[Shape, ...] = ((num_outputs, groups),)
    if scheme.granularity == "channel":
        scales = ((num_outputs, 1), (num_outputs,))
    elif scheme.granularity == "tensor":
        scales = ((1,), (), (1, 1))
    scale = _Part("weight_scale", scales, _FLOATS)
    if quantization.packing == "packed":
        zero_words = -(-num_outputs // per_word)
        return (
            _Part("weight_packed", ((num_outputs, words),), int32),
            scale,
            _Part("weight_shape", ((2,),), (torch.int64, torch.int32)),
            _Part("weight_zero_point", ((zero_words, groups),), int32, is_optional=scheme.symmetric),
            _Part("weight_g_idx", ((num_inputs,),), int32, is_optional=True),
        )
    dtype = torch.float8_e4m3fn if scheme.kind == "float" else torch.int8
    return (
        _Part("weight", ((num_outputs, num_inputs),), (dtype,)),
        scale,
        _Part("weight_zero_point", scales, (torch.int8,), is_optional=True),
    )


def _from_compressed_tensors(
    stored: Mapping[str, torch.Tensor], quantization: StoredQuantization, num_outputs: int, num_inputs: int,
    dtype: torch.dtype,
) -> QuantizedWeight:  # fmt: skip
    scheme = quantization.scheme
    middle = 2 ** (scheme.num_bits - 1)
    zeros = stored.get("weight_zero_point")
    if quantization.packing == "packed":
        if (shape := stored["weight_shape"].tolist()) != [num_outputs, num_inputs]:
            raise ValueError(f"weight_shape is {shape}; config.json asks for {[num_outputs, num_inputs]}")
        # a row's words hold its values in the order of their bytes, and of the halves of a byte
        values = stored["weight_packed"].view(torch.uint8)[:, : -(-num_inputs * scheme.num_bits // 8)]
        if scheme.num_bits == 8:
            values = (values ^ middle).view(torch.int8)
        if zeros is not None:
            zeros = unpack_columns(zeros, scheme.num_bits, num_outputs) - middle
    else:
        values = stored["weight"]
    scales = stored["weight_scale"].reshape(-1, scheme.num_groups(num_inputs)).expand(num_outputs, -1).contiguous()
    if zeros is not None:
        zeros = None if scheme.symmetric else zeros.reshape(-1, scales.shape[1]).expand(num_outputs, -1)
    return _weight(values, scales, zeros, scheme, dtype, stored.get("weight_g_idx"))


def _from_auto_gptq(
    stored: Mapping[str, torch.Tensor], quantization: StoredQuantization, num_outputs: int, num_inputs: int,
    dtype: torch.dtype,
) -> QuantizedWeight:  # fmt: skip
    bits = quantization.scheme.num_bits
    middle = 2 ** (bits - 1)
    values_OI = unpack_columns(stored["qweight"], bits, num_inputs).t() - middle
    zeros_GO = unpack_rows(stored["qzeros"], bits, num_outputs)
    if quantization.packing == "gptq":  # the first version stores one less than the zero point
        zeros_GO = (zeros_GO + 1) & (2**bits - 1)
    zeros_OG = (zeros_GO - middle).t().contiguous()
    scales_OG = stored["scales"].t().contiguous()
    return _weight(values_OI, scales_OG, zeros_OG, quantization.scheme, dtype, stored.get("g_idx"))


def _from_auto_awq(
    stored: Mapping[str, torch.Tensor], quantization: StoredQuantization, num_outputs: int, num_inputs: int,
    dtype: torch.dtype,
) -> QuantizedWeight:  # fmt: skip
    values_OI = unpack_awq(stored["qweight"]).t() - 8
    zeros = stored.get("qzeros")
    zeros_OG = None if zeros is None else (unpack_awq(zeros) - 8).t().contiguous()
    return _weight(values_OI, stored["scales"].t().contiguous(), zeros_OG, quantization.scheme, dtype, None)


_DECODERS = {
    "packed": _from_compressed_tensors,
    "plain": _from_compressed_tensors,
    "gptq": _from_auto_gptq,
    "gptq_v2": _from_auto_gptq,
    "awq": _from_auto_awq,
}


def _weight(
    values: torch.Tensor,
    scales_OG: torch.Tensor,
    zeros_OG: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
    group_of_input_I: torch.Tensor | None,
) -> QuantizedWeight:
    """Of whole numbers, or of what a QuantizedWeight stores.

    Zero points that are all 0 and maps that say nothing are dropped, so that the fast products can be used.
    """
    if group_of_input_I is not None:
        group_of_input_I = group_of_input_I.to(torch.int64)
        if group_of_input_I.min() < 0 or group_of_input_I.max() >= scales_OG.shape[1]:
            raise ValueError(f"g_idx names a group that is not there; there are {scales_OG.shape[1]}")
        inputs_I = torch.arange(len(group_of_input_I), device=group_of_input_I.device)
        if torch.equal(group_of_input_I, inputs_I // (scheme.group_size or len(inputs_I))):
            group_of_input_I = None
    if zeros_OG is not None:
        zeros_OG = zeros_OG.to(torch.int8) if zeros_OG.any() else None
    make = QuantizedWeight if values.dtype in _BYTES else QuantizedWeight.from_values
    return make(values, scales_OG, zeros_OG, scheme, dtype=dtype, group_of_input_I=group_of_input_I)
