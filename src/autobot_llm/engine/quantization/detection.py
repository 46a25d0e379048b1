"""What a folder's `quantization_config` says: which scheme, in which format. Knows the formats' JSON; reads no tensor.

Formats: compressed-tensors (pack-, int-, float- and naive-quantized), AutoGPTQ (checkpoint formats v1 and v2), AutoAWQ
(gemm). What is not supported is refused by name, with what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from autobot_llm.engine.quantization.scheme import Scheme

Packing = Literal["packed", "plain", "gptq", "gptq_v2", "awq"]
METHODS = ("compressed-tensors", "gptq", "awq")
_PACKINGS: Mapping[str, Packing] = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
}


class NotSupportedError(ValueError):
    """The message names the field, its value and what is accepted."""


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a folder's quantized matrices are stored. Which of them are quantized is seen by what is stored."""

    packing: Packing
    scheme: Scheme


class _Arguments(msgspec.Struct):
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    dynamic: bool | str = False


class _Group(msgspec.Struct):
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    output_activations: _Arguments | None = None
    format: str | None = None


class _CompressedTensors(msgspec.Struct):
    config_groups: dict[str, _Group] = {}
    format: str = ""
    kv_cache_scheme: Any = None
    sparsity_config: Any = None
    transform_config: Any = None


class _AutoGptq(msgspec.Struct):
    bits: int
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    dynamic: Any = None


class _AutoAwq(msgspec.Struct):
    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"


def detect(quantization_config: Any) -> StoredQuantization:
    """Read the `quantization_config` of a config.json. Raises NotSupportedError."""
    if not isinstance(quantization_config, dict):
        raise NotSupportedError("quantization_config is not an object")
    method = quantization_config.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(_read(quantization_config, _CompressedTensors))
    if method == "gptq":
        return _auto_gptq(_read(quantization_config, _AutoGptq))
    if method == "awq":
        return _auto_awq(_read(quantization_config, _AutoAwq))
    raise _refusal("quant_method", method, METHODS)


def _compressed_tensors(found: _CompressedTensors) -> StoredQuantization:
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = getattr(found, name)
        if value and value != {"format": "dense"}:
            raise NotSupportedError(f"{name}={value!r} is not supported: expected none")
    groups = list(found.config_groups.values())
    if not groups:
        raise NotSupportedError("config_groups is empty: expected one group")
    first = groups[0]
    if any((group.weights, group.input_activations) != (first.weights, first.input_activations) for group in groups):
        raise NotSupportedError("config_groups holds several schemes; expected one for all layers")
    formats = {group.format or found.format for group in groups}
    if len(formats) > 1:
        raise NotSupportedError(f"format={sorted(formats)}: expected one format for all layers")
    stored_format = formats.pop()
    if stored_format not in _PACKINGS:
        raise _refusal("format", stored_format, _PACKINGS)
    packing = _PACKINGS[stored_format]
    if first.weights is None:
        raise NotSupportedError("weights is missing in config_groups: quantized activations alone are not supported")
    if first.output_activations is not None:
        raise NotSupportedError("output_activations is not supported: expected none")
    scheme = _scheme(first.weights, _activations(first.input_activations))
    if (packing == "packed") != (stored_format == "pack-quantized") or (packing == "packed" and scheme.kind != "int"):
        raise NotSupportedError(f"format={stored_format!r} with {scheme.name} is not supported")
    if packing == "plain" and scheme.num_bits == 4:
        raise NotSupportedError(f"format={stored_format!r} with num_bits=4: expected pack-quantized")
    return StoredQuantization(packing, scheme)


def _scheme(weights: _Arguments, activations: Literal["int8", "fp8"] | None) -> Scheme:
    if weights.type not in ("int", "float"):
        raise _refusal("weights.type", weights.type, ("int", "float"))
    kind: Literal["int", "float"] = "float" if weights.type == "float" else "int"
    if weights.num_bits == 8:
        bits: Literal[4, 8] = 8
    elif weights.num_bits == 4 and kind == "int":
        bits = 4
    else:
        raise _refusal(f"weights.num_bits ({kind})", weights.num_bits, (8,) if kind == "float" else (4, 8))
    if weights.dynamic:
        raise _refusal("weights.dynamic", weights.dynamic, (False,))
    if kind == "float" and not weights.symmetric:
        raise _refusal("weights.symmetric", False, (True,))
    inferred = {None: "tensor", -1: "channel"}.get(weights.group_size, "group")
    strategy = weights.strategy or inferred
    if strategy == "tensor":
        return Scheme(kind, bits, "tensor", None, weights.symmetric, activations)
    if strategy == "channel":
        return Scheme(kind, bits, "channel", None, weights.symmetric, activations)
    if strategy == "group":
        return Scheme(kind, bits, "group", _group_size(weights.group_size), weights.symmetric, activations)
    raise _refusal("weights.strategy", strategy, ("tensor", "channel", "group"))


def _activations(found: _Arguments | None) -> Literal["int8", "fp8"] | None:
    if found is None:
        return None
    if not found.dynamic or isinstance(found.dynamic, str):
        raise NotSupportedError(
            "input_activations.dynamic=false (scales measured beforehand) is not supported: expected true"
        )
    if found.num_bits != 8 or found.type not in ("int", "float") or not found.symmetric:
        raise NotSupportedError(
            f"input_activations of {found.num_bits} bits, type {found.type!r}, symmetric={found.symmetric}: expected "
            "8 bits, int or float, symmetric"
        )
    if (strategy := found.strategy or "tensor") != "token":
        raise _refusal("input_activations.strategy", strategy, ("token",))
    return "int8" if found.type == "int" else "fp8"


def _auto_gptq(found: _AutoGptq) -> StoredQuantization:
    if found.bits not in (4, 8):
        raise _refusal("bits", found.bits, (4, 8))
    if found.checkpoint_format not in ("gptq", "gptq_v2"):
        raise _refusal("checkpoint_format", found.checkpoint_format, ("gptq", "gptq_v2"))
    if found.dynamic:
        raise NotSupportedError("dynamic (other settings for some layers) is not supported: expected none")
    bits: Literal[4, 8] = 4 if found.bits == 4 else 8
    packing: Packing = "gptq_v2" if found.checkpoint_format == "gptq_v2" else "gptq"
    # zero points are stored even for symmetric ones, where all of them are the middle
    if found.group_size == -1:
        return StoredQuantization(packing, Scheme("int", bits, "channel", None, symmetric=False))
    scheme = Scheme("int", bits, "group", _group_size(found.group_size), symmetric=False)
    return StoredQuantization(packing, scheme)


def _auto_awq(found: _AutoAwq) -> StoredQuantization:
    if found.bits != 4:
        raise _refusal("bits", found.bits, (4,))
    if found.version.lower() != "gemm":
        raise _refusal("version", found.version, ("gemm",))
    scheme = Scheme("int", 4, "group", _group_size(found.group_size), symmetric=not found.zero_point)
    return StoredQuantization("awq", scheme)


def _group_size(value: int | None) -> int:
    if value is None or value < 1:
        raise NotSupportedError(f"group_size={value}: expected a positive number")
    return value


def _read(value: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise NotSupportedError(f"quantization_config: {exc}") from exc


def _refusal(field: str, value: Any, accepted: Any) -> NotSupportedError:
    choices = ", ".join(str(choice) for choice in accepted)
    return NotSupportedError(f"{field}={value!r} is not supported: expected {choices}")
