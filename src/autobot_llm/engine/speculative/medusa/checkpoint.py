"""Read and write Medusa heads: the published files, and dictionaries. Knows names and shapes; knows no arithmetic.

Published: a folder with config.json (medusa_num_heads, medusa_num_layers, base_model_name_or_path) and
medusa_lm_head.pt or .safetensors with `{head}.{layer}.linear.weight`, `.bias` and `{head}.{num_layers}.weight`. A .pt
file is read with `weights_only`, so nothing in it is run. Heads that use the model's own projection leave the last of
these tensors out, and config.json says `medusa_shares_lm_head`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from autobot_llm.engine.models.whole_file import write_json, write_tensors
from autobot_llm.engine.speculative.medusa.heads import MedusaHeads
from autobot_llm.errors import ModelLoadError

FILE_NAMES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors")
_TENSOR_NAME = re.compile(r"(?:medusa_head\.|head_)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")


class HeadsFile(msgspec.Struct, frozen=True):
    """What config.json says beside the heads. `medusa_choices` is their measured tree, where there is one."""

    medusa_num_heads: int | None = None
    medusa_num_layers: int | None = None
    base_model_name_or_path: str | None = None
    medusa_shares_lm_head: bool = False
    medusa_choices: list[list[int]] | None = None
    medusa_head_accuracies: list[list[float]] | None = None


@dataclass(frozen=True, slots=True)
class LoadedHeads:
    heads: MedusaHeads
    about: HeadsFile


def load_medusa_heads(
    source: Path | Mapping[str, Any],
    *,
    hidden_size: int,
    vocab_size: int,
    max_heads: int | None = None,
    lm_head_VE: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedHeads:
    """Heads from a folder, a file, or a dictionary of tensors or of `head_{i}`, each a dictionary of tensors.

    `lm_head_VE` is the model's projection, for heads that have none. At most `max_heads` are taken, the first ones.
    Raises ModelLoadError, naming file, tensor and shape, for whatever is missing, malformed or of another model.
    """
    about = HeadsFile()
    if isinstance(source, Mapping):
        where, tensors = "the dictionary", _flattened(source)
    else:
        path = _file_of(Path(source))
        where, tensors = str(path), _flattened(_read(path))
        if (path.parent / "config.json").exists():
            about = _read_config(path.parent / "config.json")
    by_head = _by_head(where, tensors)
    num_heads = len(by_head)
    if about.medusa_num_heads is not None and about.medusa_num_heads > num_heads:
        raise ModelLoadError(
            f"{where}: {num_heads} heads, but config.json says medusa_num_heads={about.medusa_num_heads}"
        )
    num_layers = 1 + max(layer for layer, kind in by_head[0] if kind.startswith("linear"))
    if about.medusa_num_layers is not None and about.medusa_num_layers != num_layers:
        raise ModelLoadError(
            f"{where}: {num_layers} residual blocks a head, but config.json says "
            f"medusa_num_layers={about.medusa_num_layers}"
        )
    has_projection = (num_layers, "weight") in by_head[0]
    if not has_projection and lm_head_VE is None:
        raise ModelLoadError(
            f"{where}: tensor 0.{num_layers}.weight is missing, and the model's projection is not given"
        )
    if lm_head_VE is not None and lm_head_VE.shape != (vocab_size, hidden_size):
        raise ModelLoadError(
            f"the model's projection has shape {tuple(lm_head_VE.shape)}; expected {(vocab_size, hidden_size)}"
        )
    with torch.device("meta"):
        heads = MedusaHeads(
            min(num_heads, max_heads or num_heads),
            hidden_size,
            vocab_size,
            num_layers=num_layers,
            lm_head_VE=None if has_projection else lm_head_VE,
        )
    state = {}
    for name, empty in heads.state_dict().items():
        head, layer, kind = name.split(".", 2)
        tensor = by_head[int(head)].get((int(layer), kind))
        if tensor is None:
            raise ModelLoadError(f"{where}: tensor {name} is missing")
        if tensor.shape != empty.shape:
            raise ModelLoadError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}; a model of hidden_size={hidden_size} and "
                f"vocab_size={vocab_size} asks for {tuple(empty.shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype)
    heads.load_state_dict(state, assign=True)
    return LoadedHeads(heads.requires_grad_(False), about)


def save_medusa_heads(
    folder: Path,
    heads: MedusaHeads,
    *,
    base_model: str,
    choices: Sequence[Sequence[int]] | None = None,
    accuracies: Sequence[Sequence[float]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config.json and medusa_lm_head.safetensors into `folder`; each file appears whole or not at all."""
    about = {
        "model_type": "medusa",
        "medusa_num_heads": len(heads),
        "medusa_num_layers": heads.num_layers,
        "medusa_shares_lm_head": heads.shares_lm_head,
        "base_model_name_or_path": base_model,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
    }
    if choices is not None:
        about["medusa_choices"] = [list(path) for path in choices]
    if accuracies is not None:
        about["medusa_head_accuracies"] = [[round(share, 4) for share in row] for row in accuracies]
    write_tensors(folder / FILE_NAMES[0], {name: tensor.to(dtype) for name, tensor in heads.state_dict().items()})
    write_json(folder / "config.json", about)


def _file_of(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in FILE_NAMES if (path / name).exists()), None)
        if found is None:
            raise ModelLoadError(f"{path}: none of {', '.join(FILE_NAMES)} is there")
        return found
    if not path.exists():
        raise ModelLoadError(f"{path}: no such file")
    return path


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(str(path))
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as exc:
        raise ModelLoadError(f"{path}: not a file of tensors alone: {str(exc).splitlines()[0]}") from exc
    if not isinstance(value, Mapping):
        raise ModelLoadError(f"{path}: expected a dictionary of tensors, found {type(value).__name__}")
    return value


def _read_config(path: Path) -> HeadsFile:
    try:
        return msgspec.json.decode(path.read_bytes(), type=HeadsFile)
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelLoadError(f"{path}: {exc}") from exc


def _flattened(source: Mapping[str, Any]) -> dict[str, Any]:
    """`{"head_0": {"0.linear.weight": t}}` as `{"head_0.0.linear.weight": t}`."""
    flat: dict[str, Any] = {}
    for name, value in source.items():
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        else:
            flat[str(name)] = value
    return flat


def _by_head(where: str, tensors: Mapping[str, Any]) -> list[dict[tuple[int, str], torch.Tensor]]:
    """The tensors of each head, by layer and kind."""
    found: dict[int, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or not isinstance(tensor, torch.Tensor):
            raise ModelLoadError(
                f"{where}: {name}: no tensor of Medusa heads; expected {{head}}.{{layer}}.linear.weight, "
                ".linear.bias or .weight"
            )
        found.setdefault(int(match[1]), {})[int(match[2]), match[3]] = tensor
    if sorted(found) != list(range(len(found))) or not found:
        raise ModelLoadError(f"{where}: heads {sorted(found)}: expected 0, 1, 2 ...")
    if not any(kind.startswith("linear") for _, kind in found[0]):
        raise ModelLoadError(f"{where}: tensor 0.0.linear.weight is missing")
    return [found[head] for head in range(len(found))]
