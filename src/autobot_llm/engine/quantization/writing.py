"""Write a quantized folder, a layer at a time, so that it appears whole or not at all. Knows the format and files.

Format: compressed-tensors (pack-quantized, int-quantized, float-quantized), one safetensors file for each layer and one
for the rest, with an index: vLLM and transformers read it. Until it is complete everything lies in a hidden folder
beside it, which a later run with the same inputs goes on from; a run with others starts anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autobot_llm.engine.models.checkpoint import INDEX_FILE
from autobot_llm.engine.quantization.detection import StoredQuantization
from autobot_llm.engine.quantization.folders import COPIED_FILES, locked
from autobot_llm.engine.quantization.packing import pack_columns, pack_rows
from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.errors import ConfigurationError

_STATE, _LOCK = "state.json", "lock"


class FolderWriter:
    """Takes a model's layers in order. Use it as a context: Ctrl-C removes what there is, other errors keep it."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], num_layers: int) -> None:
        self._folder = folder
        self._partial = folder.parent / f".{folder.name}.partial"
        self._fingerprint = json.dumps(fingerprint, sort_keys=True)
        self._num_layers = num_layers

    @contextmanager
    def opened(self) -> Iterator[FolderWriter]:
        """Raises ConfigurationError where the folder exists, or another process is writing it."""
        if self._folder.exists():
            raise ConfigurationError(f"{self._folder} exists already: name another folder, or remove it")
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            with locked(self._partial / _LOCK, wait=False):
                self._start_anew_unless_same()
                yield self
        except BlockingIOError as error:
            raise ConfigurationError(f"{self._folder} is being written by another process") from error
        except KeyboardInterrupt:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{self._folder} cannot be written: {error}") from error

    def stored_layer(self, index: int) -> dict[str, torch.Tensor] | None:
        """What an earlier run wrote of a layer; None where it did not come that far."""
        path = self._partial / self._file_name(index)
        try:
            return load_file(path) if path.exists() else None
        except (SafetensorError, OSError):
            return None

    def write_layer(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """`index` `num_layers` is the rest: embedding, last norm and, if it has its own, the head."""
        path = self._partial / self._file_name(index)
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
        temporary.replace(path)

    def finish(self, source: Path, quantization: Mapping[str, Any]) -> int:
        """Complete the folder with `source`'s config and tokenizer; returns the bytes of its tensors."""
        weight_map: dict[str, str] = {}
        num_bytes = 0
        for index in range(self._num_layers + 1):
            tensors = self.stored_layer(index)
            assert tensors is not None, f"layer {index} was written"
            weight_map |= dict.fromkeys(tensors, self._file_name(index))
            num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index_file = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (self._partial / INDEX_FILE).write_text(json.dumps(index_file, indent=2) + "\n")
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = dict(quantization)
        (self._partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in COPIED_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, self._partial / name)
        for name in (_STATE, _LOCK):
            (self._partial / name).unlink()
        self._partial.rename(self._folder)
        return num_bytes

    def _start_anew_unless_same(self) -> None:
        state = self._partial / _STATE
        if state.exists() and state.read_text() == self._fingerprint:
            return
        for path in self._partial.iterdir():
            if path.name != _LOCK:
                path.unlink()
        state.write_text(self._fingerprint)

    def _file_name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{self._num_layers + 1:05}.safetensors"


def stored_tensors(module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of one matrix in compressed-tensors' format, by name."""
    scheme, values_OI, zeros_OG = weight.scheme, weight.values_OI, weight.zero_points_OG
    scales = weight.scales_OG[:1, 0] if scheme.granularity == "tensor" else weight.scales_OG
    if _packing(scheme) == "plain":
        return {f"{module}.weight": values_OI, f"{module}.weight_scale": scales}
    middle = 2 ** (scheme.num_bits - 1)
    tensors = {
        f"{module}.weight_packed": pack_rows(values_OI.to(torch.int32) + middle, scheme.num_bits),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        zeros = torch.zeros(weight.scales_OG.shape) if zeros_OG is None else zeros_OG
        tensors[f"{module}.weight_zero_point"] = pack_columns(zeros.to(torch.int32) + middle, scheme.num_bits)
    return tensors


def stored_quantization(scheme: Scheme) -> StoredQuantization:
    """How `stored_tensors` stores this scheme."""
    return StoredQuantization("plain" if _packing(scheme) == "plain" else "packed", scheme)


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    formats = {"packed": "pack-quantized", "plain": f"{scheme.kind}-quantized"}
    name = formats[_packing(scheme)]
    activations = None
    if scheme.activations is not None:
        kind = "int" if scheme.activations == "int8" else "float"
        activations = _arguments(kind, 8, "token", dynamic=True, observer=None)
    weights = _arguments(
        scheme.kind, scheme.num_bits, scheme.granularity, group_size=scheme.group_size, symmetric=scheme.symmetric
    )
    group = {
        "format": name,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": name,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _packing(scheme: Scheme) -> str:
    """Values of 8 bits lie as they are where activations are quantized, too; else words of 32 bits are packed."""
    return "plain" if scheme.kind == "float" or scheme.activations is not None else "packed"


def _arguments(
    kind: str,
    num_bits: int,
    strategy: str,
    *,
    dynamic: bool = False,
    group_size: int | None = None,
    symmetric: bool = True,
    observer: str | None = "minmax",
) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": num_bits,
        "observer": observer,
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": symmetric,
        "type": kind,
    }
